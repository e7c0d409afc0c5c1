"""A 4-bit weight as rotated int8 rows, which comfy-kitchen's int8 matmul takes, by two Triton kernels.

Each row is rotated (ConvRot: groups of 256 columns times a Hadamard matrix, which spreads outliers), divided by its
scale and rounded. The scale is a 127th of the row's largest magnitude. It depends on the weight alone and takes as long
to compute as all the rest, so it is computed once and kept.

Where Triton does not work, rows are made by comfy-kitchen's own quantiser from a dense weight, which takes three times
as long (measured on an H100).
"""

import functools
from collections.abc import Sequence
from typing import cast

import torch

from ...low_rank.branch import Patch
from ...with_triton.launch import launch
from ...with_triton.trial import current, log_problem, problem_with
from ..checkpoint.quant_state import CODES, QuantState, QuantType
from .by_table import code_table
from .kitchen import GROUP
from .patched_weight import MAX_RANK
from .triton_trial import BLOCKSIZE, RandomNumbers, patched_by_table

try:
    from .int8_weight_kernel import rows_kernel, scales_kernel
except ImportError:  # if importing Triton fails in other ways, PyTorch's compiler does not load either
    rows_kernel = scales_kernel = None

ROWS, WARPS = 16, 4
"""What one program rotates, and with how many warps. With 2, Triton 3.6 compiles the kernels without patches to other
values (seen on an H200)."""


def takes(shape: tuple[int, int]) -> bool:
    """Whether a weight of ``shape`` (out, in) can be brought to int8 rows."""
    return shape[1] % GROUP == 0 and shape[0] % ROWS == 0 and shape[0] * shape[1] < 2**31


def takes_patches(pieces: Sequence[tuple[int, int]]) -> bool:
    """Whether patches of these rows and ranks can be added to the weight on the way."""
    return all(rows % ROWS == 0 and rank <= MAX_RANK for rows, rank in pieces)


def write_int8_rows(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    state: QuantState,
    dtype: torch.dtype,
    patches: Sequence[Patch],
    row_scale: torch.Tensor,
    rows: torch.Tensor,
    *,
    scales_are_known: bool = False,
) -> None:
    """Write a 4-bit weight (arguments as in `kernels.dequantise`) with ``patches`` in it as int8 ``rows`` (out, in).

    Args:
        dtype: To rotate in, with fp32 sums: bf16 or fp16. Patches have it, too.
        patches: Low-rank ones that cover every row once, or none.
        row_scale: fp32, (out,). Zeros in it are replaced by the scales; what is not zero is taken for the scale, so
            whoever changes the patches writes zeros. ``rows * row_scale[:, None]`` is the rotated weight.
        scales_are_known: There are no zeros in ``row_scale``: it saves a launch. Compiled code does not look at it.
    """
    weight = (packed, absmax, row_scale, rows, state.quant_type, state.blocksize, dtype)
    if torch.compiler.is_compiling():
        columns = ([patch[i] for patch in patches] for i in range(4))
        torch.ops.flux_nf4.write_int8_rows(*weight, *columns)
    else:
        _launch(*weight, patches, scales_are_known)


def _launch(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    row_scale: torch.Tensor,
    rows: torch.Tensor,
    quant_type: QuantType,
    blocksize: int,
    dtype: torch.dtype,
    patches: Sequence[Patch],
    scales_are_known: bool,
) -> None:
    groups = rows.shape[1] // GROUP
    code, hadamard = code_table(quant_type, packed.device), _hadamard(dtype, packed.device)
    with current(packed.device):
        for start, up, down, scale in patches or (Patch(0, rows, rows, row_scale),):
            tiles, ranks = up.shape[0] // ROWS, up.shape[1] if patches else 0
            numbers = (start, ranks, groups, blocksize // 2, ROWS, MAX_RANK)
            weight = (packed, absmax, code, hadamard, up, down, scale, row_scale)
            if not scales_are_known:
                launch(scales_kernel, (tiles, 1, 1), weight, numbers, dtype, num_warps=WARPS)
            launch(rows_kernel, (groups, tiles, 1), (*weight, rows), numbers, dtype, num_warps=WARPS)


@torch.library.custom_op("flux_nf4::write_int8_rows", mutates_args=("row_scale", "rows"))
def _write_int8_rows(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    row_scale: torch.Tensor,
    rows: torch.Tensor,
    quant_type: str,
    blocksize: int,
    dtype: torch.dtype,
    starts: Sequence[int],
    ups: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
) -> None:
    """`_launch` for compiled code: one operator, in which the compiler sees neither launches nor tables."""
    patches = [Patch(*patch) for patch in zip(starts, ups, downs, scales, strict=True)]
    _launch(packed, absmax, row_scale, rows, cast(QuantType, quant_type), blocksize, dtype, patches, False)


@functools.cache
def _hadamard(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """H16 = H4 (x) H4 / 4, as (16, 16). comfy-kitchen's matrix of 256 is H16 (x) H16."""
    with torch.inference_mode(False):
        h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
        return (torch.kron(h4, h4) / 4).to(device, dtype)


def rotated(weight: torch.Tensor) -> torch.Tensor:
    """What the kernels rotate a weight to, in plain torch: fp32, (out, in)."""
    h16 = _hadamard(torch.float32, weight.device)
    return (h16 @ weight.view(weight.shape[0], -1, 16, 16) @ h16).view(weight.shape)


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `write_int8_rows` can be used. Small weights are tried, which compiles the kernels.

    Raises:
        RuntimeError: there is too little memory to try; another time there may be enough.
    """
    problem = problem_on(device, dtype)
    if problem is not None:
        log_problem(problem, "int8 weights take longer to prepare")
    return problem is None


def problem_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `write_int8_rows` cannot be used, or None. Raises as `works_on`."""
    return problem_with(rows_kernel, _trial, device, dtype)


def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """The problem with the kernels' values, or None: for each code, without a patch and with one."""
    random = RandomNumbers(device)
    count, columns = shape = 2 * ROWS, 2 * GROUP
    packed, absmax = random.weight(count, columns)
    patch = random.patch(0, count, columns, MAX_RANK - 4, dtype)
    for quant_type in CODES:
        weight = (packed, absmax, QuantState(quant_type, BLOCKSIZE, shape))
        for patches in ([], [patch]):
            row_scale = torch.zeros(count, device=device)
            rows = torch.empty(shape, dtype=torch.int8, device=device)
            write_int8_rows(*weight, dtype, patches, row_scale, rows)
            steps_off = (rows - rotated(patched_by_table(*weight, patches)) / row_scale[:, None]).abs().max()
            if not steps_off <= 2:
                return "its kernels give other values"
    return None
