"""What the engine trains: a pack -> sums of loss and weight, and what became of every slot.

Shapes: N anchors, V views of each, M = V x N groups, J drafted slots, R slots that count, P positions of a pack, E hidden size,
T terms.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_prep.target.frozen_head import FrozenHead
from train.attention.backend import AttentionBackend
from train.attention.flash import Taken
from train.attention.visibility import Anchors, Places
from train.data.pack import Pack
from train.drafter.base import Drafter
from train.drafter.layers import TokenHalves
from train.drafter.memory import Memory
from train.losses import divergences, terms, weights
from train.losses.chunked import by_teacher
from train.losses.recipe import LossRecipe
from train.losses.types import HeadInput, RowStatistics
from train.objectives import align
from train.schedules.schedule import Start, Text
from train.views.gather import gather
from train.views.plan import Plan, plan
from train.views.recipe import FULL, View

TERMS = terms.parts()  # what is averaged by itself


class Outcome(NamedTuple):
    """What one pack gave.

    `share`: what the pack adds to the step's loss; differentiable.
    `terms_T`: its parts in the order of `TERMS`, before they were divided.
    `loss`, `overlap`, `match` [V, N, J]: each slot's loss, its overlap with the teacher, and whether the likeliest tokens agree.
    Zero where a slot does not count; overlap and match are one where the token was given to the drafter (`objective.prefix`),
    and None where nobody asked for them and the loss does not read the whole of the teachers' distributions.
    `valid` [N, J]: which slots count.
    """

    share: Tensor
    terms_T: Tensor
    loss: Tensor
    overlap: Tensor | None
    match: Tensor | None
    valid: Tensor


@dataclass(frozen=True)
class Supervision:
    """How the drafter's outputs are compared with the target's, and what the comparison counts.

    `loss`: the terms of the loss and their weights.
    `weight_J`: what each slot counts; None: D-PACE decides.
    `chunk_rows`: how many rows' logits exist at a time.
    `view`: how the budgets of a pack become positions. A pack without budgets needs none.
    `view_weights`: what the loss of each view of a pack counts.
    `detach`: whether memory is constant, so that its projections learn from draft rows alone.
    """

    loss: LossRecipe
    weight_J: Tensor | None
    chunk_rows: int = 4096
    view: View | None = None
    view_weights: Sequence[float] = (1.0,)
    detach: bool = False


class Objective(nn.Module):
    """One drafter under one objective, loss and view.

    `alpha_VJ` is each slot's overlap in the optimizer step before, which lk_lambda follows; the engine keeps it.

    Args:
        head: the target's frozen embedding and LM head; held outside the module tree, so that no engine shards it.
    """

    def __init__(self, drafter: Drafter, head: FrozenHead, attend: AttentionBackend, supervision: Supervision):
        super().__init__()
        self.drafter = drafter
        self.shares_tokens = True
        self.slots = drafter.config.draft_length
        self._head = head
        self._attend = attend
        self._supervision = supervision
        self._view_weight_V = torch.tensor(supervision.view_weights)
        # Nothing is known at first: lambda is 1, all KL.
        self.alpha_VJ = torch.zeros(len(supervision.view_weights), self.slots, dtype=torch.float64)

    def weight_sums(self, pack: Pack) -> Tensor:
        """[T] float64: what each term's sum is divided by, known before the forward. D-PACE is divided by its slot count, so that
        no divisor depends on what the drafter says."""
        valid = pack.valid(self.slots)
        slots = valid.sum()
        weighted = slots if self._supervision.weight_J is None else (valid * self._slot_weights(pack, valid)).sum()
        draft_rows = pack.row_index(self.drafter.config.slots)[1].sum()
        return torch.stack([t.double() for t in (weighted, slots, draft_rows, slots)])

    def forward(
        self, pack: Pack, weight_sum_T: Tensor | None = None, memory: Memory | None = None, acceptance: bool = True
    ) -> Outcome:
        """`weight_sum_T`: `weight_sums` of all packs of the step, on all ranks; None: nothing is divided. `memory`: what
        `remember` has already made of the pack. `acceptance`: whether overlap and match are wanted. Without them the teachers say
        no more than the loss reads of them."""
        loss = self._supervision.loss
        # 1. Which rows count. Only they meet the LM head, whose product is the largest of the step. `nonzero` makes the host wait
        # for the GPU, and so does the order of teachers. Both stand here because little is queued yet. Behind the drafter, the
        # GPU would run dry at every step.
        valid = pack.valid(self.slots)
        valid_MJ = valid.repeat(pack.views, 1)
        row, slot = valid_MJ.nonzero(as_tuple=True)
        view = row // len(valid)
        anchor = row % len(valid)
        # The teacher of slot j = slot + 1 is at a + j − 1.
        position = pack.anchor_N[anchor] + slot
        teacher_R = pack.teacher_P[position]
        teachers = by_teacher(teacher_R, self._supervision.chunk_rows)
        # 2. The drafter runs. Supervised keys and queries are taken from its attention calls while it does.
        if memory is None:
            memory = self.remember(pack)
        watching = loss.kv_align or loss.query_align
        with align.Watch(self.drafter) if watching else nullcontext() as watch:
            output = self.draft(pack, memory)
        # 3. What the LM head and the loss are given. The label is the token after the teacher's: a pack's last position lacks it.
        label = pack.ids_P[(position + 1).clamp(max=len(pack.ids_P) - 1)]
        mix_VJ = torch.exp(-loss.eta * self._of_views(self.alpha_VJ, pack).to(slot.device))
        rows = HeadInput(
            draft_ME=output.reshape(-1, output.shape[-1]),
            index_R=row * self.slots + slot,
            teacher_LE=pack.last_hidden_RE,
            teacher_R=teacher_R,
            label_R=label,
            mix_R=mix_VJ[view, slot].float(),
            teachers=teachers,
        )
        # 4. The loss. Its divisors are sums over all packs of the step, on all ranks, and known before the forward: so a pack's
        # share is final when its backward begins, and the shares of all packs and ranks just add up.
        scale_T = torch.ones(len(TERMS)) if weight_sum_T is None else 1 / weight_sum_T.clamp(min=1e-9)
        scale_T = scale_T.to(slot.device, torch.float32)
        reads = "whole" if acceptance else loss.reads
        share, slots_sum, missed, statistics = self._head_loss(rows, pack, valid_MJ, scale_T, reads)
        aligned = [torch.zeros_like(share), torch.zeros_like(share)]
        if loss.kv_align:
            aligned[0] = loss.kv_align * align.kv_error(watch, self.drafter.config, memory, pack)
        if loss.query_align:
            aligned[1] = loss.query_align * align.query_error(watch, self.drafter, pack, valid)
        if watching:
            share = share + (torch.stack(aligned) * scale_T[2:]).sum()
        # 5. What became of every slot. A token that the drafter was given counts as guessed.
        slot_loss, overlap, match = (grid(values, valid_MJ).unflatten(0, (pack.views, -1)) for values in statistics[:3])
        in_prefix = pack.in_prefix(self.slots)
        terms_T = torch.stack([slots_sum, missed, *aligned]).detach()
        accepted = [t.masked_fill(in_prefix, 1) if reads == "whole" else None for t in (overlap, match)]
        return Outcome(share, terms_T, slot_loss, *accepted, valid)

    def draft_rows(self, pack: Pack) -> Tensor:
        """How many draft rows, and so how many of their own keys and values, belong to anchors that count."""
        rows = pack.row_index(self.drafter.config.slots)[1] & pack.valid(self.slots).any(1, keepdim=True)
        return pack.views * rows.sum()

    def remember(self, pack: Pack) -> Memory:
        """The drafter's memory of every position of the pack."""
        ids_P = pack.ids_P
        rows = pack.places
        if self.drafter.config.reads_pairs:
            # A pair is a position's feature and the token after it, and sits where that token does. At a document's end that is
            # another document's token. Nobody sees it: no anchor of the document stands behind it.
            ids_P = torch.roll(ids_P, -1)
            rows = Places(rows.document, rows.position + 1)
        memory = self.drafter.remember(pack.states, pack.places, self._embed(ids_P), rows, self._attend)
        return memory.detached() if self._supervision.detach else memory

    def draft(self, pack: Pack, memory: Memory) -> Tensor:
        """The drafter's output of every slot of every anchor, [N, J, E], or under every view [V, N, J, E]: what decoding must
        reproduce."""
        anchors = pack.anchors
        if pack.budget_VN is None:
            return self._drafted(pack, anchors, memory)
        if self._supervision.view.positions == "absolute":
            selection = self._plan(pack, memory, pack.budget_VN)
            everyone = anchors.repeated(pack.views)
            return self._drafted(pack, everyone, replace(memory, selection=selection)).unflatten(0, (pack.views, -1))
        # Positions in the cache: each anchor gets keys of its own, moved together. Where nothing is hidden (`FULL`), they are the
        # positions in the document, and all anchors read the same keys.
        whole = int((pack.budget_VN[0] >= FULL).all())
        parts = [self._drafted(pack, anchors, memory)] * whole
        if pack.views > whole:
            found = self._plan(pack, memory, pack.budget_VN[whole:])
            gathered, moved = gather(memory, found, anchors.repeated(pack.views - whole), self.drafter.rotate)
            parts.append(self._drafted(pack, moved, gathered))
        return torch.cat(parts).unflatten(0, (pack.views, -1))

    def _drafted(self, pack: Pack, anchors: Anchors, memory: Memory) -> Tensor:
        """The drafter's output of every slot of these anchors, [M, J, E]."""
        repeats = len(anchors.index) // len(pack.anchor_N)
        prefix_M = None if pack.prefix_N is None else pack.prefix_N.repeat(repeats)
        feature_ME = None if memory.feature is None else memory.feature[(anchors.index - 1).clamp(min=0)]
        text = Text(self._reading(pack, len(anchors.index)), anchors.index, self._attend, self.slots, prefix_M)
        start = Start(memory, anchors.document, anchors.position, feature_ME)
        self.drafter.config.schedule.draft(self.drafter, start, text)
        return text.output_NJE

    def _reading(self, pack: Pack, anchors: int) -> Callable:
        """Places in the pack, of as many anchors -> what the drafter reads of their tokens."""
        last = len(pack.ids_P) - 1
        # Every step of ttt reads most of the pack's tokens once more. Where they are read often, and no place is read twice in a
        # step, what depends on the token alone is made once.
        schedule = self.drafter.config.schedule
        if self.shares_tokens and schedule.token_by_token and last < anchors * (self.slots - 1) and anchors == len(pack.anchor_N):
            if (halves := self.drafter.halves(self._embed(pack.ids_P))) is not None:
                return partial(_taken, halves)
        return lambda index_N: self._embed(pack.ids_P[index_N.clamp(max=last)])

    def logits(self, pack: Pack) -> Tensor:
        """The same over the target's vocabulary, [(V,) N, J, V]: for tests, all at once."""
        return self.drafter.head.logits(self.draft(pack, self.remember(pack)), self._head)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.drafter.embed(ids, self._head)

    def _plan(self, pack: Pack, memory: Memory, budget_VN: Tensor) -> Plan:
        return plan(self._supervision.view, memory, pack.anchors, pack.age_N, budget_VN, partial(self._observe, pack, memory))

    def _observe(self, pack: Pack, memory: Memory, window: int | None) -> tuple[list[dict[str, Tensor]], Places]:
        """Queries of the `window` tokens up to each selection, oldest first, or of all tokens (None); where they sit."""
        ids_P = pack.ids_P
        document_P = pack.places.document
        position_P = pack.places.position
        if window is None:
            index_R = torch.arange(len(ids_P), device=ids_P.device)
            places = pack.places
        else:
            # A window may begin before its document: those rows have positions below 0, see no key, and count for nothing.
            back_W = torch.arange(1 - window, 1, device=ids_P.device)
            chosen_N = pack.anchor_N if pack.age_N is None else pack.anchor_N - pack.age_N
            index_R = (chosen_N[:, None] + back_W).flatten().clamp(min=0)
            position_R = (position_P[chosen_N][:, None] + back_W).flatten()
            places = Places(document_P[chosen_N].repeat_interleave(window), position_R)
        feature_RE = None if memory.feature is None else memory.feature[(index_R - 1).clamp(min=0)]
        queries = self.drafter.known_queries(self._embed(ids_P[index_R]), feature_RE, places, memory, self._attend)
        return queries, places

    def _head_loss(
        self, rows: HeadInput, pack: Pack, valid_MJ: Tensor, scale_T: Tensor, reads: str
    ) -> tuple[Tensor, Tensor, Tensor, RowStatistics]:
        """(the head's share of the loss, its undivided per-slot and expected-length terms, statistics)."""
        loss = self._supervision.loss
        by_dpace = self._supervision.weight_J is None
        view_weight_V = self._of_views(self._view_weight_V, pack).to(valid_MJ.device)
        view_weight_M1 = view_weight_V.repeat_interleave(len(pack.anchor_N))[:, None]
        # Every rank applies the head as often as the others, also to no rows: under ZeRO-3 that gathers its weight.
        apply = partial(self.drafter.head, rows, self._head, loss.per_slot, chunk=self._supervision.chunk_rows, reads=reads)
        # 1. Look. With D-PACE and expected length, what a slot counts depends on what the drafter says of its whole block. But
        # rows pass the head chunk by chunk, and a chunk takes its gradient at once (its logits are not kept), so that weights
        # have to be known before. So all rows pass twice: first to be looked at, then to be learned from.
        seen = None
        if loss.expected_length or by_dpace:
            with torch.no_grad():
                _, seen = apply(weight_R=torch.ones_like(rows.mix_R))
        # 2. What each slot counts in the per-slot terms.
        if by_dpace:
            weight_MJ = weights.dpace(grid(seen.label_probability, valid_MJ), valid_MJ)
        else:
            weight_MJ = self._slot_weights(pack, valid_MJ[: len(pack.anchor_N)]).repeat(pack.views, 1)
        slot_weight = (weight_MJ * view_weight_M1)[valid_MJ]
        # 3. The expected-length term, and its slope in the overlap of each slot: what that overlap counts when learning.
        missed = torch.zeros((), device=valid_MJ.device)
        slope = None
        if loss.expected_length:
            with torch.enable_grad():
                overlap = grid(seen.overlap, valid_MJ).requires_grad_()
                accepted = (view_weight_M1.squeeze(1) * divergences.expected_accepted(overlap, valid_MJ)).sum()
                missed = loss.expected_length * ((view_weight_M1 * valid_MJ).sum() - accepted)
                slope = torch.autograd.grad(missed, overlap)[0][valid_MJ] * scale_T[1]
        # 4. Learn. Where nothing is learned, what was seen will do.
        linear = torch.zeros((), device=valid_MJ.device)
        statistics = seen
        if seen is None or torch.is_grad_enabled():
            linear, statistics = apply(weight_R=slot_weight * scale_T[0], overlap_weight_R=slope)
        slots_sum = (statistics.loss * slot_weight).sum()
        # 5. The value of the loss with the gradient of `linear`. Expected length is a sum of products of overlaps. `linear` holds
        # its tangent, slope times overlap: the gradient is right, the value is not. Adding the right value and taking away
        # `linear`'s, both constant, leaves the gradient as it is.
        share = linear + (slots_sum * scale_T[0] + missed.detach() * scale_T[1] - linear.detach())
        return share, slots_sum, missed.detach(), statistics

    def _slot_weights(self, pack: Pack, valid: Tensor) -> Tensor:
        """What each slot counts, [N, J]. The first slot that is not given to the drafter counts as the first; given ones count
        nothing."""
        weight_J = self._supervision.weight_J.to(valid.device)
        if pack.prefix_N is None:
            return weight_J.expand(valid.shape)
        index = torch.arange(self.slots, device=valid.device) - (pack.prefix_N[:, None] - 1)
        return weight_J[index.clamp(min=0)] * (index >= 0)

    def _of_views(self, values: Tensor, pack: Pack) -> Tensor:
        """What is known of each view of a pack, [V, ...]. Where views are judged, which are others than those of training, each
        counts as the first."""
        return values if self.training else values[:1].expand(pack.views, *values.shape[1:])


def _taken(halves: TokenHalves, index_N: Tensor) -> TokenHalves:
    return {
        branch: {name: (Taken.apply(half_PO, index_N), weight_OE) for name, (half_PO, weight_OE) in made.items()}
        for branch, made in halves.items()
    }


def grid(values: Tensor, valid_NJ: Tensor) -> Tensor:
    """Values [R, ...] of the slots that count in their places, [N, J, ...]; zero elsewhere."""
    shape = (*valid_NJ.shape, *values.shape[1:])
    mask = valid_NJ.view(*valid_NJ.shape, *(1 for _ in values.shape[1:])).expand(shape)
    return torch.zeros(shape, dtype=values.dtype, device=valid_NJ.device).masked_scatter_(mask, values)
