"""Drafters of layers like the target's: memory from the target's states, and draft rows that read it.

Shapes: P memory positions, Q draft rows, N anchors, S slots of a block, E hidden size, I input size of fc.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_prep.target.architecture import KVLayer
from data_prep.target.described import Described
from data_prep.target.frozen_head import FrozenHead
from data_prep.target.states import States
from train.attention import torch_private
from train.attention.backend import AttentionBackend
from train.attention.visibility import DraftRows, Places, known_rows
from train.drafter.base import Drafter, Past
from train.drafter.config import DrafterConfig
from train.drafter.heads import DraftHead, SequentialHead
from train.drafter.layers import KV, Attention, Blocks, DraftLayer, Rope, Steps, TokenHalves, gathered_late
from train.drafter.memory import Memory, TargetKV

Rotation = tuple[tuple[float, ...], float]  # angles per position, and the scale


class LayeredDrafter(Drafter):
    """A stack of draft layers over one kind of target state, two, or none. The target's embedding and LM head (`FrozenHead`)
    are handed in, not owned."""

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        a = config.architecture
        states = config.state_size
        self.layers = nn.ModuleList(DraftLayer(config, i) for i in range(len(config.target_layers)))
        self.norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        self.head = DraftHead(config)
        # Draft layers of another size read the target's tokens, and answer its LM head, through these.
        self.from_target = nn.Linear(states, a.hidden_size, bias=False) if config.target_hidden else nn.Identity()
        self.to_target = nn.Linear(a.hidden_size, states, bias=False) if config.target_hidden else nn.Identity()
        if config.uses_kv:
            self.target_kv = nn.ModuleList(TargetKV(config, layer) for layer in config.target_layers)
        if config.uses_hidden:
            self.fc = nn.Linear(len(config.hidden_layers) * states, a.hidden_size, bias=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(states, eps=a.norm_eps) for _ in config.hidden_layers)
        if not config.schedule.token_by_token:
            self.mask = nn.Embedding(1, a.hidden_size)  # what an undrafted slot carries
            self.sequential = SequentialHead(config) if config.sequential else None
        if config.injects_hidden:
            self.hidden_norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        if config.pairs:
            self.mask_hidden = nn.Embedding(1, self.fc.in_features)  # what fc reads for an undrafted slot
        # No buffers: DeepSpeed casts a module's buffers to bf16 too, and rounded frequencies are wrong at large positions.
        self._angles: dict[Rotation, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def inv_freq(self, layer: int, branch: str) -> Tensor:
        shape = self.config.shape(layer, branch)
        return self._angles_of((tuple(shape.inv_freq), shape.rope_scale), self.norm.weight.device)

    def use_fp8(self) -> None:
        """The products of the MLPs and of a frozen head in fp8, while training."""
        self.head.use_fp8()
        for layer in self.layers:
            layer.use_fp8()

    def compile_parts(self) -> None:
        torch_private.remake_cheap_activations()
        torch_private.fuse_at_any_size()
        for layer in self.layers:
            layer.compile_parts()

    def ropes(self, position_P: Tensor) -> list[dict[str, Rope]]:
        """The rotary embedding of every layer and branch at these positions; those that rotate alike share it."""
        of_shape = self._ropes_at(position_P)
        return [
            {name: of_shape(self.config.shape(layer, name)) for name in self.config.branches} for layer in range(len(self.layers))
        ]

    def _ropes_at(self, position_P: Tensor) -> Callable[[KVLayer], Rope]:
        """Makes the rotary embedding of a kind of keys at these positions, each once."""
        position_P = position_P / self.config.rope_factor
        made: dict[Rotation, Rope] = {}

        def rope(shape: KVLayer) -> Rope:
            rotation = (tuple(shape.inv_freq), shape.rope_scale)
            if rotation not in made:
                made[rotation] = Rope(position_P, self._angles_of(rotation, position_P.device), shape.rope_scale, self.dtype)
            return made[rotation]

        return rope

    def _angles_of(self, rotation: Rotation, device: torch.device) -> Tensor:
        # Kept on the device after the first call: a CUDA graph cannot hold a copy from the host's memory.
        if rotation not in self._angles or self._angles[rotation].device != device:
            self._angles[rotation] = torch.tensor(rotation[0], device=device)
        return self._angles[rotation]

    def embed(self, ids: Tensor, head: FrozenHead) -> Tensor:
        return self.from_target(head.embed(ids))

    def remember(
        self,
        states: States,
        places: Places,
        token_RE: Tensor,
        rows: Places,
        attend: AttentionBackend,
        past: Memory | None = None,
    ) -> Memory:
        config = self.config
        memory = Memory.extended(past, len(self.layers), {n: rows if n == config.own_memory else places for n in config.branches})
        if config.uses_kv:
            of_shape = self._ropes_at(places.position)
            read: dict[int, KV] = {}
            for layer, target_kv in enumerate(self.target_kv):
                if not memory.keeps(layer, "kv"):
                    continue
                source = config.target_layers[layer]
                # Draft layers that read one target layer in place share what they read.
                if source not in read or config.source != "native":
                    read[source] = target_kv(states, of_shape, self.dtype)
                memory.add(layer, "kv", read[source])
        if config.uses_hidden:
            hidden_PI = torch.cat([states.hidden[i] for i in config.hidden_layers], dim=-1)
            features = self._feature(hidden_PI.to(self.dtype))
            memory.feature = features if config.reads_pairs else None
        if config.injects_hidden:
            features = self.hidden_norm(features)
            ropes = self.ropes(places.position)
            for layer, module in enumerate(self.layers):
                memory.add(layer, "hidden", module.branches["hidden"].keys_values(features, ropes[layer]["hidden"]))
        if config.own_memory:
            self._read(memory, features if config.uses_hidden else token_RE, token_RE, rows, attend, keep=True)
        return memory

    def _feature(self, hidden_PI: Tensor) -> Tensor:
        """fc over the hidden states of all layers that are read, side by side, [P, E]."""
        if self.config.fc_norm:
            parts = hidden_PI.chunk(len(self.fc_norm), dim=-1)
            hidden_PI = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], dim=-1)
        return self.fc(hidden_PI)

    def known_queries(
        self, token_RE: Tensor, feature_RE: Tensor | None, rows: Places, memory: Memory, attend: AttentionBackend
    ) -> list[dict[str, Tensor]]:
        return self._read(memory, self._enter(token_RE, feature_RE), token_RE, rows, attend, keep=False)

    def _read(
        self, memory: Memory, x_RE: Tensor, token_RE: Tensor, places: Places, attend: AttentionBackend, keep: bool
    ) -> list[dict[str, Tensor]]:
        """Run known tokens through the draft layers in one causal pass, as if each were the anchor of a round: a token's row
        sees the memory before the token, and itself.

        Args:
            memory: what the rows read. With `keep`, the pass adds to it.
            x_RE: the residual stream that enters the first layer: the tokens' embeddings, or with pairs their features.
            keep: the rows' own keys and values are added to the memory of the drafter's own branch, where later rows of the same
                pass see them.

        Returns:
            The queries [R, H, D] of each layer and branch. With `keep` an empty list.
        """
        own_memory = self.config.own_memory
        queries: list[dict[str, Tensor]] = []
        rows = known_rows(places)
        rows = replace(rows, position=self.config.row_position(rows.anchor, 0))
        ropes = self.ropes(rows.position)
        visibility = self.visibility(rows, memory, rows)
        for index, layer in enumerate(self.layers):
            inputs = layer.inputs(x_RE, token_RE)
            # Nobody reads what the last layer makes of the rows: its keys and queries come from its inputs.
            last = index + 1 == len(self.layers)
            own = {} if last and not keep else layer.keys_values(inputs, ropes[index])
            if keep:
                memory.add(index, own_memory, own[own_memory])
            else:
                queries.append(layer.queries(inputs, ropes[index]))
            if not last:
                keys = memory.layers[index] | {n: memory.layers[index][n] + own[n] for n in own}
                x_RE = self._through(layer, x_RE, inputs, ropes[index], keys, visibility[index], attend)
        return queries

    def block(
        self,
        token_NTE: Tensor,
        rows: DraftRows,
        memory: Memory,
        attend: AttentionBackend,
        prefix_N: Tensor | None = None,
        feature_NE: Tensor | None = None,
    ) -> Tensor:
        """Block-wise drafting: slot 0 carries the anchor's token, the others MASK; all slots at once. With pairs slot 0 also
        carries the feature before its token, the others fc of the learned `mask_hidden`.

        Args:
            token_NTE: embeddings of the first T tokens of each block, the anchor's first.
            rows: N x S rows, slot by slot within an anchor.
            prefix_N: how many of the T tokens each block is given (training with a variable prefix); None: all T.
            feature_NE: with pairs, fc(f_{a-1}) of each anchor.

        Returns:
            what the LM head reads of the slots that propose x_{a+1} .. x_{a+J}, [N, J, E].
        """
        count, known, _ = token_NTE.shape
        slots = self.config.slots
        zero = torch.zeros(1, dtype=torch.long, device=token_NTE.device)
        mask = self.mask(zero)
        if self.training and prefix_N is None:
            # All undrafted slots begin alike, and there are many anchors: the first layer projects one for all.
            token = torch.cat([token_NTE[:, 0], mask])
            x = torch.cat([feature_NE, self._feature(self.mask_hidden(zero))]) if self.config.reads_pairs else token
            x, _ = self._run(x, token, rows, rows, memory, None, attend, alike=slots)
            return self._block_output(x)
        masks = mask.expand(count, slots - known, -1)
        if prefix_N is not None:
            in_prefix = torch.arange(known, device=token_NTE.device) < prefix_N[:, None]
            token_NTE = torch.where(in_prefix[..., None], token_NTE, mask)
        token = torch.cat([token_NTE, masks], dim=1).flatten(0, 1)
        x = token
        if self.config.reads_pairs:
            undrafted = self._feature(self.mask_hidden(zero)).expand(count, slots - 1, -1)
            x = torch.cat([feature_NE[:, None], undrafted], dim=1).flatten(0, 1)
        x, _ = self._run(x, token, rows, rows, memory, None, attend)
        return self._block_output(x)

    def _block_output(self, x: Tensor) -> Tensor:
        return self.to_target(self.norm(x.unflatten(0, (-1, self.config.slots))[:, self.config.first_slot :]))

    def halves(self, token_PE: Tensor) -> TokenHalves | None:
        layer = self.layers[0]
        return layer.halves(token_PE) if layer.pairs and not gathered_late(layer.down.weight) else None

    def step(
        self,
        token_NE: Tensor | TokenHalves,
        feature_NE: Tensor | None,
        rows: DraftRows,
        earlier: DraftRows | None,
        memory: Memory,
        past: Past | None,
        attend: AttentionBackend,
    ) -> tuple[Tensor, Tensor, Past]:
        drafts = rows if earlier is None else earlier + rows
        x, past = self._run(self._enter(token_NE, feature_NE), token_NE, rows, drafts, memory, past, attend)
        return *self._leave(x), past

    def _enter(self, token_QE: Tensor, feature_QE: Tensor | None) -> Tensor:
        """The residual stream that enters the first layer."""
        return feature_QE if self.config.reads_pairs else token_QE

    def _leave(self, x_QE: Tensor) -> tuple[Tensor, Tensor]:
        """(what the LM head reads, the feature of the next step) of the residual stream behind the last layer."""
        normed = self.norm(x_QE)
        return self.to_target(normed), normed if self.config.norm_output else x_QE

    def _run(
        self,
        x_QE: Tensor,
        token_QE: Tensor,
        rows: DraftRows,
        drafts: DraftRows,
        memory: Memory,
        past: Past | None,
        attend: AttentionBackend,
        alike: int = 0,
    ) -> tuple[Tensor, Past]:
        """Run draft rows through all layers: each row attends memory and the draft rows that it may see.

        Args:
            x_QE: the residual stream that enters the first layer.
            token_QE: embeddings of the rows' tokens, which the first layer reads beside a feature (pairs).
            rows: the rows of this pass, Q of them.
            drafts: all draft rows whose keys there are: those of earlier ttt steps, then these.
            past: keys and values of the earlier steps' rows; None: there are none.
            alike: `x_QE` and `token_QE` have a row for each anchor, and one for all other slots of so many (`Blocks`). 0: each
                row has its own.

        Returns:
            The residual stream behind the last layer, before the final norm [Q, E]; `past` with this pass's keys and values.
        """
        visibility = self.visibility(rows, memory, drafts)
        ropes = self.ropes(rows.position)
        kept: Past = []
        for index, layer in enumerate(self.layers):
            inputs = layer.inputs(x_QE, token_QE)
            if alike and index == 0:
                inputs = {name: Blocks(rows_CI, alike) for name, rows_CI in inputs.items()}
                x_QE = Blocks(x_QE, alike).spread(x_QE)
            own = layer.keys_values(inputs, ropes[index])
            kept.append({name: Steps((*(past[index][name] if past else ()), own[name])) for name in own})
            keys = dict(memory.layers[index])
            for name, steps in kept[index].items():
                keys[name] = steps.after(keys[name], attend.takes_parts)
            x_QE = self._through(layer, x_QE, inputs, ropes[index], keys, visibility[index], attend)
        return x_QE, kept

    def _through(self, layer: DraftLayer, *arguments) -> Tensor:
        """`layer(*arguments)`; with `recompute` its activations are not kept, but made again in the backward."""
        again = self.recompute and torch.is_grad_enabled()
        return checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)

    @torch.no_grad()
    def start(self, target: Described | None, head: FrozenHead, counts_V: Tensor | None = None) -> "LayeredDrafter":
        """Initial weights, a function of the configuration's seed. start="target": every draft layer begins as its
        target layer (Q, K, V, O, norms, MLP), fc as a copy of the hidden state that layer would have read.

        Args:
            counts_V: how often the training text supervises each token; a reduced draft vocabulary keeps the most frequent.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # Drawn on the CPU, so that every rank and every kind of device starts with the same numbers.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        if not self.config.schedule.token_by_token:
            token = self.config.mask_token_id
            mask_1E = head.table_VE.mean(0, keepdim=True) if token is None else head.table_VE[token : token + 1]
            self.mask.weight.copy_(self.from_target(mask_1E.to(self.dtype)))
            if self.config.pairs:
                self.mask_hidden.weight.div_(0.02)  # numbers of size one, as P-EAGLE's
            if self.sequential:
                self.sequential.up.weight.zero_()  # it begins by correcting nothing
        self._start_head(head, counts_V)
        if self.config.start == "target":
            self._start_from(target)
        return self

    def _start_head(self, head: FrozenHead, counts_V: Tensor | None) -> None:
        self.head.start(head, counts_V)

    def _start_from(self, target: Described) -> None:
        config = self.config
        size = config.architecture.hidden_size
        self.norm.weight.copy_(target.final_norm_weight)
        for layer, source in zip(self.layers, config.target_layers):
            for name, branch in layer.branches.items():
                joined = name == "kv" and config.source == "head_concat"  # a branch made of several layers' heads
                self._start_branch(branch, [target.layer_weights(i) for i in (config.layers_of(source) if joined else [source])])
            weights = target.layer_weights(source)
            for name in ("post_norm", "gate", "up", "down"):
                getattr(layer, name).weight.copy_(weights[f"{name}.weight"])
        for target_kv, source in zip(getattr(self, "target_kv", ()), config.target_layers):
            target_kv.start(source)
        if config.uses_hidden:
            # fc reads several hidden states side by side. It begins as the identity on one of them: the deepest one below the
            # first draft layer's target layer, whose input is nearest to it. If all are above that layer, the first one.
            below = [i for i in config.hidden_layers if i < config.target_layers[0]]
            chosen = config.hidden_layers.index(below[-1] if below else config.hidden_layers[0])
            self.fc.weight[:, chosen * size : (chosen + 1) * size] += torch.eye(size, device=self.fc.weight.device)

    @staticmethod
    def _start_branch(branch: Attention, layers: list[dict[str, Tensor]]) -> None:
        for name, parameter in branch.named_parameters():
            if name.endswith("norm.weight"):
                if name in layers[0]:  # one that the target does not have begins at one
                    parameter.copy_(sum(weights[name] for weights in layers) / len(layers))
                continue
            # The layer's norm weight moves into Q, K and V, so that memory, which passes another norm, meets the
            # same projection as in the target.
            values = [weights[name] for weights in layers]
            if name in ("q.weight", "k.weight", "v.weight"):
                values = [_wide(value) * _wide(weights["input_norm.weight"]) for value, weights in zip(values, layers)]
            # Heads side by side; the outputs of several layers' heads are averaged.
            value = torch.cat(values, dim=1) / len(values) if name == "o.weight" else torch.cat(values)
            # EAGLE-3's pair: token and feature halves both start as the layer's projection.
            parameter.copy_(torch.cat([value, value], dim=1) / 2 if parameter.shape != value.shape else value)


def _wide(t: Tensor) -> Tensor:
    """At least in float32: the product of two bf16 numbers need not be one."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
