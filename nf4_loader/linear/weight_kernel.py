"""What the Triton kernels of `patched_weight` and `int8_weight` both do with a tile of a weight."""

import triton
import triton.language as tl


@triton.jit
def expand(  # type: ignore[no-untyped-def]  # Triton would look for the names of types
    packed, absmax, code, index, BLOCK_BYTES, ROWS, BYTES
):
    """Dequantise the packed bytes at ``index`` (ROWS, BYTES): fp32, (ROWS, 2 * BYTES).

    ``code`` has the sixteen values; BLOCK_BYTES packed bytes share one absmax.
    """
    codes = tl.load(packed + index)
    factor = tl.load(absmax + index // BLOCK_BYTES)
    high = tl.load(code + (codes >> 4).to(tl.int32)) * factor
    low = tl.load(code + (codes & 15).to(tl.int32)) * factor
    return tl.reshape(tl.join(high, low), (ROWS, 2 * BYTES))


@triton.jit
def multiply_factors(  # type: ignore[no-untyped-def]
    up, down, scale, row, column, columns, RANKS, MOST
):
    """``(up * scale) @ down`` at ``row`` and ``column``, in fp32. The scaled ``up`` is rounded to the factors' dtype.

    ``row`` counts the rows of ``up``; a row of ``down`` has ``columns``. RANKS are at most MOST.
    """
    rank = tl.arange(0, MOST)
    is_rank = rank < RANKS
    scales = tl.load(scale + rank, mask=is_rank, other=0.0)
    ups = tl.load(up + row[:, None] * RANKS + rank[None, :], mask=is_rank[None, :], other=0.0)
    downs = tl.load(down + rank[:, None] * columns + column[None, :], mask=is_rank[:, None], other=0.0)
    return tl.dot((ups.to(tl.float32) * scales[None, :]).to(downs.dtype), downs)
