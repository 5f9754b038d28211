"""Draft layers of sizes of their own: what they are beside a target of other sizes, and their rotary embedding.

Shapes: R frequencies of a rotary embedding.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from data_prep.target.architecture import Architecture


def draft_architecture(named: dict[str, int], target: Architecture) -> Architecture:
    """What the draft layers are: as the target's, but for the sizes that are named. Layers of other sizes have no biases, and
    heads of another size an unscaled rotary embedding of the target's theta (unless it has none: `plain_rope`)."""
    if not named:
        return target
    own = replace(target, **named, qkv_bias=False)
    found = plain_rope(target.inv_freq)
    if own.head_dim == target.head_dim or found is None:
        return own
    return replace(own, inv_freq=_frequencies(own.head_dim, *found).tolist(), rope_scale=1.0)


def _frequencies(head_dim: int, theta: float, factor: float) -> Tensor:
    """Of an unscaled rotary embedding, whose positions are divided by `factor`, [R]."""
    power_R = torch.arange(0, head_dim, 2).double() / head_dim
    return theta**-power_R / factor


def own_sizes(own: Architecture, target: Architecture) -> list[str]:
    """Names of what differs."""
    return [field.name for field in fields(own) if getattr(own, field.name) != getattr(target, field.name)]


def plain_rope(inv_freq: list[float]) -> tuple[float, float] | None:
    """(theta, the factor by which positions are divided) of a rotary embedding, of which a scaling that leaves the quick
    frequencies alone (YaRN, Llama 3) is taken away. None: its frequencies do not say it."""
    freq_R = torch.tensor(inv_freq, dtype=torch.float64)
    count = len(freq_R)
    if count < 2:
        return None
    ratio = freq_R[1] / freq_R[0]
    series_R = ratio ** torch.arange(count)
    plain = freq_R / freq_R[0]
    whole = torch.allclose(plain, series_R, rtol=1e-4, atol=0)
    if not whole and not (freq_R[0] == 1 and torch.allclose(plain[:3], series_R[:3], rtol=1e-5, atol=0)):
        return None
    # Frequencies are float32's: a series says its ratio best by its last term. Nobody's theta has more than six digits.
    if whole:
        ratio = plain[-1] ** (1 / (count - 1))
    return float(f"{float(ratio**-count):.6g}"), float(f"{float(1 / freq_R[0]):.6g}")


def rope_config(a: Architecture) -> dict | None:
    """The rotary embedding of draft layers as a configuration file says it. None: it is scaled otherwise than linearly, or it
    turns a part of a head."""
    found = plain_rope(a.inv_freq)
    if found is None or a.rope_scale != 1 or 2 * len(a.inv_freq) != a.head_dim:
        return None
    theta, factor = found
    if not torch.allclose(torch.tensor(a.inv_freq).double(), _frequencies(a.head_dim, theta, factor), rtol=1e-4, atol=0):
        return None
    parameters = {} if factor == 1 else {"rope_type": "linear", "factor": factor}
    return {
        "rope_theta": theta,
        "rope_scaling": parameters or None,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default", **parameters},
    }
