"""The target's cache in the host's memory. Full rounds bring it to the GPU layer by layer, the next one while one is read.

Shapes: B requests, T rows of each, L places, G key/value heads, D head size, N layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_prep.decoding.cache import StaticCache
from data_prep.target.architecture import CachedLayer


class OffloadedCache(StaticCache):
    """Chains only (`keep` moves rows on the device), and layers of one shape: it is for partial verification, which is refused
    where layers have windows, and only those differ. Nothing here can stand in a CUDA graph."""

    on_device = False

    def __init__(self, layers: Sequence[CachedLayer], batch: int, room: int, dtype: torch.dtype, device):
        super().__init__(layers, batch, room, dtype, "cpu")
        self.row_B1 = self.row_B1.to(device)
        self._stream = torch.cuda.Stream() if torch.device(device).type == "cuda" else None
        if self._stream:
            # Only pinned memory is copied while the GPU computes.
            self._hold([block.pin_memory() for block in self.blocks])
        # Two layers on the device, an even and an odd one, [2, kinds, B, L, G, D]: one is read while the next one comes.
        self._staged = torch.zeros(2, 2, *self.key[0].shape, dtype=dtype, device=device)
        self._holds: list[int | None] = [None, None]  # which layers these are
        self._bases: list[int] = []  # where each request's rows begin
        self._filled = 0  # places that hold anything, of any request

    def attention(self, base_B: Tensor, rows: int, seen_BTT: Tensor | None = None):
        self._bases = base_B.tolist()
        self._holds = [None, None]
        self._filled = max(self._filled, *(base + rows for base in self._bases))
        return super().attention(base_B, rows, seen_BTT)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        owner = self.layers[layer].owner
        self._fetch(owner)
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)
        return tuple(self._staged[owner % 2])

    def write(self, layer: int, place_BT: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> None:
        if not self.owns(layer):
            return
        for kind, host, new in zip(self.layer(layer), (self.key, self.value), (k_BTGD, v_BTGD)):
            kind.index_put_((self.row_B1, place_BT), new)
            for b, base in enumerate(self._bases):
                host[layer][b, base : base + new.shape[1]].copy_(new[b], non_blocking=True)
        if layer + 1 < len(self.layers) and self.owns(layer + 1):
            self._fetch(layer + 1)

    def keep(self, base_B: Tensor, row_BJ: Tensor) -> None:
        raise NotImplementedError("a tree's path is not moved in the host's memory")

    def _fetch(self, layer: int) -> None:
        """Begin to bring a layer, once the one whose place it takes has been read."""
        if self._holds[layer % 2] == layer:
            return
        self._holds[layer % 2] = layer
        if not self._stream:
            self._bring(layer)
            return
        # The layer that was there may still be read by attention that was launched before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._bring(layer)

    def _bring(self, layer: int) -> None:
        for kind, host in zip(self._staged[layer % 2], (self.key, self.value)):
            kind[:, : self._filled].copy_(host[layer][:, : self._filled], non_blocking=True)
