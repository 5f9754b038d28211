"""What the target's forward yields at each position.

Shapes: T positions, E hidden size, G key/value heads, H query heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class States:
    """What the target's forward yields at each position i (it has read x_0 .. x_i).

    hidden[l] [..., T, E]: the residual stream after layer l (0-based; the embedding is not a layer).
    key[l], value[l] [..., T, G, D]: layer l's keys and values; keys are **before** RoPE.
    last_hidden [..., T, E]: after the final norm, the LM head's input.
    query[l] [..., T, H, D]: layer l's queries (H query heads), **before** RoPE as the keys are.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    key: dict[int, Tensor] = field(default_factory=dict)
    value: dict[int, Tensor] = field(default_factory=dict)
    last_hidden: Tensor | None = None
    query: dict[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All of them, in an order of their own."""
        kinds = (self.hidden, self.key, self.value, self.query)
        return [t for kind in kinds for _, t in sorted(kind.items())] + [self.last_hidden]

    def map(self, function: Callable[[Tensor], Tensor]) -> "States":
        """The same states with `function` applied to every tensor."""
        kinds = (self.hidden, self.key, self.value, self.query)
        hidden, key, value, query = ({layer: function(t) for layer, t in kind.items()} for kind in kinds)
        return States(hidden, key, value, None if self.last_hidden is None else function(self.last_hidden), query)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host, on `device`. The host does not wait until a GPU has done what it was given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)
