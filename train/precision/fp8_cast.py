"""Scaling, casting and turning a matrix in one pass over it."""

import triton
import triton.language as tl

BLOCK = 64  # a tile of 64 x 64 numbers is turned in shared memory, so that both results are written in whole lines


@triton.jit(do_not_specialize=["rows"])  # else it is compiled anew for 1 and for a multiple of 16
def cast_kernel(
    # The matrix, its scale (on the GPU: the host need not wait for it), the results, sizes, the format's largest number.
    source, scale, out, turned, rows, columns, filled, most,
    PLAIN: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out` [rows, columns], `turned` [columns, filled]; beyond `rows` it is zero."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # rows x columns outgrow 32 bits
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    value = tl.load(source + r[:, None] * columns + c[None, :], mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    # Rounding may lift the largest entry above the format's, which casts to NaN or infinity.
    cast = tl.minimum(tl.maximum(value, -most), most).to(out.dtype.element_ty)
    if PLAIN:
        tl.store(out + r[:, None] * columns + c[None, :], cast, mask=inside)
    if TURNED:
        at = c.to(tl.int64)[:, None] * filled + r[None, :]
        tl.store(turned + at, tl.trans(cast), mask=(c < columns)[:, None] & (r < filled)[None, :])
