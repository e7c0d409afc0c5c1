"""Two Triton kernels for a low-rank branch beside a matmul: what `low_rank_kernels` tries, and not in the package.

Both are limited by memory where the rank is small. The first reads the input once: a matmul by so few columns has too
few tiles to fill a GPU, so the columns of the input are shared out among more programs. The second reads and writes the
output once, and sums up what the programs of the first have left. Neither uses atomics: the same input gives the same
bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Partial(NamedTuple):
    """A setting of `partial_kernel`: a tile's rows and its columns of the input; about how many programs there are."""

    rows: int
    columns: int
    programs: int
    warps: int
    stages: int


class Add(NamedTuple):
    """A setting of `add_kernel`: a tile's rows and columns of the output; how many tiles a program does in a row."""

    rows: int
    columns: int
    tiles: int
    warps: int
    stages: int


PARTIALS = (
    Partial(64, 64, 512, 4, 4),
    Partial(64, 128, 512, 4, 3),
    Partial(64, 128, 264, 4, 4),
    Partial(64, 128, 1024, 4, 3),
    Partial(128, 64, 264, 4, 4),
    Partial(128, 64, 512, 8, 4),
    Partial(32, 128, 1024, 4, 4),
    Partial(32, 256, 512, 4, 3),
)
ADDS = (
    Add(64, 128, 1, 4, 1),
    Add(64, 128, 4, 4, 1),
    Add(64, 128, 4, 4, 2),
    Add(64, 256, 4, 8, 2),
    Add(32, 256, 4, 4, 2),
    Add(32, 128, 8, 4, 2),
    Add(128, 128, 4, 8, 2),
    Add(16, 256, 4, 4, 2),
)
"""For rank 16, each fits a GPU whose blocks have 99 KiB of shared memory, and one of compute capability 7.5."""

MOST_SPLITS = 16


def partial(x: torch.Tensor, down: torch.Tensor, setting: Partial) -> torch.Tensor:
    """The sums ``x @ down.T``, each over some of the columns: x (rows, in), contiguous, and down (R, in).

    Returns:
        fp32 (splits, rows, R padded to a power of two from 16 on), zero in the padding. Their sum is the product.
    """
    (rows, columns), ranks = x.shape, len(down)
    tiles = triton.cdiv(columns, setting.columns)
    splits = splits_of(rows, columns, setting)
    padded = max(16, triton.next_power_of_2(ranks))
    sums = torch.empty(splits, rows, padded, dtype=torch.float32, device=x.device)
    partial_kernel[triton.cdiv(rows, setting.rows), splits](
        x,
        down,
        sums,
        rows,
        columns,
        triton.cdiv(tiles, splits) * setting.columns,
        RANKS=ranks,
        PADDED=padded,
        ROWS=setting.rows,
        COLUMNS=setting.columns,
        num_warps=setting.warps,
        num_stages=setting.stages,
    )
    return sums


def splits_of(rows: int, columns: int, setting: Partial) -> int:
    """Among how many programs the columns of an input are shared out: a power of two, so that few kernels are made."""
    wanted = min(setting.programs // triton.cdiv(rows, setting.rows), triton.cdiv(columns, setting.columns))
    return 1 << min(max(wanted, 1), MOST_SPLITS).bit_length() - 1


def add(output: torch.Tensor, sums: torch.Tensor, up: torch.Tensor, scale: torch.Tensor, setting: Add) -> None:
    """``output += (sums.sum(0) * scale) @ up.T``: of `partial`, with up (out, R), contiguous, and scale fp32 (R,).

    ``output`` (rows, out) may be some columns of a wider one. The scaled sums are rounded to the dtype of ``up``, the
    product is added in fp32.
    """
    (rows, columns), (splits, _, padded) = output.shape, sums.shape
    grid = (triton.cdiv(columns, setting.columns * setting.tiles), triton.cdiv(rows, setting.rows))
    add_kernel[grid](
        sums,
        up,
        scale,
        output,
        rows,
        columns,
        output.stride(0),
        SPLITS=splits,
        RANKS=up.shape[1],
        PADDED=padded,
        ROWS=setting.rows,
        COLUMNS=setting.columns,
        TILES=setting.tiles,
        STAGES=setting.stages,
        num_warps=setting.warps,
    )


@triton.jit  # type: ignore[untyped-decorator]
def partial_kernel(  # type: ignore[no-untyped-def]  # Triton would look for the names of types
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
def add_kernel(  # type: ignore[no-untyped-def]
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
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """``output += (sums[0] + sums[1] + ...) * scale @ up.T`` for ROWS rows and TILES times COLUMNS columns."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, PADDED)
    parts = sums + (row % rows).to(tl.int64)[:, None] * PADDED + rank[None, :]
    hidden = tl.load(parts)
    for split in tl.static_range(1, SPLITS):
        hidden += tl.load(parts + tl.cast(rows, tl.int64) * PADDED * split)
    hidden *= tl.load(scale + rank, mask=rank < RANKS, other=0.0)[None, :]
    factors = hidden.to(up.dtype.element_ty)
    outputs = output + row.to(tl.int64)[:, None] * row_stride
    for tile in tl.range(TILES, num_stages=STAGES):
        column = (tl.program_id(0) * TILES + tile) * COLUMNS + tl.arange(0, COLUMNS)
        is_there = (row < rows)[:, None] & (column < columns)[None, :]
        before = tl.load(outputs + column[None, :], mask=is_there, other=0.0)
        is_factor = (column < columns)[None, :] & (rank < RANKS)[:, None]
        ups = tl.load(up + column[None, :] * RANKS + rank[:, None], mask=is_factor, other=0.0)
        after = before.to(tl.float32) + tl.dot(factors, ups)
        tl.store(outputs + column[None, :], after.to(output.dtype.element_ty), mask=is_there)
