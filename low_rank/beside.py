"""A low-rank branch added to the output of a matmul by two Triton kernels.

For thousands of rows the branch costs the memory that it moves: it reads the input once, and reads and writes the
output once. These kernels come nearer to that than two matmuls of torch, and they do not round in between.

Where Triton does not work, torch multiplies (`LowRank.add_to`).
"""

import functools

import torch

from ..with_triton.launch import launch
from ..with_triton.trial import current, log_problem, problem_with

try:
    from .beside_kernel import down_kernel, up_kernel
except ImportError:  # if importing Triton fails in other ways, PyTorch's compiler does not load either
    down_kernel = up_kernel = None

MOST_RANKS = 16
"""More were not measured. Both kernels compute with so many, however few there are."""

_LEAST_ROWS = 256
"""With fewer, the host takes longer than the device."""

_DOWN_ROWS, _DOWN_COLUMNS, _DOWN_WARPS, _PROGRAMS, _MOST_SPLITS = 64, 64, 4, 264, 16
_UP_ROWS, _UP_COLUMNS, _UP_WARPS = 32, 256, 4
"""Tiles, and about how many programs share out the input. The best of eight settings each (H200, Flux at 1024x1024)."""


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


def add(output: torch.Tensor, input: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: torch.Tensor) -> None:
    """``output += (input @ down.T * scale) @ up.T``.

    Args:
        output: (rows, out), bf16 or fp16; columns of a wider one, perhaps.
        input: (rows, in), contiguous, in the same dtype, like down (R, in) and up (out, R).
        scale: fp32, (R,).

    The scaled product with ``down`` is rounded to that dtype, the rest is summed in fp32 and rounded once.
    """
    (rows, columns), (out, ranks) = input.shape, up.shape
    tiles = -(-columns // _DOWN_COLUMNS)
    row_tiles = -(-rows // _DOWN_ROWS)
    splits = _power_of_2_up_to(min(max(1, _PROGRAMS // row_tiles), tiles, _MOST_SPLITS))
    sums = torch.empty(splits * rows * MOST_RANKS, dtype=torch.float32, device=input.device)
    of_each = -(-tiles // splits) * _DOWN_COLUMNS
    down_numbers = (rows, columns, of_each, ranks, MOST_RANKS, _DOWN_ROWS, _DOWN_COLUMNS)
    up_numbers = (rows, out, output.stride(0), splits, ranks, MOST_RANKS, _UP_ROWS, _UP_COLUMNS)
    up_grid = (-(-out // _UP_COLUMNS), -(-rows // _UP_ROWS), 1)
    with current(input.device):
        options = {"num_warps": _DOWN_WARPS, "num_stages": 4}
        launch(down_kernel, (row_tiles, splits, 1), (input, down, sums), down_numbers, input.dtype, **options)
        launch(up_kernel, up_grid, (sums, up, scale, output), up_numbers, input.dtype, num_warps=_UP_WARPS)


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
    """The problem with the kernels' values, or None: with the most ranks and fewer, and tiles that are not full."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(device)

    rows, columns, out = _UP_ROWS + 8, 2 * _DOWN_COLUMNS + 16, _UP_COLUMNS + 24
    input, before = random(rows, columns).to(dtype), random(rows, out).to(dtype)
    for ranks in (MOST_RANKS, MOST_RANKS - 4):
        down, up, scale = random(ranks, columns).to(dtype) / columns, random(out, ranks).to(dtype), random(ranks)
        output = before.clone()
        add(output, input, down, up, scale)
        expected = before.float() + (input.float() @ down.float().t() * scale) @ up.float().t()
        if not torch.allclose(output.float(), expected, rtol=2**-6, atol=2**-6):
            return "its kernels give other values"
    return None
