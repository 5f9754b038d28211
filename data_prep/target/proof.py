"""What was found by structure is proven when a target is loaded: on six tokens, against what transformers itself hands out.

Shapes: B texts, T tokens, E hidden size, G key/value heads, D head size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from common.errors import UserError
from common.ranks import rank
from data_prep.target import transformers_private as private
from data_prep.target.architecture import KVLayer
from data_prep.target.rotation import halves_of_neighbours, turned

TOKENS = 6
# Of a difference's norm to the norm. Both sides do the same sums; kernels may add up in another order, above all in bf16.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
NARROW_TOLERANCE = 0.03


class KVFound(NamedTuple):
    """A layer's keys and values, and how many angles turn neighbours (0: none; its keys are in the layout of halves)."""

    shape: KVLayer
    neighbours: int


@torch.no_grad()
def prove(target, kv_layers: list[int]) -> dict[int, KVFound]:
    """Compare the states that `target` hands out with its model's own; by layer of `kv_layers`, how its keys are turned.

    Raises:
        UserError: a state or a logit is not the model's own.
    """
    every = range(len(target.layers))
    ids_BT = torch.arange(3, 3 + TOKENS, device=target.device)[None] % target.config.vocab_size
    cache = DynamicCache(config=target.model.config)
    target.capture(every, kv_layers)
    try:
        states = target.forward(ids_BT, cache)
        hidden, logits = private.own_outputs(target.model, ids_BT)
    finally:
        target.capture((), ())
    # The last of transformers' hidden states is normed; the logits say whether that is right.
    for layer in every[:-1]:
        _demand(target, f"hidden states after layer {layer}", states.hidden[layer], hidden[layer + 1])
    if not target.spread_by_tensors:  # each process may have a part of the embedding
        _demand_embedding(target, target.frozen_head.embed(ids_BT), hidden[0])
    _demand(target, "logits", target.logits(states.last_hidden), logits)
    return {layer: _rotation(target, layer, states.key[layer], states.value[layer], cache) for layer in kv_layers}


def _demand(target, what: str, found: Tensor, own: Tensor) -> None:
    if not _close(found, own):
        why = "are not what its own forward makes: this family is read wrongly"
        if not own.isfinite().all():
            why = "are not finite: its weights are damaged"
        raise UserError(f"target {target.path} is a '{target.config.model_type}', whose {what} {why}")


def _demand_embedding(target, found_BTE: Tensor, own_BTE: Tensor) -> None:
    """Positions or a norm may be added to what tokens say, and drafters do without. A factor would be a fault of ours."""
    found, own = (t.float().cpu().flatten() for t in (found_BTE, own_BTE))
    factor = (own @ found) / (found @ found)
    if not _close(found, own) and _close(found * factor, own):
        raise UserError(
            f"target {target.path} is a '{target.config.model_type}', which multiplies its embeddings by {factor:.4g}; where its "
            "configuration says so is not known"
        )


def _close(found: Tensor, own: Tensor) -> bool:
    if found.shape != own.shape:
        return False
    tolerance = TOLERANCE.get(own.dtype, NARROW_TOLERANCE)
    found, own = (t.to("cpu", torch.float64) for t in (found, own))
    return bool((found - own).norm() <= tolerance * own.norm())


def _rotation(target, layer: int, key_BTGD: Tensor, value_BTGD: Tensor, cache) -> KVFound:
    """How the keys of a layer have to be turned to be those in the model's own cache."""
    kept_BTGD, kept_values_BTGD = (t.transpose(1, 2) for t in (cache.layers[layer].keys, cache.layers[layer].values))
    heads = key_BTGD.shape[2]
    # A layer with a window shorter than the text has let go of the first tokens.
    last = slice(key_BTGD.shape[1] - kept_BTGD.shape[1], None)
    # Under tensor parallelism a process keeps its own heads.
    here = kept_BTGD.shape[2]
    mine = slice(rank() * here, (rank() + 1) * here) if here < heads else slice(None)
    _demand(target, f"values of layer {layer}", value_BTGD[:, last, mine], kept_values_BTGD)
    inv_freq, scale = private.rotary(target.model, layer) or ([], 1.0)
    neighbours = len(inv_freq)
    # Halves, neighbours, or not at all: some layers of some families know no positions.
    for angles, permuted in ((inv_freq, 0), (inv_freq, neighbours), ([], 0)):
        key, kept = (halves_of_neighbours(t, permuted) if permuted else t for t in (key_BTGD[:, :, mine], kept_BTGD))
        if _close(turned(key, angles, scale)[:, last], kept):
            window = private.window(target.model, layer)
            return KVFound(KVLayer(heads, key_BTGD.shape[3], angles, scale if angles else 1.0, window), permuted)
    _demand(target, f"keys of layer {layer}", turned(key_BTGD[:, :, mine], inv_freq, scale)[:, last], kept_BTGD)
    raise AssertionError("unreachable")
