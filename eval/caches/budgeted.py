"""What a view leaves of a static memory, for a batch: `SparseCache` in fixed sizes and without the host. CUDA graphs can hold it.

The memory stays whole and where it is. In every round a part of `budget` places is copied out of each layer and branch, one
behind the other:

    sinks | chosen chunks | tail

Draft rows read the part, and a round costs what its budget costs, however long the texts are. A selection scores all chunks,
topk_chunk by summaries that are kept up to date. `SparseCache`, the oracle, shows a request the same keys.

Shapes: B requests, W observed queries of each, T rows, L places of the memory, P places of a part, C chunks of the memory, K
chunks that are chosen at most, N chunks whose keys have changed, S positions of a chunk, G key/value heads, D head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eval.caches.static import Filled, Part, StaticMemory, layers_of
from train.drafter.base import Drafter
from train.drafter.memory import Memory
from train.views.layout import Layout, in_slots, layout, most_chunks, tail_at
from train.views.recipe import View
from train.views.scores import attention, best_first, pooled, summarised, summary_scores, tiles

KINDS = ("sink_recent", "topk_chunk", "snapkv")  # of views; h2o sums what all queries so far attended to
LONG = 1 << 40  # tokens, more than any text has


class BudgetedMemory:
    """`due`, `select` and `taken` are called in this order before each draft, `changed` after keys were written.

    Args:
        view: of one of KINDS, with a budget below the memory's room.
    """

    def __init__(self, drafter: Drafter, view: View, memory: StaticMemory):
        self.view = view
        self._drafter = drafter
        self._memory = memory
        self._most = most_chunks(view, view.budget)
        self._lasts = {"verify": 0, "never": LONG}.get(view.refresh, view.refresh)
        batch = (memory.batch,)
        self._since_B = torch.zeros(batch, dtype=torch.long, device=memory.row_B1.device)  # the anchor at the last selection
        self._since: list[int] = []  # the same, as the host knows it
        self._slot_P = torch.arange(view.budget, device=self._since_B.device)
        # For each layer and branch, from the first keys on: where the chosen chunks begin, best first [B, G, K]; float32
        # summaries of all chunks [B, C, G, D].
        self._start: list[dict[str, Tensor]] = [{} for _ in memory.layers]
        self._summaries: list[dict[str, list[Tensor]]] = [{} for _ in memory.layers]

    def begin(self) -> None:
        """New requests, for which nothing is chosen yet."""
        self._since_B.fill_(-2 * LONG)
        self._since = [-2 * LONG] * self._memory.batch

    def due(self, anchors: list[int]) -> bool:
        """Whether any request, whose anchors these are, is due for a selection. `select` decides the same on the device."""
        due = [b for b, anchor in enumerate(anchors) if anchor - self._since[b] >= self._lasts]
        for b in due:
            self._since[b] = anchors[b]
        return bool(due and self._most)

    def changed(self) -> None:
        """The keys at the places announced last are new: summarise their chunks again, from all of their keys. Keys of refused
        tokens are in summaries too, until they are written over; no chunk with such a key is chosen."""
        memory = self._memory
        for branch, place_BT in memory.place.items():
            for layer, starts in enumerate(self._start):
                if branch not in starts:
                    self._make(layer, branch)
            if self.view.kind == "topk_chunk":
                self._summarise(branch, place_BT[:, :1], place_BT.shape[1])

    def _make(self, layer: int, branch: str) -> None:
        keys = layers_of(self._memory.layers[layer][branch].key)
        batch, places, _, size = keys[0].shape
        heads = sum(t.shape[2] for t in keys)
        self._start[layer][branch] = self._since_B.new_zeros(batch, heads, max(1, self._most))
        if self.view.kind == "topk_chunk":
            shape = (batch, places // self.view.chunk, heads, size)
            self._summaries[layer][branch] = [torch.zeros(shape, device=keys[0].device) for _ in summarised(self.view)]

    def _summarise(self, branch: str, first_B1: Tensor, rows: int) -> None:
        """The chunks that `rows` places from `first_B1` on lie in."""
        chunk = self.view.chunk
        row_B1 = self._memory.row_B1
        touched_N = torch.arange((rows - 2) // chunk + 2, device=row_B1.device)
        within_S = torch.arange(chunk, device=row_B1.device)
        for layer, kinds in enumerate(self._memory.layers):
            summaries = self._summaries[layer][branch]
            # Behind the last whole chunk nothing is ever chosen.
            chunk_BN = (first_B1 // chunk + touched_N).clamp(max=summaries[0].shape[1] - 1)
            place_BNS = chunk_BN[..., None] * chunk + within_S
            keys = [t[row_B1[..., None], place_BNS].float() for t in layers_of(kinds[branch].key)]
            key_BNSGD = torch.cat(keys, dim=3)
            for summary_BCGD, how in zip(summaries, summarised(self.view)):
                summary_BCGD.index_put_((row_B1, chunk_BN), getattr(key_BNSGD, how)(2))

    def select(self, anchor_B: Tensor, observe: Callable[[Tensor], list[dict[str, Tensor]]]) -> None:
        """Rank the chunks of all requests; those that are due take it over.

        Args:
            observe: positions [B, W] of known tokens -> for each layer and branch their queries [B x W, H, D].
        """
        view = self.view
        due_B = anchor_B - self._since_B >= self._lasts
        position_BW = queries = None
        if view.window:
            # The last W tokens, the anchor being the last. A text of fewer is shown whole, now and in rounds that this selection
            # serves, so that it does not matter which tokens these are then.
            position_BW = (anchor_B[:, None] - view.window + 1).clamp(min=0) + torch.arange(view.window, device=anchor_B.device)
            queries = observe(position_BW)
        for branch, filled in self._memory.places.items():
            since_B = filled.count(anchor_B)
            tail_B = tail_at(view, view.budget, since_B)
            for layer, starts in enumerate(self._start):
                query = None if queries is None else queries[layer][branch].unflatten(0, position_BW.shape)
                seen_BW = None if queries is None else position_BW - filled.first
                scores_BGC = self._scores(layer, branch, since_B, query, seen_BW)
                start_C = torch.arange(scores_BGC.shape[2], device=anchor_B.device) * view.chunk
                start_BGK = best_first(scores_BGC, start_C, view, tail_B)[..., : self._most] * view.chunk
                # In place, into tensors that stay: what reads them is another graph.
                starts[branch].copy_(torch.where(due_B[:, None, None], start_BGK, starts[branch]))
        self._since_B.copy_(torch.where(due_B, anchor_B, self._since_B))

    def _scores(self, layer: int, branch: str, since_B: Tensor, query_BWHD: Tensor | None, seen_BW: Tensor | None) -> Tensor:
        """[B, G, C]."""
        view = self.view
        keys = layers_of(self._memory.layers[layer][branch].key)
        if view.kind == "topk_chunk":
            if query_BWHD is None:  # lastkey
                row_B = self._memory.row_B1[:, 0]
                query_BHD = torch.cat([t[row_B, (since_B - 1).clamp(min=0)] for t in keys], dim=1)
            else:
                query_BHD = query_BWHD[:, 0]
            summaries = self._summaries[layer][branch]
            return summary_scores(view, query_BHD.float().unflatten(1, (summaries[0].shape[2], -1)), *summaries)
        key_BLGD = torch.cat(keys, dim=2) if len(keys) > 1 else keys[0]
        index_L = torch.arange(key_BLGD.shape[1], device=since_B.device)
        readable_BWL = index_L < seen_BW[..., None]
        votes = [
            attention(query_BWHD[part], key_BLGD[part], readable_BWL[part]).sum(1)
            for part in tiles(len(key_BLGD), query_BWHD[0, ..., 0].numel() * len(index_L))
        ]
        return pooled(view, torch.cat(votes), index_L, since_B)

    def taken(self, anchor_B: Tensor) -> tuple[Memory, Tensor]:
        """(what the rows of a round may read, the anchors' positions for them)."""
        memory = self._memory
        view = self.view
        # 1. How much of each branch is shown, and where the anchor stands then: behind the longest of its branches.
        parts: dict[str, Layout] = {}
        places: dict[str, Filled] = {}
        for branch, filled in memory.places.items():
            count_B = filled.count(anchor_B)
            # Without chunks it makes no difference when they would have been chosen.
            since_B = filled.count(self._since_B) if self._most else count_B
            parts[branch] = layout(view, view.budget, count_B, since_B)
            places[branch] = Filled(filled.first, parts[branch].visible(count_B))
        position_B = anchor_B
        if view.positions == "in_cache":
            position_B = torch.stack([filled.count_B + filled.first for filled in places.values()]).amax(0)
        # 2. The keys and values themselves.
        layers = [
            {branch: self._part(layer, branch, parts[branch], places[branch], position_B) for branch in parts}
            for layer in range(len(memory.layers))
        ]
        return Memory(layers, places), position_B

    def _part(self, layer: int, branch: str, parts: Layout, filled: Filled, position_B: Tensor) -> Part:
        view = self.view
        start_BGK = self._start[layer][branch]
        if view.positions == "in_cache":
            # In the order of the text: those that give way to the tail are behind all others.
            chosen_BK = torch.arange(start_BGK.shape[2], device=position_B.device) * view.chunk < parts.picked[:, None]
            start_BGK = start_BGK.masked_fill(~chosen_BK[:, None], LONG).sort(dim=2).values
        whole = self._memory.layers[layer][branch]
        index_BPG = in_slots(self._slot_P, parts, view.chunk, start_BGK).clamp(max=layers_of(whole.key)[0].shape[1] - 1)
        key, value = (_gathered(layers_of(held), index_BPG) for held in whole)
        if view.positions == "in_cache":
            # Visible keys stand one behind the other, the last one before the anchor.
            begin_B = position_B - filled.count_B
            moved_BPG = begin_B[:, None, None] + self._slot_P[:, None] - filled.first - index_BPG
            key = self._drafter.rotate(layer, branch, key.flatten(0, 1), moved_BPG.flatten(0, 1)).view_as(key)
        return Part(key, value)

    def kv_bytes(self, longest: int) -> dict[str, int]:
        """Of one request of `longest` tokens (`StaticTrained.kv_bytes`), what a view adds to its memory or takes from it. A
        selection looks at all places, filled or not."""
        parts = [part for kinds in self._memory.layers for part in kinds.values()]
        position = sum(part.read_bytes(1) for part in parts)
        summaries = sum(t[0].nbytes for kinds in self._summaries for kept in kinds.values() for t in kept)
        searched = summaries
        if self.view.kind == "snapkv":
            searched = sum(t[0].nbytes for part in parts for t in layers_of(part.key))
        if self.view.window:  # known tokens pass all layers but the last, and read all of their keys and values
            searched += sum(part.read_bytes(longest) for kinds in self._memory.layers[:-1] for part in kinds.values())
        return {
            "read": position * min(longest, self.view.budget),
            "searched": searched,
            "kept": summaries,
            "peak": summaries + position * self.view.budget,
        }


def _gathered(layers: tuple[Tensor, ...], index_BPG: Tensor) -> Tensor:
    """Each KV head's own positions, [B, P, G, D]; the heads of several layers stand side by side."""
    indices = index_BPG.split([t.shape[2] for t in layers], dim=2)
    found = [t.gather(1, index[..., None].expand(-1, -1, -1, t.shape[3])) for t, index in zip(layers, indices)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)
