"""A draft layer: attention over the target's states and the drafter's own rows, then a gated MLP.

Shapes: Q rows, P memory positions, E hidden size, I input size of the attention (E, or 2E for EAGLE-3's pairs),
H query heads, G key/value heads, D head size, R pairs of dimensions that are rotated.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.target.architecture import KVLayer
from train.attention.backend import AttentionBackend
from train.attention.visibility import Visibility
from train.drafter.config import DrafterConfig
from train.precision import fp8


class KV(NamedTuple):
    """Rotated keys and values, [P, G, D] each."""

    key: Tensor
    value: Tensor

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    def __add__(self, other: "KV | Steps") -> "KV":
        return KV(torch.cat([self.key, other.key]), torch.cat([self.value, other.value]))


class Steps(tuple[KV, ...]):
    """The draft rows' own keys and values, step by step of ttt; of a block there is one step."""

    @property
    def key(self) -> Tensor:
        return torch.cat([kv.key for kv in self])

    @property
    def value(self) -> Tensor:
        return torch.cat([kv.value for kv in self])

    def after(self, memory: KV, apart: bool) -> KV:
        """What the rows read: memory, then themselves. `apart`: as tuples, for a backend that needs no long tensor (of which
        every step would keep its own)."""
        return KV(*zip(memory, *self)) if apart else memory + self


class Rope:
    """Rotary angles of some positions [P], or [P, heads], in the layout of halves (not interleaved pairs).

    Args:
        inv_freq: angles per position [R]. Of a larger head the first 2 R dimensions are rotated, the others pass as they are.
        scale: what cos and sin are multiplied by.
    """

    def __init__(self, position: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype):
        position = position if position.dim() == 2 else position[:, None]
        # In float32: bf16 has 8 bits of mantissa, and positions beyond 256 would be rounded. Only cos and sin are.
        angles = position[..., None].float() * inv_freq.to(position.device)
        angles = torch.cat([angles, angles], dim=-1)
        self.cos = (angles.cos() * scale).to(dtype)
        self.sin = (angles.sin() * scale).to(dtype)

    def __call__(self, x_PHD: Tensor) -> Tensor:
        turned = self.cos.shape[-1]
        if turned < x_PHD.shape[-1]:
            return torch.cat([self._turn(x_PHD[..., :turned]), x_PHD[..., turned:]], dim=-1)
        return self._turn(x_PHD)

    def _turn(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-right, left], dim=-1) * self.sin


class Blocks(NamedTuple):
    """What blocks read whose undrafted slots are all alike: [N + 1, I], the N anchors' rows and one for all others."""

    x_CI: Tensor
    slots: int

    def product(self, linear: nn.Linear, name: str) -> Tensor:
        return self.spread(linear(self.x_CI))

    def spread(self, t_CI: Tensor) -> Tensor:
        """[N + 1, I] -> [N x S, I]."""
        anchors = len(t_CI) - 1
        return torch.cat([t_CI[:-1, None], t_CI[-1:, None].expand(anchors, self.slots - 1, -1)], dim=1).flatten(0, 1)


class Pairs(NamedTuple):
    """What rows of pairs read whose token's half of each product is there already. `made`: by the projection's name, that half
    [Q, O] and the other half's weight [O, E]."""

    x_QE: Tensor
    made: dict[str, tuple[Tensor, Tensor]]

    def product(self, linear: nn.Linear, name: str) -> Tensor:
        half_QO, weight_OE = self.made[name]
        return torch.addmm(half_QO, self.x_QE, weight_OE.T)


Inputs = Tensor | Blocks | Pairs
TokenHalves = dict[str, dict[str, tuple[Tensor, Tensor]]]  # `Pairs.made` of each branch


def product(linear: nn.Linear, x: Inputs, name: str) -> Tensor:
    """What a projection gives of the rows [Q, O], without making twice what many rows share."""
    return linear(x) if isinstance(x, Tensor) else x.product(linear, name)


def gathered_late(weight: nn.Parameter) -> bool:
    """Whether ZeRO-3 has it in parts, and gathers it around its module's forward alone: then no other code may use it."""
    return hasattr(weight, "ds_id")


def _normed_half(x: Inputs, size: int) -> Tensor:
    """The normed stream [Q, E] of what pairs read: [token; normed feature] side by side, or that half alone."""
    if isinstance(x, Pairs):
        return x.x_QE
    return x[..., size:] if isinstance(x, Tensor) else x.spread(x.x_CI[..., size:])


