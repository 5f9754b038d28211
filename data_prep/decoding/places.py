"""The places of a batch: what the device knows of each request that is going, as tensors that stay where they are.

Shapes: P places, L tokens of a text, U random numbers.
"""

import torch
from torch import Tensor


class Places:
    """What the device knows of its requests, place by place. A text's last token is not processed yet."""

    FIELDS = ("text_PL", "length_P", "size_P", "limit_P", "going_P", "temperature_P", "top_p_P", "random_PU")

    def __init__(self, count: int, positions: int, draws: int, device: torch.device):
        # One more than the cache has: the last token of a text is never processed.
        self.text_PL = torch.zeros(count, positions + 1, dtype=torch.long, device=device)
        # Tokens that are processed, of the prompt, and of prompt and answer at most.
        self.length_P, self.size_P, self.limit_P = torch.zeros(3, count, dtype=torch.long, device=device)
        self.going_P = torch.zeros(count, dtype=torch.bool, device=device)
        self.temperature_P, self.top_p_P = torch.zeros(2, count, device=device)
        self.random_PU = torch.zeros(count, draws, dtype=torch.float64, device=device)

    def first(self, count: int) -> "Places":
        """The first `count` places, sharing their memory."""
        # Without the constructor, which would make tensors of its own.
        part = Places.__new__(Places)
        for name in self.FIELDS:
            setattr(part, name, getattr(self, name)[:count])
        return part

    def take_over(self, smaller: "Places") -> None:
        for name in self.FIELDS:
            old = getattr(smaller, name)
            getattr(self, name)[tuple(map(slice, old.shape))] = old

    def move(self, source: Tensor, destination: Tensor) -> None:
        for name in self.FIELDS:
            field = getattr(self, name)
            field[destination] = field[source]
