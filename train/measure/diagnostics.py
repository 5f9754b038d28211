"""Why a drafter accepts what it accepts (KVShot, sections 4 and 5, measured directly instead of inferred).

- retention: acceptance of the last slot over that of the first.
- controls: the same slots with the memory zeroed, or filled with another document's states.
- queries: does the drafter ask the target's K/V what the target itself asks? Cosine of the queries, KL of the attention maps,
  error of the attention's output, and acceptance with the target's own queries put in (oracle: in a block these also carry the
  tokens before each slot, which the block has not drafted; its slot 1 alone is told nothing).
- attention: how much of it falls on the drafter's own keys, the only ones through which its K/V projections learn.
- gradients: how much those projections learn beside the queries' projection.
- gate: how open it is, and what share of the output passes it.

Shapes: N anchors, J drafted slots, R rows, K keys, H query heads, G key/value heads, D head size.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from data_prep.target.states import States
from train.attention.visibility import DraftRows, Visibility, in_window
from train.data.pack import Pack
from train.drafter.base import Drafter
from train.measure import acceptance
from train.objectives.align import Watch, target_queries
from train.objectives.objective import Objective, grid

SAMPLED = 256  # rows of one attention call that are looked at
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class _Slots:
    """Means per name and slot."""

    def __init__(self, slots: int):
        self._slots = slots
        self._sum: dict[str, Tensor] = {}
        self._count: dict[str, Tensor] = {}

    def add(self, name: str, slot_R: Tensor, value_R: Tensor) -> None:
        if name not in self._sum:
            self._sum[name] = torch.zeros(self._slots, dtype=torch.float64, device=value_R.device)
            self._count[name] = torch.zeros_like(self._sum[name])
        self._sum[name].index_add_(0, slot_R, value_R.double())
        self._count[name].index_add_(0, slot_R, torch.ones_like(value_R, dtype=torch.float64))

    def means(self, prefix: str) -> dict[str, list[float]]:
        names = [name for name in self._sum if name.startswith(prefix)]
        return {name[len(prefix) :]: (self._sum[name] / self._count[name].clamp(min=1)).tolist() for name in names}


@torch.no_grad()
def diagnose(objective: Objective, packs: list[Pack]) -> dict:
    """Everything but the gradients, over these packs. Query figures need `pack.query`."""
    drafter = objective.drafter
    config = drafter.config
    slots = _Slots(objective.slots)
    gates: dict[str, list] = defaultdict(list)
    counted: dict[str, Tensor | int] = defaultdict(int)
    for number, pack in enumerate(packs):
        # 1. The drafter as it is.
        memory = objective.remember(pack)
        with Watch(drafter) as watch, _Gates(drafter, gates):
            outcome = objective(pack, memory=memory)
        counted["trained"] += acceptance.counts(outcome)[0]
        # 2. Controls: the same slots over a memory that says nothing, or something of another document.
        if config.reuse != "none":
            controls = {"zero_memory": pack.states.map(torch.zeros_like), "other_memory": _others(pack, packs[number - 1])}
            for name, states in controls.items():
                if states is not None:
                    counted[name] += acceptance.counts(objective(replace(pack, states=states)))[0]
        # 3. What its attention looks at, and how that differs from the target's.
        _attention_figures(slots, watch, pack, outcome.valid)
        if pack.query and config.query_layers:
            _query_figures(slots, watch, drafter, pack, outcome.valid)
            # 4. The same slots with the target's own queries.
            with Watch(drafter, _oracle(drafter, pack, outcome.valid)):
                counted["oracle_queries"] += acceptance.counts(objective(pack, memory=memory))[0]
    found = {name: acceptance.summarise(total) for name, total in counted.items()}
    kept = {kind: a.conditional for kind, a in found["trained"].items()}
    return {
        "acceptance": {name: {kind: vars(a) for kind, a in kinds.items()} for name, kinds in found.items()},
        "retention": {kind: {"first": c[0], "last": c[-1], "ratio": c[-1] / max(c[0], 1e-9)} for kind, c in kept.items()},
        "attention": slots.means("attention/"),
        "queries": slots.means("queries/"),
        "gate": {name: _summary(values) for name, values in gates.items()},
    }


def _others(pack: Pack, before: Pack) -> States | None:
    """Every document's states replaced by those of the next document of the pack, at the same positions (repeated where that is
    shorter). A document alone in its pack gets those of the pack before; None where that is the same."""
    document = pack.places.document
    index = torch.arange(len(pack.ids_P), device=pack.ids_P.device)
    lengths = torch.bincount(document)
    first = lengths.cumsum(0) - lengths
    if len(lengths) == 1:
        return None if before is pack else before.states.map(lambda t: t[index % len(t)])
    other = (document + 1) % len(lengths)
    chosen = first[other] + (index - first[document]) % lengths[other]
    return pack.states.map(lambda t: t[chosen])


def _weights(q_RHD: Tensor, k_KGD: Tensor, dense_RK: Tensor) -> Tensor:
    """Attention of each row and head, [R, H, K] float32."""
    k_KHD = k_KGD.float().repeat_interleave(q_RHD.shape[1] // k_KGD.shape[1], dim=1)
    scores = torch.einsum("rhd,khd->rhk", q_RHD.float(), k_KHD) * q_RHD.shape[2] ** -0.5
    return scores.masked_fill(~dense_RK[:, None], -torch.inf).softmax(-1)


def _rows(watch: Watch, where: tuple[int, str], valid: Tensor):
    """For each attention call: (slots j - 1 [R], anchors [R], q, k, v, dense [R, K], memory's places) of at most SAMPLED rows
    that draft a slot that counts."""
    for q, k, v, visibility in watch.calls[where]:
        rows = visibility.queries
        slot = rows.slot - watch.config.schedule.first_row - watch.config.first_slot
        chosen = ((slot >= 0) & valid[rows.group, slot.clamp(min=0)]).nonzero().squeeze(1)
        some = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:SAMPLED]  # a stride would prefer slots
        chosen = chosen[some.to(chosen.device)]
        picked = DraftRows(*(getattr(rows, f)[chosen] for f in rows.__dataclass_fields__))
        dense = replace(visibility, queries=picked).dense
        yield slot[chosen], rows.group[chosen], q[chosen], k, v, dense, visibility.memory


def _attention_figures(slots: _Slots, watch: Watch, pack: Pack, valid: Tensor) -> None:
    for where in watch.calls:
        for slot, _, q, k, _, dense, memory in _rows(watch, where, valid):
            drafts = _weights(q, k, dense)[..., len(memory.position) :].sum(-1).mean(-1)
            slots.add(f"attention/layer{where[0]}.{where[1]}.draft_mass", slot, drafts)


def _query_figures(slots: _Slots, watch: Watch, drafter: Drafter, pack: Pack, valid: Tensor) -> None:
    """The target's attention at the slot's teacher, over all that *it* saw, against the drafter's."""
    # At the row's own place queries can be compared; at the teacher's, attention maps: there the target saw the tokens before.
    own = [grid(q, valid) for q in target_queries(drafter, pack, valid, at_teacher=False)]
    teacher = [grid(q, valid) for q in target_queries(drafter, pack, valid, at_teacher=True)]
    for layer in range(len(drafter.layers)):
        name = f"queries/layer{layer}"
        for slot, anchor, q, k, v, dense, memory in _rows(watch, (layer, "kv"), valid):
            # 1. Queries.
            cosine = torch.cosine_similarity(q.float(), own[layer][anchor, slot].float(), dim=-1)
            slots.add(f"{name}.cosine", slot, cosine.mean(-1))
            # 2. Attention maps, compared over what both see: the memory before the anchor.
            count = len(memory.position)
            place = pack.anchor_N[anchor] + slot
            position = pack.places.position[place][:, None]
            seen = (memory.document == pack.places.document[place][:, None]) & (memory.position <= position)
            if window := drafter.config.shape(layer, "kv").window:
                seen &= in_window(position, memory.position, window)
            target = _weights(teacher[layer][anchor, slot], k[:count], seen)
            mine = _weights(q, k, dense)
            p, p_mine = (w[..., :count] * dense[:, None, :count] for w in (target, mine))
            p, p_mine = (w / w.sum(-1, keepdim=True).clamp(min=1e-12) for w in (p, p_mine))
            slots.add(f"{name}.map_kl", slot, (p * (p.clamp(min=1e-12) / p_mine.clamp(min=1e-12)).log()).sum(-1).mean(-1))
            # 3. What the attention gives.
            out = _attended(target, v[:count])
            out_mine = _attended(mine, v)
            slots.add(f"{name}.output_error", slot, (out_mine - out).norm(dim=1) / out.norm(dim=1).clamp(min=1e-12))
            # 4. How much the target looks at what the drafter has no memory of.
            since = (target * ~dense[:, None, :count]).sum(-1).mean(-1)
            slots.add(f"{name}.target_mass_since_anchor", slot, since)


def _attended(weights_RHK: Tensor, v_KGD: Tensor) -> Tensor:
    """The output of all heads, [R, H x D]."""
    heads = weights_RHK.shape[1] // v_KGD.shape[1]
    return torch.einsum("rhk,khd->rhd", weights_RHK, v_KGD.float().repeat_interleave(heads, 1)).flatten(1)


def _oracle(drafter: Drafter, pack: Pack, valid: Tensor):
    """Puts the target's own query of a slot's teacher, at the teacher's position, in place of the drafter's."""
    config = drafter.config
    oracle = [grid(q, valid) for q in target_queries(drafter, pack, valid, at_teacher=True)]

    def change(layer: int, branch: str, q: Tensor, visibility: Visibility) -> Tensor:
        if branch != "kv":
            return q
        rows = visibility.queries
        slot = rows.slot - config.schedule.first_row - config.first_slot
        drafts = (slot >= 0) & valid[rows.group, slot.clamp(min=0)]
        return torch.where(drafts[:, None, None], oracle[layer][rows.group, slot.clamp(min=0)], q)

    return change


class _Gates:
    """While entered, collects (openness, share of the branch in the output) of every fused row."""

    def __init__(self, drafter: Drafter, found: dict[str, list]):
        self._drafter = drafter
        self._found = found
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        def hook(index):
            def keep(module, inputs, output):
                n, o = inputs
                g = module.openness(n, o).float()
                passed = (output - n).float().norm(dim=1) / n.float().norm(dim=1).clamp(min=1e-12)
                self._found[f"layer{index}"].append((g.flatten()[:: -(-g.numel() // 4096)], g.mean(), passed.mean()))

            return keep

        fused = [(i, layer.fuse) for i, layer in enumerate(self._drafter.layers) if layer.fuse is not None]
        self._handles = [fuse.register_forward_hook(hook(index)) for index, fuse in fused]

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()


def _summary(values: list[tuple[Tensor, Tensor, Tensor]]) -> dict:
    """Mean and quantiles of g, and |g W_delta (o - n)| / |n|."""
    sample, mean, share = zip(*values)
    quantiles = np.quantile(torch.cat(sample).cpu().numpy(), QUANTILES)  # torch's own refuses large inputs
    return {"mean": float(sum(mean) / len(mean)), "quantiles": quantiles.tolist(), "share": float(sum(share) / len(share))}


def gradients(drafter: Drafter, rows: int) -> dict:
    """Of the last backward, before the optimizer's step; called by all ranks.

    For each layer and branch: root mean square of the gradients of the K and V projections over that of Q, and every gradient's
    effective rank (exp of the entropy of its normalised singular values, Roy and Vetterli 2007). In the branch `kv` the
    projections make draft keys alone (query-only drafters have none); in `hidden` and `tokens` also the memory's, and learn from
    every position of it.

    Args:
        rows: draft rows of the step, of anchors that count. This is how many of the drafter's own K/V could learn.
    """
    found: dict = {"draft_rows": rows}
    for index, layer in enumerate(drafter.layers):
        for name, branch in layer.branches.items():
            g = {n: full_gradient(getattr(branch, n).weight) for n in "qkv" if getattr(branch, n) is not None}
            size = {n: float(t.square().mean().sqrt()) for n, t in g.items()}
            over = {f"{n}_over_q": size[n] / max(size["q"], 1e-30) for n in "kv" if n in size}
            found[f"layer{index}.{name}"] = {**over, **{f"rank_{n}": effective_rank(t) for n, t in g.items()}}
        if layer.fuse is not None:
            size = {n: float(full_gradient(getattr(layer.fuse, n).weight).norm()) for n in ("gate", "delta")}
            found[f"layer{index}.fuse"] = {f"{n}_norm": value for n, value in size.items()}
    return found


def full_gradient(parameter: Tensor) -> Tensor:
    """The gradient of the whole parameter, summed over all ranks and micro-steps, whatever ZeRO did to it; float32."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).float().view(getattr(parameter, "ds_shape", parameter.shape))
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).float()


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the normalised singular values; they come from the smaller Gram matrix in float64, which is far
    cheaper than a decomposition of the matrix itself."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=1e-30)
    return float((-(p * p.clamp(min=1e-30).log()).sum()).exp()) if values.sum() > 0 else 0.0