class Attention(nn.Module):
    """Projections of one branch; the backend that joins them is chosen at run time.

    Args:
        shape: what the keys and values are like that its memory holds.
    """

    k: nn.Linear | None  # None: the rows have queries alone
    v: nn.Linear | None

    def __init__(self, config: DrafterConfig, inputs: int, shape: KVLayer, copies: int = 1):
        super().__init__()
        a = config.architecture
        # As many query heads as the architecture has, or so many more that each key head has equally many.
        heads = -(-a.heads // shape.kv_heads) * shape.kv_heads
        queries = copies * heads * shape.head_dim
        keys = copies * shape.kv_heads * shape.head_dim
        self.heads = (-1, shape.head_dim)
        self.q = nn.Linear(inputs, queries, bias=a.qkv_bias)
        self.k = nn.Linear(inputs, keys, bias=a.qkv_bias) if config.own_kv else None
        self.v = nn.Linear(inputs, keys, bias=a.qkv_bias) if config.own_kv else None
        self.o = nn.Linear(queries, a.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=a.norm_eps) if config.normed else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=a.norm_eps) if config.normed and config.own_kv else nn.Identity()

    def keys_values(self, x_PI: Inputs, rope: Rope) -> KV:
        k_PGD, v_PGD = (product(linear, x_PI, name).unflatten(-1, self.heads) for linear, name in ((self.k, "k"), (self.v, "v")))
        return KV(rope(self.k_norm(k_PGD)), v_PGD)

    def queries(self, x_QI: Inputs, rope: Rope) -> Tensor:
        """Rotated, [Q, H, D]."""
        return rope(self.q_norm(product(self.q, x_QI, "q").unflatten(-1, self.heads)))

    def halves(self, token_PE: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Of pairs, the tokens' half of each product, and the weight of the other half (`Pairs.made`)."""
        found = {}
        for name in ("q", "k", "v"):
            linear = getattr(self, name)
            if linear is not None:
                token_OE, other_OE = linear.weight.chunk(2, dim=1)
                found[name] = F.linear(token_PE, token_OE, linear.bias), other_OE
        return found

    def forward(self, x_QI: Inputs, rope: Rope, keys: KV, visibility: Visibility, *, attend: AttentionBackend) -> Tensor:
        """[Q, E]: the rows' queries over `keys` (memory, then draft rows)."""
        return self.o(attend(self.queries(x_QI, rope), keys.key, keys.value, visibility).flatten(1))


class GatedDelta(nn.Module):
    """h = n + g * W_delta(o - n), g = sigmoid(W_g [n; o; o - n] + b): KVShot's fusion of the two branches, where n
    attends hidden memory and o the target's KV. g starts at 0.5.

    Two ways to keep the gate from closing before W_delta has learnt: `floor`, g = floor + (1 - floor) sigmoid(...), and `held`,
    g = 0.5 (or the floor, if higher) while training says so. `held` is saved: a drafter decodes with the gate that it had.
    """

    def __init__(self, hidden_size: int, floor: float):
        super().__init__()
        self.gate = nn.Linear(3 * hidden_size, hidden_size)
        self.delta = nn.Linear(hidden_size, hidden_size, bias=False)
        self.floor = floor
        # A buffer, and asked by `torch.where` and not by `if`: the host need not wait for it, and a CUDA graph can hold it.
        self.register_buffer("held", torch.tensor(False))

    def openness(self, n_QE: Tensor, o_QE: Tensor) -> Tensor:
        """g, [Q, E]."""
        if gathered_late(self.gate.weight):
            opened = self.gate(torch.cat([n_QE, o_QE, o_QE - n_QE], dim=-1))
        else:
            # W_g [n; o; o - n] = (W_n - W_d) n + (W_o + W_d) o: a product of two thirds.
            n_EE, o_EE, d_EE = self.gate.weight.chunk(3, dim=1)
            opened = torch.addmm(F.linear(n_QE, n_EE - d_EE, self.gate.bias), o_QE, (o_EE + d_EE).T)
        g = self.floor + (1 - self.floor) * torch.sigmoid(opened)
        return torch.where(self.held, max(0.5, self.floor), g)

    def forward(self, n_QE: Tensor, o_QE: Tensor) -> Tensor:
        return n_QE + self.openness(n_QE, o_QE) * self.delta(o_QE - n_QE)


class DraftLayer(nn.Module):
    """Layer `index` of a drafter. `branches` holds an attention for each kind of memory: "tokens", "hidden", "kv", or the last
    two (hybrid)."""

    attention = Attention
    activation = staticmethod(F.silu)

    def __init__(self, config: DrafterConfig, index: int):
        super().__init__()
        a = config.architecture
        # An assistant joins token and feature before its first layer, not in it.
        self.pairs = index == 0 and config.reads_pairs and not config.is_assistant
        self.normed_residual = self.pairs and config.norm_before_residual
        inputs = a.hidden_size * (2 if self.pairs else 1)
        names = config.branches
        self.branches = nn.ModuleDict(
            {n: self.attention(config, inputs, config.shape(index, n), config.head_copies if n == "kv" else 1) for n in names}
        )
        self.fuse = GatedDelta(a.hidden_size, config.gate_floor) if len(names) == 2 else None
        self.input_norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        self.token_norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps) if self.pairs else None
        self.post_norm = nn.RMSNorm(a.hidden_size, eps=a.norm_eps)
        self.gate = nn.Linear(a.hidden_size, a.intermediate_size, bias=False)
        self.up = nn.Linear(a.hidden_size, a.intermediate_size, bias=False)
        self.down = nn.Linear(a.intermediate_size, a.hidden_size, bias=False)

    def halves(self, token_PE: Tensor) -> TokenHalves:
        """What of the pairs' products depends on the tokens alone."""
        normed_PE = self.token_norm(token_PE)
        return {name: branch.halves(normed_PE) for name, branch in self.branches.items()}

    def inputs(self, x_QE: Tensor, token: Tensor | TokenHalves) -> dict[str, Inputs]:
        """What the attention of each branch reads, [Q, I]: the normed stream; for EAGLE-3's pairs the token's embedding before
        it, or what was made of that already."""
        normed = self.input_norm(x_QE)
        if self.pairs and isinstance(token, dict):
            return {name: Pairs(normed, made) for name, made in token.items()}
        normed = torch.cat([self.token_norm(token), normed], dim=-1) if self.pairs else normed
        return dict.fromkeys(self.branches, normed)

    def keys_values(self, inputs: dict[str, Inputs], ropes: dict[str, Rope]) -> dict[str, KV]:
        """The rows' own keys and values, for each branch whose rows have any."""
        having = {name: branch for name, branch in self.branches.items() if branch.k is not None}
        return {name: branch.keys_values(inputs[name], ropes[name]) for name, branch in having.items()}

    def queries(self, inputs: dict[str, Inputs], ropes: dict[str, Rope]) -> dict[str, Tensor]:
        """Rotated, [Q, H, D] of each branch."""
        return {name: branch.queries(inputs[name], ropes[name]) for name, branch in self.branches.items()}

    def forward(
        self,
        x_QE: Tensor,
        inputs: dict[str, Inputs],
        ropes: dict[str, Rope],
        keys: dict[str, KV],
        visibility: dict[str, Visibility],
        attend: AttentionBackend,
    ) -> Tensor:
        """The residual stream after the layer, [Q, E]."""
        if self.normed_residual:
            x_QE = _normed_half(next(iter(inputs.values())), x_QE.shape[-1])
        out = [
            branch(inputs[name], ropes[name], keys[name], visibility[name], attend=attend)
            for name, branch in self.branches.items()
        ]
        return self.after(x_QE, self.fuse(*out) if self.fuse else out[0])

    def after(self, x_QE: Tensor, attended_QE: Tensor) -> Tensor:
        """The residual stream after the layer, [Q, E]."""
        x_QE = x_QE + attended_QE
        return x_QE + self.feed(self.post_norm(x_QE))

    def feed(self, normed_QE: Tensor) -> Tensor:
        """The gated MLP, [Q, E]."""
        return self.down(self.activation(self.gate(normed_QE)) * self.up(normed_QE))

    def use_fp8(self) -> None:
        """The products of the MLP in fp8."""
        for name in ("gate", "up", "down"):
            setattr(self, name, fp8.Linear.of(getattr(self, name)))

    def compile_parts(self) -> None:
        """Compile all but the attention, whose backends are kernels already: what stands between matrix products becomes one
        kernel each, for any number of rows. The parts have no graph breaks; a break would raise."""
        parts = [(self, "inputs"), (self, "after"), *[(self.fuse, "forward")] * (self.fuse is not None)]
        parts += [(branch, name) for branch in self.branches.values() for name in ("queries", "keys_values")]
        for module, name in parts:
            setattr(module, name, torch.compile(getattr(module, name), dynamic=True, fullgraph=True))
