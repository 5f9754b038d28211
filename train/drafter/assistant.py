"""Gemma 4's assistants: small layers with queries alone over the target's cache, between projections of their own.

As `Gemma4AssistantForCausalLM` of transformers and `Gemma4MTP` of vLLM. A row reads its token, as the target's first layer does,
beside a feature of the target's size. At step 1 this is the target's own last hidden state, behind its final norm, at the last
position that it has processed; later it is what the step before left.

Shapes: Q draft rows, P memory positions, V target vocabulary, R rows of it, E hidden size of the target, H of the draft layers.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.target.described import Described
from data_prep.target.frozen_head import FrozenHead
from train.drafter.base import Drafter
from train.drafter.config import DrafterConfig
from train.drafter.heads import DraftHead
from train.drafter.layered import LayeredDrafter
from train.drafter.layers import Attention, DraftLayer, Rope
from train.drafter.memory import TargetKV

CHUNK = 8192  # rows of the vocabulary that are made wide at a time


class AssistantAttention(Attention):
    def queries(self, x_QI: Tensor, rope: Rope) -> Tensor:
        # Gemma's scores are plain products. Our backends divide them by the root of D.
        return super().queries(x_QI, rope) * self.heads[1] ** 0.5


class AssistantLayer(DraftLayer):
    """A layer as Gemma's are: what attention and MLP give is normed too, before the stream takes it."""

    attention = AssistantAttention
    activation = staticmethod(partial(F.gelu, approximate="tanh"))

    def __init__(self, config: DrafterConfig, index: int):
        super().__init__(config, index)
        a = config.architecture
        self.attended_norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        self.fed_norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        # Not learned: published assistants have other values than 1.
        self.register_buffer("scalar", torch.ones(1))

    def after(self, x_QE: Tensor, attended_QE: Tensor) -> Tensor:
        x_QE = x_QE + self.attended_norm(attended_QE)
        return (x_QE + self.fed_norm(self.feed(self.post_norm(x_QE)))) * self.scalar.to(x_QE.dtype)


class Assistant(LayeredDrafter):
    """`target_norm` [E] is the weight of the target's final norm: for all positions caches hold the residual stream before it."""

    def __init__(self, config: DrafterConfig):
        # Not LayeredDrafter's: an assistant has other ends.
        Drafter.__init__(self, config)
        a = config.architecture
        states = config.state_size
        self.pre_projection = nn.Linear(2 * states, a.hidden_size, bias=False)
        self.layers = nn.ModuleList(AssistantLayer(config, i) for i in range(len(config.target_layers)))
        self.norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        self.head = DraftHead(config)
        self.post_projection = nn.Linear(a.hidden_size, states, bias=False)
        self.target_kv = nn.ModuleList(TargetKV(config, layer) for layer in config.target_layers)
        self.register_buffer("target_norm", torch.ones(states))
        self._angles = {}

    def embed(self, ids: Tensor, head: FrozenHead) -> Tensor:
        return head.embed(ids)

    def _feature(self, hidden_PI: Tensor) -> Tensor:
        """The target's hidden states behind its final norm, [P, E]."""
        # In float32, as Gemma norms.
        wide = hidden_PI.to(torch.promote_types(hidden_PI.dtype, torch.float32))
        normed = F.rms_norm(wide, wide.shape[-1:], self.target_norm.to(wide.dtype), self.config.architecture.norm_eps)
        return normed.to(hidden_PI.dtype)

    def _enter(self, token_QE: Tensor, feature_QE: Tensor | None) -> Tensor:
        return self.pre_projection(torch.cat([token_QE, feature_QE], dim=-1))

    def _leave(self, x_QE: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(x_QE)
        return normed, self.post_projection(normed)

    @torch.no_grad()
    def start(self, target: Described | None, head: FrozenHead, counts_V: Tensor | None = None) -> "Assistant":
        super().start(target, head, counts_V)
        self.target_norm.copy_(target.final_norm_weight)
        return self

    def _start_head(self, head: FrozenHead, counts_V: Tensor | None) -> None:
        """The head begins as the target's, seen through those H directions in which its rows are largest; `post_projection` leads
        back into them."""
        directions_EH = main_directions(head.head_VE, self.config.architecture.hidden_size).float()
        for rows_RE, learned_RH in zip(head.head_VE.split(CHUNK), self.head.weight.split(CHUNK)):
            learned_RH.copy_(rows_RE.float() @ directions_EH)
        self.post_projection.weight.copy_(directions_EH)


def main_directions(rows_VE: Tensor, count: int) -> Tensor:
    """The right singular vectors of the largest singular values, [E, count], in float64."""
    # Of the products of columns, E x E: the vocabulary is too long for a decomposition of the whole.
    gram_EE = sum(part.T @ part for part in map(Tensor.double, rows_VE.split(CHUNK)))
    directions_EH = torch.linalg.eigh(gram_EE).eigenvectors.flip(1)[:, :count]
    # Either sign would do. The same one is chosen everywhere: the largest number of each is positive.
    largest_1H = directions_EH.gather(0, directions_EH.abs().argmax(0, keepdim=True))
    return directions_EH * largest_1H.sign()
