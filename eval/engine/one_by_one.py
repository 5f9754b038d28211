"""A batch of drafters each of which drafts for one request, as the oracle does.

Shapes: B requests, J drafted tokens, L places of a text.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from data_prep.decoding.sampling import Sampling
from data_prep.target.states import States
from eval.engine.drafting import Proposal
from eval.oracle.drafting import Trained


class OneByOne:
    """For the engine, the oracle's drafters side by side. They keep a memory of each request by itself and wait for the device
    in every round. Every view can be had so.

    Args:
        make: `Trained` for the request at a place of the batch.
    """

    graphs = False
    deepest = None

    def __init__(self, batch: int, make: Callable[[int], Trained]):
        self._drafting = [make(b) for b in range(batch)]

    def begin(self, cache) -> None:
        self._seen = [0] * len(self._drafting)
        for drafting in self._drafting:
            drafting.begin()

    def observe(self, states: States, base_B: Tensor, text_BL: Tensor, last_B: Tensor) -> None:
        for b, (base, last) in enumerate(zip(base_B.tolist(), last_B.tolist())):
            seen = self._seen[b]
            count = base + last + 1
            # A prompt that ended in an earlier chunk of the batch's prefill has nothing new.
            if last >= 0 and count > seen:
                known = text_BL[b, seen + (seen > 0) : count + 1].tolist()
                self._drafting[b].observe(states.map(lambda t: t[b, seen - base : last + 1]), known)
                self._seen[b] = count

    def due(self, anchors: list[int]) -> bool:
        return False  # each of them chooses in its own time

    def propose(self, text_BL: Tensor, anchor_B: Tensor, length: int, sampling: Sampling, u_BJ: Tensor) -> Proposal:
        drafts = []
        for b, anchor in enumerate(anchor_B.tolist()):
            # `u_BJ` comes from the request's own random numbers: what it draws does not depend on its place in the batch.
            seed = int(u_BJ[b, 0] * 2**53) if length else 0
            generator = torch.Generator(device=text_BL.device).manual_seed(seed)
            drafts.append(self._drafting[b].draft(text_BL[b, : anchor + 1].tolist(), sampling.temperature, generator))
        tokens_BJ = torch.tensor([d.tokens[:length] for d in drafts], device=text_BL.device)
        return Proposal(tokens_BJ, torch.stack([d.q_JV[:length] for d in drafts]) if sampling.temperature else None)

    def kv_bytes(self, longest: int) -> dict[str, int]:
        every = [drafting.kv_bytes() for drafting in self._drafting]
        return {what: max(one[what] for one in every) for what in every[0]}
