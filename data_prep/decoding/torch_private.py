"""Everything of PyTorch that reading and decoding use and that PyTorch does not promise to keep.

`PRIVATE` says what breaks without a name; `missing` which of them this PyTorch lacks. Training's kernels have their own.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PRIVATE = {
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "attention over caches on a CPU: this kernel hands out the "
    "log-sum-exp, by which parts over different keys are merged",
    "torch.ops.mkldnn._reorder_linear_weight": "weights laid out for oneDNN: decoding on a CPU is slower, results are the same",
    "torch.ops.mkldnn._linear_pointwise": "the product with a weight that was laid out (as above)",
    "torch.nn.Module._compiled_call_impl": "prompts of any length beside layers that are compiled for a few rows (`uncompiled`)",
    "torch._dynamo.config.recompile_limit": "decoding on a GPU: more widths than the usual limit run uncompiled, slowly",
    "torch._dynamo.config.skip_nnmodule_hook_guards": "decoding on a GPU: a compiled layer would not notice a new `capture`",
}
LAYOUT = ("torch.ops.mkldnn._reorder_linear_weight", "torch.ops.mkldnn._linear_pointwise")


def missing(names: Iterable[str] = tuple(PRIVATE)) -> list[str]:
    """Those of `names` that this PyTorch does not have."""
    return [name for name in names if not _exists(name)]


def _exists(name: str) -> bool:
    place = torch
    for part in name.split(".")[1:]:
        try:
            place = getattr(place, part)
        except (AttributeError, RuntimeError):
            return False
    return True


def attention_with_lse(
    q_BHTD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [B, H, T, D], log-sum-exp of the scores [B, H, T]) on a CPU. The kernel behind
    `scaled_dot_product_attention`, which does not hand out the second. `mask` is added to the scores; `scale`: None is
    D ** -0.5."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHTD, k_BGLD, v_BGLD, is_causal=causal, attn_mask=mask, scale=scale
    )


def has_layouts() -> bool:
    """Whether weights can be laid out for oneDNN here."""
    return torch.backends.mkldnn.is_available() and not missing(LAYOUT)


def lay_out(weight_NK: Tensor, rows: int) -> Tensor:
    """A copy of a weight in the layout that oneDNN chooses for products of `rows` rows; it serves any number."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), rows)


def laid_out_product(x: Tensor, laid_out: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W' + b. The last arguments of the operator are an activation that could follow, and here none does."""
    return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias_N, "none", [], "")


def compile_for_widths(layers: Iterable[nn.Module]) -> None:
    """Compile each layer for every number of rows anew; all layers of one kind share what was compiled."""
    torch._dynamo.config.recompile_limit = 64  # one entry a width and a dtype; the usual limit is 8
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # `Target.capture` may hook other layers later
    for layer in layers:
        layer.compile(dynamic=False)


@contextmanager
def uncompiled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Layers without what `compile` put in their call, for inputs of any length, each of which would be compiled."""
    # `compile()` of a module leaves its compiled call in this attribute, and the module's call goes there whenever it is set.
    compiled: list[tuple[nn.Module, Callable | None]] = [(layer, layer._compiled_call_impl) for layer in layers]
    try:
        for layer, _ in compiled:
            layer._compiled_call_impl = None
        yield
    finally:
        for layer, call in compiled:
            layer._compiled_call_impl = call
