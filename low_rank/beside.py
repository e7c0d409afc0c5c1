"""A low-rank branch added to the output of a matmul by two Triton kernels.

For thousands of rows the branch costs the memory that it moves: it reads the input once, and reads and writes the
output once. These kernels come nearer to that than two matmuls of torch, and they do not round in between.

Where Triton does not work, torch multiplies (`LowRank.add_to`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..with_triton.launch import launch
from ..with_triton.trial import current, log_problem, problem_with

try:
    from .beside_kernel import down_kernel, up_kernel
except ImportError:  # if importing Triton fails in other ways, PyTorch's compiler does not load either
    down_kernel = up_kernel = None

MOST_RANKS = 64
"""Of all pieces together, padded: what `down_kernel` keeps in registers."""

_LEAST_ROWS = 256
"""With fewer, the host takes longer than the device."""

_DOWN_ROWS, _DOWN_COLUMNS, _DOWN_WARPS, _PROGRAMS, _MOST_SPLITS = 64, 64, 4, 264, 16
_UP_ROWS, _UP_COLUMNS, _UP_WARPS = 32, 256, 4
"""Tiles, and about how many programs share out the input. The best of eight settings each (H200, Flux at 1024x1024)."""


class Piece(NamedTuple):
    """What `add` adds to the columns of the output from ``start`` on: up (columns, R) and its first of all ranks."""

    start: int
    up: torch.Tensor
    first: int


def takes(output: torch.Tensor, input: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether `add` can be used with these tensors, on their device."""
    return (
        len(input) >= _LEAST_ROWS
        and len(down) <= MOST_RANKS
        and input.dtype == output.dtype == down.dtype
        and input.dtype in (torch.bfloat16, torch.float16)
        and input.is_contiguous()
        and output.stride(1) == 1
        and not torch.is_grad_enabled()
        and works_on(input.device, input.dtype)
    )


def add(
    output: torch.Tensor, input: torch.Tensor, down: torch.Tensor, scale: torch.Tensor, pieces: Sequence[Piece]
) -> None:
    """``output[:, columns] += (input @ down.T * scale)[:, ranks] @ up.T`` for each of ``pieces``.

    Args:
        output: (rows, out), bf16 or fp16, like input (rows, in), down (R, in), and what ``pieces`` have.
        scale: fp32, (R,).

    The scaled product with ``down`` is rounded to that dtype, the rest is summed in fp32 and rounded once.
    """
    rows, columns = input.shape
    ranks = len(down)
    width = padded(ranks)
    tiles = -(-columns // _DOWN_COLUMNS)
    row_tiles = -(-rows // _DOWN_ROWS)
    splits = _power_of_2_up_to(min(max(1, _PROGRAMS // row_tiles), tiles, _MOST_SPLITS))
    sums = torch.empty(splits * rows * width, dtype=torch.float32, device=input.device)
    sizes = (rows, columns, -(-tiles // splits) * _DOWN_COLUMNS, ranks, width, _DOWN_ROWS, _DOWN_COLUMNS)
    with current(input.device):
        options = {"num_warps": _DOWN_WARPS, "num_stages": 4}
        launch(down_kernel, (row_tiles, splits, 1), (input, down, sums), sizes, input.dtype, **options)
        for start, up, first in pieces:
            own_columns, own_ranks = up.shape
            to = output[:, start : start + own_columns]
            of_piece = (rows, own_columns, output.stride(0), first, width, splits, own_ranks, padded(own_ranks))
            grid = (-(-own_columns // _UP_COLUMNS), -(-rows // _UP_ROWS), 1)
            numbers = (*of_piece, _UP_ROWS, _UP_COLUMNS)
            launch(up_kernel, grid, (sums, up, scale, to), numbers, input.dtype, num_warps=_UP_WARPS)


def padded(ranks: int) -> int:
    """Ranks as a matmul of a tile has them: a power of two, from 16 on."""
    return max(16, 1 << (ranks - 1).bit_length())


def _power_of_2_up_to(most: int) -> int:
    return 1 << most.bit_length() - 1


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add` can be used. It is tried with small factors, which compiles the kernels.

    Raises:
        RuntimeError: there is too little memory to try; another time there may be enough.
    """
    problem = problem_on(device, dtype)
    if problem is not None and device.type != "cpu":
        log_problem(problem, "LoRA beside quantised matmuls takes a few percent longer")
    return problem is None


def problem_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `add` cannot be used, or None. Raises as `works_on`."""
    return problem_with(down_kernel, _trial, device, dtype)


def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """The problem with the kernels' values, or None: two pieces of different ranks, and tiles that are not full."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(device)

    rows, columns = _UP_ROWS + 8, 2 * _DOWN_COLUMNS + 16
    input, down, scale = random(rows, columns).to(dtype), random(24, columns).to(dtype) / columns, random(24)
    pieces = [Piece(0, random(_UP_COLUMNS, 16).to(dtype), 0), Piece(_UP_COLUMNS, random(24, 8).to(dtype), 16)]
    before = random(rows, _UP_COLUMNS + 24).to(dtype)
    output, expected = before.clone(), before.float()
    add(output, input, down, scale, pieces)
    hidden = input.float() @ down.float().t() * scale
    for start, up, first in pieces:
        ranks = slice(first, first + up.shape[1])
        expected[:, start : start + len(up)] += hidden[:, ranks] @ up.float().t()
    if not torch.allclose(output.float(), expected, rtol=2**-6, atol=2**-6):
        return "its kernels give other values"
    return None
