"""The two Triton kernels of `beside`.

Both are limited by memory where the rank is small. The first reads the input once: a matmul by so few columns has too
few tiles to fill a GPU, so the columns of the input are shared out among more programs. The second reads and writes the
output once, and sums up what the programs of the first have left. Neither uses atomics: the same input gives the same
bits.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def down_kernel(  # type: ignore[no-untyped-def]  # Triton would look for the names of types
    x,
    down,
    sums,
    rows,
    columns,
    of_each,
    RANKS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """``sums[split] = x[:, part] @ down[:, part].T`` for ROWS rows; ``of_each`` columns are a split's part."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, PADDED)
    # A tile's rows beyond the last are read from others, and not stored.
    xs = x + (row % rows).to(tl.int64)[:, None] * columns
    downs = down + rank[None, :] * columns
    first = tl.program_id(1) * of_each
    product = tl.full((ROWS, PADDED), 0.0, tl.float32)
    for start in range(first, first + of_each, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_there = column < columns
        left = tl.load(xs + column[None, :], mask=is_there[None, :], other=0.0)
        right = tl.load(downs + column[:, None], mask=is_there[:, None] & (rank < RANKS)[None, :], other=0.0)
        product = tl.dot(left, right, product)
    to = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * PADDED + rank[None, :]
    tl.store(sums + to, product, mask=(row < rows)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def up_kernel(  # type: ignore[no-untyped-def]
    sums,
    up,
    scale,
    output,
    rows,
    columns,
    row_stride,
    SPLITS: tl.constexpr,
    RANKS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """``output += (sums[0] + sums[1] + ...) * scale @ up.T`` for ROWS rows and COLUMNS columns."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, PADDED)
    is_rank = rank < RANKS
    # The output first: it arrives while the factors are multiplied.
    is_there = (row < rows)[:, None] & (column < columns)[None, :]
    to = output + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    before = tl.load(to, mask=is_there, other=0.0)
    is_factor = (column < columns)[None, :] & is_rank[:, None]
    ups = tl.load(up + column[None, :] * RANKS + rank[:, None], mask=is_factor, other=0.0)

    split = tl.arange(0, SPLITS).to(tl.int64) * rows
    # Of all splits at once: one after the other, each would be brought to the layout of the matmul by itself.
    parts = sums + (split[:, None, None] + (row % rows)[None, :, None]) * PADDED + rank[None, None, :]
    hidden = tl.sum(tl.load(parts), 0) * tl.load(scale + rank, mask=is_rank, other=0.0)[None, :]
    after = before.to(tl.float32) + tl.dot(hidden.to(up.dtype.element_ty), ups)
    tl.store(to, after.to(output.dtype.element_ty), mask=is_there)
