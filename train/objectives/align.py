"""Supervising what the drafter reads its memory with: the keys and values of its own rows, and its queries.

The cache holds the target's K/V of every position, so each draft row's own K/V can be compared with those that the target
will compute at that very position, densely and without waiting for an accepted token to carry a gradient.

Shapes: N anchors, S draft rows of an anchor, J drafted slots, Q rows of a call, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from train.attention.backend import AttentionBackend, Keys
from train.attention.visibility import Visibility
from train.data.pack import Pack
from train.drafter.base import Drafter
from train.drafter.config import DrafterConfig
from train.drafter.layers import KV
from train.drafter.memory import Memory
from train.losses.divergences import relative_error


class Watch:
    """While entered, sees every attention call of the drafter: `calls[layer, branch]` is a list of (q, k, v, visibility), one a
    step of ttt, one for a block. `change(layer, branch, q, visibility)` may replace the queries."""

    def __init__(self, drafter: Drafter, change: Callable[[int, str, Tensor, Visibility], Tensor] | None = None):
        self.config = drafter.config
        self._drafter = drafter
        self._change = change
        self._handles: list[RemovableHandle] = []
        self.calls: dict[tuple[int, str], list[tuple[Tensor, Tensor, Tensor, Visibility]]] = {}

    def __enter__(self) -> "Watch":
        self._handles = [
            branch.register_forward_pre_hook(partial(self._hook, (index, name)), with_kwargs=True)
            for index, layer in enumerate(self._drafter.layers)
            for name, branch in layer.branches.items()
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, where: tuple[int, str], branch: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        """Puts a backend that looks on in the place of the one that `branch` is called with (`layers.Attention.forward`)."""
        attend: AttentionBackend = named["attend"]

        def watched(q: Tensor, k: Keys, v: Keys, visibility: Visibility) -> Tensor:
            if self._change is not None:
                q = self._change(*where, q, visibility)
            whole = (t if isinstance(t, Tensor) else torch.cat(t) for t in (k, v))
            self.calls.setdefault(where, []).append((q, *whole, visibility))
            return attend(q, k, v, visibility)

        return arguments, {**named, "attend": watched}

    def own(self, layer: int) -> KV:
        """K/V [N, S, G, D] that the draft rows of one layer produced for the branch over the target's K/V."""
        _, k, v, visibility = self.calls[layer, "kv"][-1]  # the last step of ttt has them all
        return KV(*(self._by_anchor(t[len(visibility.memory.position) :]) for t in (k, v)))

    def queries(self, layer: int) -> Tensor:
        """Rotated queries [N, S, H, D] of the branch over the target's K/V."""
        return self._by_anchor(torch.cat([q for q, *_ in self.calls[layer, "kv"]]))

    def _by_anchor(self, rows: Tensor) -> Tensor:
        """[N, S, ...]. ttt's rows come step by step, a block's anchor by anchor."""
        if self.config.schedule.token_by_token:
            return rows.unflatten(0, (self.config.slots, -1)).transpose(0, 1)
        return rows.unflatten(0, (-1, self.config.slots))


def kv_error(watch: Watch, config: DrafterConfig, memory: Memory, pack: Pack) -> Tensor:
    """Sum over draft rows inside the document of the relative squared error of their keys and values, per head, averaged over
    heads, layers and the two. The target's side is the memory at the row's own position: the target's own head space where
    K/V are native, after the projection elsewhere."""
    index, inside = pack.row_index(config.slots)
    errors = []
    for layer, kinds in enumerate(memory.layers):
        for own, target in zip(watch.own(layer), kinds["kv"]):
            errors.append(relative_error(own[inside], target[index[inside]]))
    return torch.stack(errors).mean(0).sum()


def target_queries(drafter: Drafter, pack: Pack, valid: Tensor, at_teacher: bool = False) -> list[Tensor]:
    """For each draft layer the target's queries [R, H, D] at the teachers of the R slots that count, rotated to where the slot's
    row sits, or to the teacher's position a + j - 1. These are two places in same-slot blocks, whose rows sit at a + j, and where
    all rows sit at a - 1."""
    config = drafter.config
    anchor, slot = valid.nonzero(as_tuple=True)
    teacher = pack.teacher_P[pack.anchor_N[anchor] + slot]
    anchor_R = pack.places.position[pack.anchor_N[anchor]]
    ropes = drafter.ropes(anchor_R + slot if at_teacher else config.row_position(anchor_R, slot + config.first_slot))
    heads = ([pack.query[i][teacher] for i in config.layers_of(layer)] for layer in config.target_layers)
    return [rope["kv"](torch.cat(layers, dim=1).to(drafter.dtype)) for rope, layers in zip(ropes, heads)]


def query_error(watch: Watch, drafter: Drafter, pack: Pack, valid: Tensor) -> Tensor:
    """Sum over the slots that count of the relative squared error of their queries, per head, averaged over heads and layers."""
    first = drafter.config.first_slot
    errors = []
    for layer, target in enumerate(target_queries(drafter, pack, valid)):
        errors.append(relative_error(watch.queries(layer)[:, first:][valid], target))
    return torch.stack(errors).mean(0).sum()
