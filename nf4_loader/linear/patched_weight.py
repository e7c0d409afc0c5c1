"""A 4-bit weight expanded with low-rank patches in it, by one Triton kernel.

Beside a matmul with thousands of rows, a low-rank product costs the memory that it moves: it reads the input, and
writes and reads the output. If it is added to the weight while the weight is expanded, it moves only its factors. The
output is as close to exact arithmetic; the change that the LoRA makes is less exact than beside the matmul, because it
is rounded together with the weight.

Where Triton does not work, the product stays beside the matmul.
"""

import functools
from collections.abc import Iterable

import torch

from ...low_rank.branch import Patch
from ...with_triton.trial import current, log_problem, problem_with
from ..checkpoint.quant_state import QuantState
from .by_table import code_table
from .triton_trial import BLOCKSIZE, RandomNumbers, patched_by_table

try:
    from .patched_weight_kernel import kernel
except ImportError:  # if importing Triton fails in other ways, PyTorch's compiler does not load either
    kernel = None

MAX_RANK = 16
"""With a rank of 32 it takes as long as the product beside the matmul, with more it takes longer (on an H100)."""

_ROWS, _BYTES, _WARPS = 16, 32, 4
"""What one program expands: rows, and packed bytes of each. The best of ten settings on an H100."""


def takes(shape: tuple[int, int], dtype: torch.dtype, rows: Iterable[int], ranks: Iterable[int]) -> bool:
    """Whether the kernel can expand a weight of ``shape`` to ``dtype`` with patches of these rows and ranks."""
    whole = shape[1] % (2 * _BYTES) == 0 and all(count % _ROWS == 0 for count in rows)
    return whole and max(ranks) <= MAX_RANK and dtype in (torch.bfloat16, torch.float16)


def expand(
    packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, dtype: torch.dtype, patches: Iterable[Patch]
) -> torch.Tensor:
    """Dequantise a 4-bit weight (arguments as in `kernels.dequantise`) and add ``patches``, which cover every row once.

    Returns:
        A fresh tensor of the logical shape and ``dtype`` on the device of ``packed``: weight + product, summed in fp32
        and rounded once. The product is accumulated in fp32, then rounded to ``dtype`` before the sum; so are the
        scaled factors.
    """
    assert kernel is not None
    columns = state.shape[1]
    weight = torch.empty(state.shape, dtype=dtype, device=packed.device)
    code = code_table(state.quant_type, packed.device)
    with current(packed.device):
        for start, up, down, scale in patches:
            rows, ranks = up.shape
            kernel[columns // 2 // _BYTES, rows // _ROWS](
                packed,
                absmax,
                code,
                up,
                down,
                scale,
                weight,
                start,
                columns // 2,
                RANKS=ranks,
                BLOCK_BYTES=state.blocksize // 2,
                ROWS=_ROWS,
                BYTES=_BYTES,
                MOST=MAX_RANK,
                num_warps=_WARPS,
            )
    return weight


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `expand` can be used. A small weight is tried, which compiles the kernel.

    Raises:
        RuntimeError: there is too little memory to try; another time there may be enough.
    """
    problem = problem_on(device, dtype)
    if problem is not None:
        log_problem(problem, "LoRA takes a few percent longer")
    return problem is None


def problem_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `expand` cannot be used, or None. Raises as `works_on`."""
    return problem_with(kernel, _trial, device, dtype)


def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """The problem with the kernel's values, or None. One patch has the largest rank that it takes, one a smaller."""
    random = RandomNumbers(device)
    rows, columns = shape = 4 * _ROWS, 4 * _BYTES
    weight = (*random.weight(rows, columns), QuantState("nf4", BLOCKSIZE, shape))
    whole = random.patch(0, rows // 2, columns, MAX_RANK, dtype)
    smaller = random.patch(rows // 2, rows // 2, columns, MAX_RANK - 4, dtype)
    for strength in (0.0, 0.5):
        patches = [patch._replace(scale=strength * patch.scale) for patch in (whole, smaller)]
        found, expected = expand(*weight, dtype, patches), patched_by_table(*weight, patches)
        if not torch.allclose(found.float(), expected, rtol=2**-6, atol=2**-6):
            return "its kernel gives other values"
    return None
