"""The target's input embedding and LM head. Shapes: V vocabulary, E hidden size."""

import torch
from torch import Tensor, nn

from data_prep.decoding.products import Product


class FrozenHead:
    """The target's input embedding and LM head: shared by every drafter, never trained, sharded or saved with one.

    The target's logits are `softcap` tanh(z / `softcap`), z = head x last_hidden + bias. A drafter that uses the same head has
    the logits head x output: servers draft without bias and cap.

    Args:
        embed_scale: what the target multiplies embeddings by (Gemma: the root of E).
        bias_V: the head's (Phi); None: it has none.
        softcap: None: logits are not capped.
    """

    def __init__(
        self,
        embedding_VE: Tensor,
        head_VE: Tensor,
        embed_scale: float = 1.0,
        bias_V: Tensor | None = None,
        softcap: float | None = None,
    ):
        self.embedding_VE = embedding_VE.detach()
        self.head_VE = head_VE.detach()
        # As the target does: it multiplies by the scale in its own precision (in bf16 the root of 5376 is 73.5).
        self.embed_scale = float(torch.tensor(embed_scale, dtype=embedding_VE.dtype))
        self.bias_V = None if bias_V is None else bias_V.detach()
        self.softcap = softcap
        self.product = Product(self.head_VE)

    def embed(self, ids: Tensor) -> Tensor:
        """What the target's first layer reads of tokens, [..., E]."""
        embedded = nn.functional.embedding(ids, self.embedding_VE)
        return embedded if self.embed_scale == 1 else embedded * self.embed_scale

    @property
    def table_VE(self) -> Tensor:
        """`embed` of every token."""
        return self.embedding_VE if self.embed_scale == 1 else self.embedding_VE * self.embed_scale

    def finish(self, product: Tensor, kept_D: Tensor | None = None) -> Tensor:
        """The target's logits, from the products of its last hidden states with the head, or with its rows `kept_D`."""
        if self.bias_V is not None:
            product = product + (self.bias_V if kept_D is None else self.bias_V[kept_D])
        return self.capped(product)

    def capped(self, logits: Tensor) -> Tensor:
        """Logits, bias included, under the target's cap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "FrozenHead":
        embedding = self.embedding_VE.to(device, dtype)
        # A tied head stays tied: two copies of the vocabulary would cost twice the memory.
        tied = self.head_VE.data_ptr() == self.embedding_VE.data_ptr()
        head = embedding if tied else self.head_VE.to(device, dtype)
        bias = None if self.bias_V is None else self.bias_V.to(device, dtype)
        return FrozenHead(embedding, head, self.embed_scale, bias, self.softcap)
