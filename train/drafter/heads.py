"""What stands between a drafter's output and its tokens: its vocabulary, its LM head, and a head that knows the token before.

Shapes: N anchors, J drafted slots, R rows, V target vocabulary, D draft vocabulary, E hidden size, C clusters.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from data_prep.decoding.products import Product
from data_prep.target.frozen_head import FrozenHead
from train.drafter.config import DrafterConfig
from train.losses.chunked import chunked_loss
from train.losses.types import HeadInput, Heads, RowStatistics
from train.precision import fp8


class DraftHead(nn.Module):
    """The LM head: the target's frozen one, some rows of it, or a trained one of the same shape.

    `d2t` [D] holds *offsets*, as EAGLE-3's servers read them: draft token i is target token i + d2t[i].
    """

    def __init__(self, config: DrafterConfig, weight: nn.Parameter | None = None):
        """`weight`: an LM head that is there already. It says the target's first tokens if it has fewer rows, and the rows that
        it has beyond the target's vocabulary say nothing."""
        super().__init__()
        a = config.architecture
        size = config.draft_vocab or a.vocab_size if weight is None else len(weight)
        if size < a.vocab_size:
            self.register_buffer("d2t", torch.zeros(size, dtype=torch.long))
        self.weight = nn.Parameter(torch.zeros(size, config.output_size)) if config.own_head else weight
        self.clusters = Clusters(config) if config.centroids else None
        self._uses_fp8 = False
        self._narrow: fp8.Frozen | None = None

    @property
    def kept_D(self) -> Tensor | None:
        """Target ids of the draft vocabulary; None: all."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t if hasattr(self, "d2t") else None

    @torch.no_grad()
    def start(self, head: FrozenHead, counts_V: Tensor | None) -> None:
        """Keep the tokens of the highest counts (ties: the smaller id), ascending. An own head starts as the target's."""
        if hasattr(self, "d2t"):
            kept_D = (-counts_V).argsort(stable=True)[: len(self.d2t)].sort().values
            self.d2t.copy_(kept_D - torch.arange(len(kept_D)))
        if self.weight is not None:
            self.weight.copy_(self._rows(head))

    def _rows(self, head: FrozenHead) -> Tensor:
        return head.head_VE if self.kept_D is None else head.head_VE[self.kept_D]

    def use_fp8(self) -> None:
        """A frozen head's products in fp8, while it trains. One that learns is not changed."""
        self._uses_fp8 = self.weight is None

    def heads(self, head: FrozenHead, reads: str = "whole") -> Heads:
        """`reads`: what of the target's distribution is asked for (`losses.terms.Term`)."""
        draft_DE = self._rows(head) if self.weight is None else self.weight[: len(head.head_VE)]
        if self._uses_fp8 and self._narrow is None:
            # Not in `use_fp8`: a checkpoint that is loaded after it may bring another draft vocabulary.
            self._narrow = fp8.Frozen(draft_DE)
        narrow = self._narrow if self.training else None
        if reads == "nothing":
            return Heads(draft_DE, None, narrow=narrow)
        kept_D = self.kept_D
        if reads == "whole" or kept_D is None:
            return Heads(draft_DE, head.head_VE, kept_D, narrow, head.finish)
        # A target of the draft vocabulary's tokens alone: its softmax is p renormalised over them.
        return Heads(draft_DE, self._rows(head), None, narrow, partial(head.finish, kept_D=kept_D))

    def product(self, head: FrozenHead) -> Callable[[Tensor], Tensor]:
        """For decoding: what gives its logits, over a weight that is laid out if the target's is."""
        product = self._whole_product(head)
        return product if self.clusters is None else ClusteredProduct(product, self.clusters)

    def _whole_product(self, head: FrozenHead) -> Product:
        draft_DE = self.heads(head).draft_DE
        if draft_DE is head.head_VE:
            return head.product
        product = Product(draft_DE)
        if head.product.is_laid_out:
            product.lay_out()
        return product

    def labels(self, token_R: Tensor, vocabulary: int) -> Tensor:
        """Target tokens in the draft vocabulary; -1 for those outside it."""
        if self.kept_D is None:
            return token_R
        index_V = torch.full((vocabulary,), -1, device=token_R.device)
        index_V[self.kept_D] = torch.arange(len(self.d2t), device=token_R.device)
        return index_V[token_R]

    def forward(
        self,
        rows: HeadInput,
        head: FrozenHead,
        loss: dict[str, float],
        weight_R: Tensor,
        chunk: int,
        overlap_weight_R: Tensor | None = None,
        reads: str = "whole",
    ) -> tuple[Tensor, RowStatistics]:
        """`chunked_loss` with this head; `rows.label_R` are target tokens. `reads`: as in `heads`."""
        # This is the module's forward because ZeRO-3 gathers a module's weights by hooks around its forward.
        rows = rows._replace(label_R=self.labels(rows.label_R, len(head.head_VE)))
        return chunked_loss(rows, self.heads(head, reads), loss, weight_R, chunk, overlap_weight_R)

    def logits(self, output_RE: Tensor, head: FrozenHead, product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """float32 (or float64) logits over the target's vocabulary, [R, V]: -inf for what the drafter cannot say. `product`: this
        head's, where it was made once."""
        logits = (product or self.product(head))(output_RE)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return over_targets(logits, self.kept_D, len(head.head_VE), -torch.inf)


class Clusters(nn.Module):
    """Gemma 4's centroid head: equally many tokens in each cluster, cluster by cluster in `ordering` [V]. Training is over all
    tokens, and does not change it."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        vocabulary = config.architecture.vocab_size
        self.centroids = nn.Linear(config.output_size, config.centroids, bias=False)
        self.register_buffer("ordering", torch.arange(vocabulary))
        self.size = vocabulary // config.centroids
        self.chosen = config.centroid_top_k

    def hides(self, output_RE: Tensor, cluster_V: Tensor) -> Tensor:
        """Tokens outside of the likeliest clusters, bool [..., V]."""
        score_RC = self.centroids(output_RE)
        hidden_RC = torch.ones_like(score_RC, dtype=torch.bool)
        hidden_RC = hidden_RC.scatter(-1, score_RC.topk(self.chosen, dim=-1).indices, False)
        return hidden_RC[..., cluster_V]

    def cluster_of_token(self) -> Tensor:
        """[V]."""
        return self.ordering.argsort() // self.size


class ClusteredProduct:
    """Logits as vLLM 0.32 has them: none outside of the likeliest clusters. Here those of all tokens are computed, then hidden:
    it saves no time."""

    def __init__(self, product: Product, clusters: Clusters):
        self._product = product
        self._clusters = clusters
        self._cluster_V = clusters.cluster_of_token()

    def __call__(self, output_RE: Tensor) -> Tensor:
        return self._product(output_RE).masked_fill(self._clusters.hides(output_RE, self._cluster_V), -torch.inf)


def over_targets(values: Tensor, kept_D: Tensor | None, vocabulary: int, elsewhere: float) -> Tensor:
    """[..., D] -> [..., V]: `elsewhere` for tokens that the drafter cannot say. `kept_D`: None, where it can say all."""
    if kept_D is None:
        return values
    whole = values.new_full((*values.shape[:-1], vocabulary), elsewhere)
    return whole.index_copy_(-1, kept_D, values)


class SequentialHead(nn.Module):
    """Corrects each slot of a block by the token drafted before it, which a block filled at once cannot know.

    markov (DSpark): h_j + W_up W_down e(x_{j-1}). The bias that DSpark adds to the logits, factored through the target's own
    embedding and head instead of two tables of the vocabulary's size.
    gru (Domino): h_j + W_up s_j, s_j = GRU(s_{j-1}, W_down [h_j; e(x_{j-1})]).
    """

    def __init__(self, config: DrafterConfig):
        super().__init__()
        # Tokens are read at the draft layers' size; outputs are what the LM head reads.
        token = config.architecture.hidden_size
        output = config.state_size
        width = config.sequential_size
        self.gru = nn.GRUCell(width, width) if config.sequential == "gru" else None
        self.down = nn.Linear(output + token if self.gru else token, width, bias=False)
        self.up = nn.Linear(width, output, bias=False)

    def step(self, output_NE: Tensor, previous_NE: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(the corrected output [N, E], the state after it) of one slot."""
        if self.gru is None:
            return output_NE + self.up(self.down(previous_NE)), None
        state = self.gru(self.down(torch.cat([output_NE, previous_NE], dim=-1)), state)
        return output_NE + self.up(state), state
