"""A 4-bit weight expanded with low-rank patches in it, by one Triton kernel.

Beside a matmul with thousands of rows, a low-rank product costs the memory that it moves: it reads the input, and
writes and reads the output. If it is added to the weight while the weight is expanded, it moves only its factors. The
output is as close to exact arithmetic; the change that the LoRA makes is less exact than beside the matmul, because it
is rounded together with the weight.

Triton does not work everywhere: it is not on every platform, and it needs a compiler. Then `works_on` says so once, and
the product stays beside the matmul.
"""

import functools
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...low_rank.branch import Patch
from ...memory import is_out_of_memory
from ..checkpoint.quant_state import QuantState
from .kernels import code_table, dequantise_by_table

try:
    from .patched_weight_kernel import kernel
except ImportError:  # if importing Triton fails in other ways, PyTorch's compiler does not load either
    kernel = None

logger = logging.getLogger(__name__)

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
    with _current(packed.device):
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


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one: Triton launches there, wherever the tensors are."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device.type).device(device)


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `expand` can be used. A small weight is tried, which compiles the kernel.

    Raises:
        RuntimeError: there is too little memory to try; another time there may be enough.
    """
    problem = _problem(device, dtype)
    if problem is not None:
        logger.info("LoRA: it takes a few percent longer, because Triton cannot be used here (%s)", problem)
    return problem is None


def _problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if kernel is None:
        return "it is not installed"
    if device.type == "cpu":
        return "it is for GPUs"
    try:
        return _trial(device, dtype)
    except Exception as error:  # a missing compiler, an old driver, a new GPU: they raise anything
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"


def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """The problem with the kernel's values, or None. One patch has the largest rank that it takes, one a smaller."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(device)

    rows, columns = shape = 4 * _ROWS, 4 * _BYTES
    packed, absmax = (256 * random(rows * columns // 2)).to(torch.uint8), random(rows * columns // 64)
    weight = (packed, absmax, QuantState("nf4", 64, shape))
    for strength in (0.0, 0.5):
        patches = [
            Patch(start, random(rows // 2, rank).to(dtype), random(rank, columns).to(dtype), strength * random(rank))
            for start, rank in ((0, MAX_RANK), (rows // 2, MAX_RANK - 4))
        ]
        expected = dequantise_by_table(*weight, torch.float32)
        for start, up, down, scale in patches:
            expected[start : start + len(up)] += (up.float() * scale) @ down.float()
        if not torch.allclose(expand(*weight, dtype, patches).float(), expected, rtol=2**-6, atol=2**-6):
            return "its kernel gives other values"
    return None
