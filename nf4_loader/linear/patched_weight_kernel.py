"""The Triton kernel of `patched_weight`."""

import triton
import triton.language as tl

from .weight_kernel import expand, multiply_factors


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # Triton would look for the names of types
    packed,
    absmax,
    code,
    up,
    down,
    scale,
    out,
    start,
    row_bytes,
    RANKS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """Expand (ROWS, 2 * BYTES) of the weight ``out`` from row ``start`` on, and add ``(up * scale) @ down`` to it.

    The tensors are as in `patched_weight.expand`; ``code`` has the sixteen values. ``row_bytes`` is the number of
    packed bytes in a row, BLOCK_BYTES of those that share one absmax; RANKS is at most MOST.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    # Load the packed weight first: it arrives while the factors are multiplied.
    weight = expand(packed, absmax, code, (start + row)[:, None] * row_bytes + byte[None, :], BLOCK_BYTES, ROWS, BYTES)

    columns = 2 * row_bytes
    column = tl.program_id(0) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    delta = multiply_factors(up, down, scale, row, column, columns, RANKS, MOST)

    # Round first: otherwise the compiler converts the weight, not the product, to the other layout, in three shuffles.
    weight += delta.to(down.dtype.element_ty).to(tl.float32)
    tl.store(out + (start + row)[:, None] * columns + column[None, :], weight.to(out.dtype.element_ty))
