"""What was found by structure is proven when a target is loaded: on six tokens, against what transformers itself hands out.

Shapes: B texts, T tokens, E hidden size, G key/value heads, D head size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from common.errors import UserError, first_line
from common.ranks import rank
from data_prep.decoding.attention import Reading
from data_prep.target import transformers_private as private
from data_prep.target.architecture import KVLayer, kv_owners
from data_prep.target.families import FAMILIES
from data_prep.target.rotation import halves_of_neighbours, turned
from data_prep.target.states import States

TOKENS = 6
# Of a difference's norm to the norm. Both sides do the same sums; kernels may add up in another order, above all in bf16.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
NARROW_TOLERANCE = 0.03
# In bf16, or with quantised weights: another number of rows rounds otherwise, and may choose other experts.
NOT_CAUSAL = 0.25


class KVFound(NamedTuple):
    """A layer's keys and values, how many angles turn neighbours (0: none; its keys are in the layout of halves), how many of
    its K/V heads this process has, and what its queries are multiplied by, so that scores are q k / sqrt(D)."""

    shape: KVLayer
    neighbours: int
    here: int
    query_scale: float


@torch.no_grad()
def prove(target, kv_layers: list[int]) -> dict[int, KVFound]:
    """Compare the states that `target` hands out with its model's own; by layer of `kv_layers`, what is found of its attention.

    Raises:
        UserError: a state or a logit is not the model's own, or the model is not causal.
    """
    try:
        return _prove(target, kv_layers)
    except UserError:
        raise
    except Exception as error:
        if target.model.config.model_type in FAMILIES:
            raise  # a fault of ours
        raise _refused(target, f"whose forward fails here ({type(error).__name__}: {first_line(error)})") from error


def _prove(target, kv_layers: list[int]) -> dict[int, KVFound]:
    every = range(len(target.layers))
    ids_BT = torch.arange(3, 3 + TOKENS, device=target.device)[None] % target.config.vocab_size

    # 1. Hidden states: taken in the very forward that hands them out, and equal in every bit. Two forwards may differ by
    # rounding, and neighbouring layers by less than that where a few dimensions are a thousand times as large as the others.
    target.capture(every, ())
    try:
        hidden, logits = private.own_outputs(target.model, ids_BT)
        taken = target.taken().hidden
    finally:
        target.capture((), ())
    # The last of transformers' hidden states is normed; the logits say whether that is right.
    for layer in every[:-1]:
        _demand(target, f"hidden states after layer {layer}", torch.equal(taken[layer], hidden[layer + 1]), hidden[layer + 1])
    if not target.spread_by_tensors:  # each process may have a part of the embedding
        _demand_embedding(target, target.frozen_head.embed(ids_BT), hidden[0])

    # 2. Logits, and that no token sees those behind it.
    cache = DynamicCache(config=target.model.config) if kv_layers else None
    target.capture((), kv_layers)
    try:
        states = target.forward(ids_BT, cache)
    finally:
        target.capture((), ())
    own = target.logits(states.last_hidden)
    _demand(target, "logits", _close(own, logits), logits)
    shorter_TE, longer_TE = (t[0, : TOKENS - 1] for t in (target.forward(ids_BT[:, :-1]).last_hidden, states.last_hidden))
    exact = longer_TE.dtype in TOLERANCE and not target.rounds
    if _apart(shorter_TE, longer_TE) > (1e-3 if exact else NOT_CAUSAL):
        raise _refused(target, "which is not causal: its tokens see those behind them")

    # 3. Keys, values and windows.
    if not kv_layers:
        return {}
    readings, keys = _readings(target, ids_BT)
    for layer, owner in enumerate(kv_owners(target.config)):
        # Layers may lie on several devices.
        if owner != layer and not torch.equal(keys[layer].cpu(), keys[owner].cpu()):
            raise _refused(target, f"whose layer {layer} does not read the keys of layer {owner}, as its configuration says")
    return {layer: _found(target, layer, states, cache, readings[layer]) for layer in kv_layers}


def _readings(target, ids_BT: Tensor) -> tuple[dict[int, Reading], dict[int, Tensor]]:
    """How each layer's own module says that it reads keys, and which keys these are."""
    said: dict[int, Reading] = {}
    read: dict[int, Tensor] = {}

    def attend(layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, reading: Reading) -> Tensor:
        said[layer] = reading
        read[layer] = k_BTGD
        return torch.zeros_like(q_BTHD)

    with private.attention_given(target.model, attend):
        private.decoder(target.model)(input_ids=ids_BT, use_cache=False)
    return said, read


