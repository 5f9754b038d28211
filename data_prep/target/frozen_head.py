"""The target's input embedding and LM head. Shapes: V vocabulary, E hidden size."""

import torch
from torch import Tensor, nn

from data_prep.decoding.products import Product


class FrozenHead:
    """The target's input embedding and LM head: shared by every drafter, never trained, sharded or saved with one."""

    def __init__(self, embedding_VE: Tensor, head_VE: Tensor):
        self.embedding_VE = embedding_VE.detach()
        self.head_VE = head_VE.detach()
        self.product = Product(self.head_VE)

    def embed(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.embedding_VE)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "FrozenHead":
        embedding = self.embedding_VE.to(device, dtype)
        # A tied head stays tied: two copies of the vocabulary would cost twice the memory.
        tied = self.head_VE.data_ptr() == self.embedding_VE.data_ptr()
        return FrozenHead(embedding, embedding if tied else self.head_VE.to(device, dtype))
