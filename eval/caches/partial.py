"""SpecPV: verification over a part of the target's KV cache, made good every few tokens by a full round.

The part holds, of each request, one behind the other:

    sinks | blocks that the last full round's queries like best, for each layer and KV head | tail | buffer

The tail begins at a block's edge, at least a window before the anchor, so that every position before the window is a sink's or
in a whole block that can be chosen. The buffer is what was verified since, and holds the rows of the round under way.

Shapes: B requests, T rows, K rows of drafts (the anchor's first), N layers, L places of the full cache, P places of the part, C
blocks, S positions of a block (or query heads of a KV head), H query heads, G key/value heads, D head size.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from common.recipe import Section
from data_prep.decoding.attention import Reading
from data_prep.decoding.cache import StaticCache
from train.views.layout import Layout, in_slots


class PartialRecipe(Section):
    """SpecPV: which part of the cache is read, in positions. The defaults are SpecPV's for a budget of 4096."""

    sink: int = Field(32, ge=0)
    """First positions of the cache that are always in the part."""
    retrieval: int = Field(4096, ge=1)
    """Most positions that are chosen, in whole blocks, per layer and KV head."""
    window: int = Field(128, ge=1)
    """Last positions that are always in the part."""
    block: int = Field(16, ge=1)
    """Positions per block."""
    partial_tokens: Annotated[int, Field(ge=1)] | Literal["adaptive"] = 32
    """Most tokens that are verified over the part before a full verification. adaptive: what is fastest, up to the window."""

    @model_validator(mode="after")
    def _fits_together(self):
        if self.retrieval % self.block:
            raise ValueError(f"verify.retrieval={self.retrieval} is not whole blocks of verify.block={self.block}")
        if self.window < self.longest_interval:  # an audit may go back as far
            raise ValueError(f"verify.window={self.window} is less than verify.partial_tokens={self.partial_tokens}")
        return self

    @property
    def longest_interval(self) -> int:
        """Tokens that are verified over the part at most before a full verification."""
        return self.window if self.partial_tokens == "adaptive" else self.partial_tokens

    @property
    def chosen(self) -> int:
        """Blocks that are chosen."""
        return self.retrieval // self.block


def block_scores(q_BKHD: Tensor, low_BCGD: Tensor, high_BCGD: Tensor) -> Tensor:
    """How much the queries like each block, [B, G, C]: max(q·max k, q·min k), averaged over rows and over the heads that share
    a KV head (SpecPV). Not a bound of the attention: Quest's, which takes the maximum in each channel, is."""
    q_BKGSD = q_BKHD.unflatten(2, (low_BCGD.shape[2], -1)).float()
    low_BGKSC = torch.einsum("bkgsd,bcgd->bgksc", q_BKGSD, low_BCGD.float())
    high_BGKSC = torch.einsum("bkgsd,bcgd->bgksc", q_BKGSD, high_BCGD.float())
    return torch.maximum(low_BGKSC, high_BGKSC).mean((2, 3))


