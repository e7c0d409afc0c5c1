"""The Triton kernels of `int8_weight`.

The rotation is comfy-kitchen's (ConvRot, arXiv 2512.03673): each group of 256 columns is multiplied with the regular
Hadamard matrix H4 (x) H4 (x) H4 (x) H4 / 16. Here that is two products with H16 = H4 (x) H4 / 4, of 16 columns each.
"""

import triton
import triton.language as tl

from .weight_kernel import expand, multiply_factors


@triton.jit
def _rotated(  # type: ignore[no-untyped-def]  # Triton would look for the names of types
    packed, absmax, code, hadamard, up, down, scale, start, tile, group, RANKS, GROUPS, BLOCK_BYTES, ROWS, MOST
):
    """Columns of group ``group`` in ROWS rows, with ``(up * scale) @ down`` added, rotated: fp32, (ROWS, 256)."""
    row = start + tile * ROWS + tl.arange(0, ROWS)
    byte = group * 128 + tl.arange(0, 128)
    index = row[:, None] * (GROUPS * 128) + byte[None, :]
    weight = expand(packed, absmax, code, index, BLOCK_BYTES, ROWS, 128)

    i = tl.arange(0, 16)
    h = tl.load(hadamard + i[:, None] * 16 + i[None, :])
    if RANKS > 0:
        column = group * 256 + tl.arange(0, 256)
        weight += multiply_factors(up, down, scale, row - start, column, GROUPS * 256, RANKS, MOST)

    turned = tl.dot(tl.reshape(weight.to(h.dtype), (ROWS * 16, 16)), h)
    turned = tl.permute(tl.reshape(turned, (ROWS, 16, 16)), (0, 2, 1))
    turned = tl.dot(tl.reshape(turned.to(h.dtype), (ROWS * 16, 16)), h)
    return tl.reshape(tl.permute(tl.reshape(turned, (ROWS, 16, 16)), (0, 2, 1)), (ROWS, 256))


@triton.jit(do_not_specialize=["start"])  # type: ignore[untyped-decorator]
def scales_kernel(  # type: ignore[no-untyped-def]
    packed,
    absmax,
    code,
    hadamard,
    up,
    down,
    scale,
    row_scale,
    start,
    RANKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """A 127th of the largest magnitude of each of ROWS rotated rows into ``row_scale``, where that is 0.

    The arguments are as in `rows_kernel`."""
    tile = tl.program_id(0)
    if tl.load(row_scale + start + tile * ROWS) > 0:
        return  # as one program has written them all
    most = tl.full((ROWS,), 1e-28, tl.float32)
    for group in range(GROUPS):
        turned = _rotated(
            packed, absmax, code, hadamard, up, down, scale, start, tile, group, RANKS, GROUPS, BLOCK_BYTES, ROWS, MOST
        )
        most = tl.maximum(most, tl.max(tl.abs(turned), 1))
    tl.store(row_scale + start + tile * ROWS + tl.arange(0, ROWS), most / 127.0)


@triton.jit(do_not_specialize=["start"])  # type: ignore[untyped-decorator]
def rows_kernel(  # type: ignore[no-untyped-def]
    packed,
    absmax,
    code,
    hadamard,
    up,
    down,
    scale,
    row_scale,
    out,
    start,
    RANKS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """256 columns of ROWS rotated rows from ``start`` on, divided by ``row_scale`` and rounded, into ``out`` (int8).

    The tensors are as in `int8_weight.write_int8_rows`; ``code`` are the sixteen values, ``hadamard`` is H16, in the
    dtype to rotate in. A row has GROUPS groups; BLOCK_BYTES packed bytes share one absmax. RANKS are at most MOST;
    without any there are no ``up``, ``down`` and ``scale``.
    """
    group, tile = tl.program_id(0), tl.program_id(1)
    turned = _rotated(
        packed, absmax, code, hadamard, up, down, scale, start, tile, group, RANKS, GROUPS, BLOCK_BYTES, ROWS, MOST
    )
    row = start + tile * ROWS + tl.arange(0, ROWS)
    # Near 1.5 * 2**23 floats are whole numbers: the sum is rounded, and its lowest byte is the int8. That takes two
    # instructions in place of seven. The scale keeps the number within 127.
    turned = turned * (1.0 / tl.load(row_scale + row))[:, None] + 12582912.0
    column = group * 256 + tl.arange(0, 256)
    tl.store(out + row[:, None] * (GROUPS * 256) + column[None, :], turned.to(tl.int32, bitcast=True).to(tl.int8))
