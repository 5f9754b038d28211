"""The target's input embedding and LM head. Shapes: V vocabulary, E hidden size."""

import torch
from torch import Tensor, nn

from data_prep.decoding.products import Product


class FrozenHead:
    """The target's input embedding and LM head: shared by every drafter, never trained, sharded or saved with one.

    Args:
        embed_scale: what the target multiplies embeddings by (Gemma: the root of E).
        softcap: c, where the target's logits are c tanh(z / c) (Gemma 2 and 4); None: they are z. A drafter's own logits are z.
    """

    def __init__(self, embedding_VE: Tensor, head_VE: Tensor, embed_scale: float = 1.0, softcap: float | None = None):
        self.embedding_VE = embedding_VE.detach()
        self.head_VE = head_VE.detach()
        # As the target does: it multiplies by the scale in its own precision (in bf16 the root of 5376 is 73.5).
        self.embed_scale = float(torch.tensor(embed_scale, dtype=embedding_VE.dtype))
        self.softcap = softcap
        self.product = Product(self.head_VE)

    def embed(self, ids: Tensor) -> Tensor:
        """What the target's first layer reads of tokens, [..., E]."""
        embedded = nn.functional.embedding(ids, self.embedding_VE)
        return embedded if self.embed_scale == 1 else embedded * self.embed_scale

    def capped(self, logits: Tensor) -> Tensor:
        """The target's logits of `last_hidden`'s products with the head."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "FrozenHead":
        embedding = self.embedding_VE.to(device, dtype)
        # A tied head stays tied: two copies of the vocabulary would cost twice the memory.
        tied = self.head_VE.data_ptr() == self.embedding_VE.data_ptr()
        head = embedding if tied else self.head_VE.to(device, dtype)
        return FrozenHead(embedding, head, self.embed_scale, self.softcap)