class PartialCache:
    """The part, beside the full cache that it is taken from."""

    def __init__(self, full: StaticCache, recipe: PartialRecipe, draft_rows: int):
        self.full = full
        self.recipe = recipe
        batch = full.batch
        self.draft_rows = draft_rows  # of the longest draft, the anchor's included
        tail = recipe.window + recipe.block + recipe.longest_interval + draft_rows
        device = full.row_B1.device
        # Blocks are chosen by a layer's own queries: those that share keys in the full cache have parts of their own.
        layers = [one._replace(owner=layer) for layer, one in enumerate(full.layers)]
        places = recipe.sink + recipe.chosen * recipe.block + tail + recipe.longest_interval + 2 * draft_rows
        self.part = StaticCache(layers, batch, places, full.dtype, device)
        blocks = max(1, (full.room - recipe.sink) // recipe.block)
        # Written in place from here on: CUDA graphs hold the addresses.
        summaries = [(batch, blocks, heads, size) for heads, size, _ in layers]
        # Least and greatest key of each block, channel by channel.
        self._low = [torch.zeros(shape, dtype=full.dtype, device=device) for shape in summaries]
        self._high = [torch.zeros(shape, dtype=full.dtype, device=device) for shape in summaries]
        self.tail_B = torch.zeros(batch, dtype=torch.long, device=device)  # position where the tail begins
        self.filled_B = torch.zeros(batch, dtype=torch.long, device=device)  # places of the part that count
        self._block_C = torch.arange(blocks, device=device)

    @property
    def nbytes(self) -> int:
        """Of the part and of what its blocks are chosen by."""
        return self.part.nbytes + sum(t.nbytes for t in (*self._low, *self._high))

    def begin(self, length_B: Tensor) -> None:
        """After the prompts: look at all of their blocks once."""
        self.tail_B.copy_(self._tail(length_B))
        for layer in range(len(self._low)):
            self._summarise(layer, torch.zeros_like(length_B), len(self._block_C))

    def partially(self, anchor_B: Tensor, rows: int, seen_BTT: Tensor | None):
        """The attention of a partial round (`StaticCache.attention`). The full cache keeps the rows' keys too, as they are, until
        a full round makes them exact: drafters that read the target's own keys find them there."""
        attend = self.part.attention(self.filled_B, rows, seen_BTT)
        place_BT = anchor_B[:, None] + torch.arange(rows, device=anchor_B.device)

        def both(layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, reading: Reading) -> Tensor:
            if self.full.on_device:
                self.full.write(layer, place_BT, k_BTGD, v_BTGD)
            return attend(layer, q_BTHD, k_BTGD, v_BTGD, reading)

        return both

    def fully(self, base_B: Tensor, anchor_B: Tensor, rows: int, missing: int, seen_BTT: Tensor | None):
        """The attention of a full round over rows that begin at `base_B`, up to `missing` of them before the anchor's. Every
        layer's part is taken anew, by the queries of the rows from the anchor's on; not where none may be missing, since no
        partial round is near then."""
        attend = self.full.attention(base_B, rows, seen_BTT)
        recipe = self.recipe
        row_BK = (anchor_B - base_B)[:, None] + torch.arange(rows - missing, device=base_B.device)
        # Blocks whose keys may have changed: those since the old tail, which this round computes anew.
        old_B = self.tail_B.clone()
        new_B = self._tail(anchor_B)
        self.tail_B.copy_(new_B)
        first_B = (old_B - recipe.sink) // recipe.block

        def and_choose(layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, reading: Reading) -> Tensor:
            output = attend(layer, q_BTHD, k_BTGD, v_BTGD, reading)
            # The last round's draft may have been a longer one.
            self._summarise(layer, first_B, (missing + self.draft_rows) // recipe.block + 2)
            if missing:
                q_BKHD = q_BTHD[self.full.row_B1, row_BK]
                self._take(layer, self._choose(layer, q_BKHD, new_B), new_B)
            return output

        return and_choose

    def settle(self, length_B: Tensor) -> None:
        """After a full round: the text is verified up to `length_B`."""
        recipe = self.recipe
        taken_B = self._whole(self.tail_B).clamp(max=recipe.chosen) * recipe.block
        self.filled_B.copy_(length_B - self.tail_B + recipe.sink + taken_B)

    def _tail(self, length_B: Tensor) -> Tensor:
        """Where the tail begins: at a block's edge, a window before the end or a little more."""
        recipe = self.recipe
        return recipe.sink + (length_B - recipe.window - recipe.sink).clamp(min=0) // recipe.block * recipe.block

    def _whole(self, tail_B: Tensor) -> Tensor:
        """Blocks between the sinks and the tail."""
        return (tail_B - self.recipe.sink) // self.recipe.block

    def _summarise(self, layer: int, first_B: Tensor, count: int) -> None:
        """Least and greatest of each channel, of `count` blocks from `first_B` on."""
        recipe = self.recipe
        blocks = len(self._block_C)
        block_BC = (first_B[:, None] + torch.arange(count, device=first_B.device)).clamp(max=blocks - 1)
        within_S = torch.arange(recipe.block, device=first_B.device)
        place_BCS = (recipe.sink + block_BC[..., None] * recipe.block + within_S).clamp(max=self.full.room - 1)
        key_BCSGD = self.full.layer(layer)[0][self.full.row_B1[..., None], place_BCS]
        self._low[layer].index_put_((self.full.row_B1, block_BC), key_BCSGD.amin(2))
        self._high[layer].index_put_((self.full.row_B1, block_BC), key_BCSGD.amax(2))

    def _choose(self, layer: int, q_BKHD: Tensor, tail_B: Tensor) -> Tensor:
        """The best blocks before the tail, [B, G, chosen], in the text's order; where there are fewer, what follows them is not
        looked at."""
        scores_BGC = block_scores(q_BKHD, self._low[layer], self._high[layer])
        hidden_BC = self._block_C >= self._whole(tail_B)[:, None]
        scores_BGC = scores_BGC.masked_fill(hidden_BC[:, None], -torch.inf)
        count = min(self.recipe.chosen, len(self._block_C))
        best_BGC = scores_BGC.topk(count, dim=-1).indices
        none_BG = hidden_BC[:, None].expand_as(scores_BGC).gather(2, best_BGC)
        return best_BGC.masked_fill(none_BG, len(self._block_C)).sort(dim=-1).values

    def _take(self, layer: int, block_BGC: Tensor, tail_B: Tensor) -> None:
        """Copy sinks, blocks and tail into the part."""
        recipe = self.recipe
        taken_B = self._whole(tail_B).clamp(max=recipe.chosen) * recipe.block
        parts = Layout(torch.full_like(tail_B, recipe.sink), taken_B, tail_B)
        place_P = torch.arange(self.part.room, device=tail_B.device)
        source_BPG = in_slots(place_P, parts, recipe.block, recipe.sink + block_BGC * recipe.block)
        source_BPG = source_BPG.clamp(max=self.full.room - 1)
        index_BPGD = source_BPG[..., None].expand(-1, -1, -1, self.part.key[layer].shape[-1])
        for part, whole in zip(self.part.layer(layer), self.full.layer(layer)):
            torch.gather(whole, 1, index_BPGD, out=part)
