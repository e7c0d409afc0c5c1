"""A 4-bit weight expanded by one Triton kernel, nested absmax with it.

bitsandbytes 0.50 is limited by its instructions where memory is fast: of what an H200 can copy in the same time it
moves little more than half. This kernel needs a third of the instructions. It gives the same bits.

Where Triton does not work, bitsandbytes expands (see `kernels`).
"""

import functools
from collections.abc import Sequence
from typing import cast

import torch

from ...with_triton.launch import launch
from ...with_triton.trial import current, log_problem, problem_with
from ..checkpoint.quant_state import (
    CODES,
    NESTED_BLOCKSIZE,
    NESTED_MAP,
    NestedAbsmax,
    NestedTables,
    QuantState,
    QuantType,
)
from . import by_table
from .triton_trial import BLOCKSIZE, RandomNumbers

try:
    from .expanded_weight_kernel import kernel
except ImportError:  # if importing Triton fails in other ways, PyTorch's compiler does not load either
    kernel = None

_WORDS, _WARPS = 256, 4
"""What one program expands, in words of eight codes, and with how many warps. The best of five settings on an H200."""

_CODES_OF_A_WORD = 8

DTYPES = (torch.bfloat16, torch.float16)


def takes(state: QuantState, dtype: torch.dtype) -> bool:
    """Whether the kernel can expand such a weight to ``dtype``."""
    whole = state.numel % _CODES_OF_A_WORD == 0 and state.numel < 2**31
    return whole and dtype in DTYPES


def takes_nested(nested: Sequence[NestedAbsmax]) -> bool:
    """Whether the kernel can expand nested absmax: it is of one part, in the blocks that bitsandbytes writes."""
    return len(nested) == 1 and nested[0].blocksize == NESTED_BLOCKSIZE


def expand(
    packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, dtype: torch.dtype, tables: NestedTables | None
) -> torch.Tensor:
    """As `kernels.dequantise`, for what is taken."""
    if torch.compiler.is_compiling():
        dense: torch.Tensor = torch.ops.flux_nf4.expand_weight(
            packed, absmax, tables or (), state.quant_type, state.blocksize, state.shape, dtype
        )
        return dense
    return _launch(packed, absmax, tables, state, dtype)


def _launch(
    packed: torch.Tensor, absmax: torch.Tensor, tables: NestedTables | None, state: QuantState, dtype: torch.dtype
) -> torch.Tensor:
    if packed.data_ptr() % 4:  # words are read
        packed = packed.clone()
    dense = torch.empty(state.shape, dtype=dtype, device=packed.device)
    words = state.numel // _CODES_OF_A_WORD
    numbers = (words, state.blocksize // _CODES_OF_A_WORD, int(tables is not None), NESTED_BLOCKSIZE, _WORDS)
    code = by_table.code_table(state.quant_type, packed.device)
    nested = (code, code, code) if tables is None else tables
    grid = (-(-words // _WORDS), 1, 1)
    with current(packed.device):
        # Fused to one operation, the product and the sum of nested absmax would be rounded once. They are, as all say
        # that expand them, rounded twice.
        fusion = {"num_warps": _WARPS, "enable_fp_fusion": False}
        launch(kernel, grid, (packed, absmax, *nested, code, dense), numbers, dtype, **fusion)
    return dense


@torch.library.custom_op("flux_nf4::expand_weight", mutates_args=())
def _expand_weight(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    tables: Sequence[torch.Tensor],
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """`_launch` for compiled code: one operator, in which the compiler sees neither launches nor tables."""
    state = QuantState(cast(QuantType, quant_type), blocksize, cast(tuple[int, int], tuple(shape)))
    return _launch(packed, absmax, NestedTables(*tables) if tables else None, state, dtype)


@_expand_weight.register_fake
def _(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    tables: Sequence[torch.Tensor],
    quant_type: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return packed.new_empty(shape, dtype=dtype)


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `expand` can be used. Small weights are tried, which compiles the kernel.

    Raises:
        RuntimeError: there is too little memory to try; another time there may be enough.
    """
    problem = problem_on(device, dtype)
    if problem is not None and device.type != "cpu":
        log_problem(problem, "4-bit weights take a little longer to expand")
    return problem is None


def problem_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `expand` cannot be used, or None. Raises as `works_on`."""
    return problem_with(kernel, _trial, device, dtype)


def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """The problem with the kernel's values, or None: for each code, with absmax as it is and nested."""
    random = RandomNumbers(device)
    shape = (40, _WORDS)  # more than one program, and the last has less than the others; so has the last nested block
    packed, absmax = random.weight(*shape)
    codes = (NESTED_MAP * random.uniform(len(absmax))).to(torch.uint8)
    nested = NestedAbsmax(len(codes), NESTED_BLOCKSIZE)
    tables = NestedTables(random.uniform(nested.blocks), random.uniform(NESTED_MAP), random.uniform(1))
    expanded = by_table.map_blockwise(codes, tables, NESTED_BLOCKSIZE) + tables.offset
    for quant_type in CODES:
        state = QuantState(quant_type, BLOCKSIZE, shape)
        for factors, own, plain in ((absmax, None, absmax), (codes, tables, expanded)):
            found, expected = (
                expand(packed, factors, state, dtype, own),
                by_table.dequantise(packed, plain, state, dtype),
            )
            if not torch.equal(found, expected):
                return "its kernel gives other values"
    return None