def _refused(target, why: str) -> UserError:
    return UserError(f"target {target.path} is a '{target.model.config.model_type}', {why}")


def _demand(target, what: str, holds: bool, own: Tensor) -> None:
    if not own.isfinite().all():
        raise _refused(target, f"whose {what} are not finite: its weights are damaged")
    if not holds:
        raise _refused(target, f"whose {what} are not what its own forward makes: this family is read wrongly")


def _demand_embedding(target, found_BTE: Tensor, own_BTE: Tensor) -> None:
    """Positions or a norm may be added to what tokens say, and drafters do without. A factor would be a fault of ours."""
    if found_BTE.shape != own_BTE.shape:
        raise _refused(target, f"whose layers read {list(own_BTE.shape[2:])} numbers a token, and drafters one vector")
    found, own = (t.float().cpu().flatten() for t in (found_BTE, own_BTE))
    factor = (own @ found) / (found @ found)
    if not _close(found, own) and _close(found * factor, own):
        raise _refused(target, f"which multiplies its embeddings by {factor:.4g}; where its configuration says so is not known")


def _apart(one_TE: Tensor, other_TE: Tensor) -> float:
    """Relative distance of states, the median over tokens."""
    one_TE, other_TE = (t.to("cpu", torch.float64) for t in (one_TE, other_TE))
    return float(((one_TE - other_TE).norm(dim=-1) / other_TE.norm(dim=-1)).median())


def _error(found: Tensor, own: Tensor) -> float:
    """Of a difference's norm to the norm; infinite where shapes differ."""
    if found.shape != own.shape:
        return torch.inf
    found, own = (t.to("cpu", torch.float64) for t in (found, own))
    return float((found - own).norm() / own.norm())


def _close(found: Tensor, own: Tensor) -> bool:
    return _error(found, own) <= TOLERANCE.get(own.dtype, NARROW_TOLERANCE)


def _found(target, layer: int, states: States, cache: DynamicCache, reading: Reading) -> KVFound:
    """What a layer's keys and values are like: how they have to be turned to be those in the model's own cache."""
    kept_BTGD, kept_values_BTGD = (t.transpose(1, 2) for t in (cache.layers[layer].keys, cache.layers[layer].values))
    heads, size = states.key[layer].shape[2:]
    # A layer with a window shorter than the text has let go of the first tokens.
    last = slice(TOKENS - kept_BTGD.shape[1], None)
    # Under tensor parallelism a process may keep its own heads alone.
    here = kept_BTGD.shape[2]
    mine = slice(rank() * here, (rank() + 1) * here) if here < heads else slice(None)
    key_BTGD, value_BTGD = (t[:, :, mine] for t in (states.key[layer], states.value[layer]))
    _demand(target, f"values of layer {layer}", _close(value_BTGD[:, last], kept_values_BTGD), kept_values_BTGD)

    # Halves, neighbours, or not at all: some layers of some families know no positions. The nearest of the three, because a few
    # large dimensions that do not turn can make all of them look alike.
    inv_freq, scale = private.rotary(target.model, layer) or ([], 1.0)
    errors = {}
    for angles, neighbours in ((inv_freq, 0), (inv_freq, len(inv_freq)), ([], 0)):
        key, kept = (halves_of_neighbours(t, neighbours) if neighbours else t for t in (key_BTGD, kept_BTGD))
        errors[_error(turned(key, angles, scale)[:, last], kept)] = (angles, neighbours)
    angles, neighbours = errors[min(errors)]
    holds = min(errors) <= TOLERANCE.get(kept_BTGD.dtype, NARROW_TOLERANCE)
    _demand(target, f"keys of layer {layer}", holds, kept_BTGD)

    window = private.window_of(target.config, layer)
    if reading.window != window:
        raise _refused(target, f"whose layer {layer} reads {reading.window} positions, where its configuration says {window}")
    shape = KVLayer(heads, size, angles, scale if angles else 1.0, window)
    return KVFound(shape, neighbours, here, (reading.scale or size**-0.5) * size**0.5)
