"""The Triton kernel of `patched_weight`."""

import triton
import triton.language as tl


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
    index = (start + row)[:, None] * row_bytes + byte[None, :]
    codes = tl.load(packed + index)
    factor = tl.load(absmax + index // BLOCK_BYTES)
    high = tl.load(code + (codes >> 4).to(tl.int32)) * factor
    low = tl.load(code + (codes & 15).to(tl.int32)) * factor

    columns = 2 * row_bytes
    column = tl.program_id(0) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    rank = tl.arange(0, MOST)
    is_rank = rank < RANKS
    scales = tl.load(scale + rank, mask=is_rank, other=0.0)
    ups = tl.load(up + row[:, None] * RANKS + rank[None, :], mask=is_rank[None, :], other=0.0)
    downs = tl.load(down + rank[:, None] * columns + column[None, :], mask=is_rank[:, None], other=0.0)
    delta = tl.dot((ups.to(tl.float32) * scales[None, :]).to(ups.dtype), downs)

    # Round first: otherwise the compiler converts the weight, not the product, to the other layout, in three shuffles.
    weight = tl.reshape(tl.join(high, low), (ROWS, 2 * BYTES)) + delta.to(downs.dtype).to(tl.float32)
    tl.store(out + (start + row)[:, None] * columns + column[None, :], weight.to(out.dtype.element_ty))
