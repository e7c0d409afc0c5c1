"""A 4-bit weight to rotated int8 rows, what comfy-kitchen's int8 matmul takes, by two Triton kernels.

The way there through a dense weight and comfy-kitchen's own quantiser takes three times as long (measured on an H100)
and is the reference in the tests. In full each row is rotated (ConvRot: groups of 256 columns times a Hadamard matrix,
which spreads outliers), divided by its scale, a 127th of its largest magnitude, and rounded. Scales depend on the weight
alone and cost as much as the rest: who has the weight keeps them.

Where Triton does not work (it is not on every platform, and needs a compiler) `works_on` says so once.
"""

import functools
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...memory import is_out_of_memory
from ..checkpoint.quant_state import CODES, QuantType
from .kernels import code_table, dequantise_by_table
from .patched_weight import MAX_RANK, Patch

try:
    from .int8_weight_kernel import rows_kernel, scales_kernel
except ImportError:  # of Triton; where importing it fails in other ways, PyTorch's compiler does not load either
    rows_kernel = scales_kernel = None

logger = logging.getLogger(__name__)

GROUP = 256
"""Columns that are rotated together."""

ROWS = 16
"""What one program rotates, with `WARPS`. Measured best on an H100."""

WARPS = 2


def takes(shape: tuple[int, int]) -> bool:
    """Whether a weight of ``shape`` (out, in), or one of its parts, can be brought to int8 rows."""
    return shape[1] % GROUP == 0 and shape[0] % ROWS == 0 and shape[0] * shape[1] < 2**31


def takes_patches(rows: Sequence[int], ranks: Sequence[int]) -> bool:
    """Whether patches of so many rows and ranks can be added on the way."""
    return all(count % ROWS == 0 for count in rows) and max(ranks) <= MAX_RANK


def write_int8_rows(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    blocksize: int,
    quant_type: QuantType,
    dtype: torch.dtype,
    patches: Sequence[Patch],
    row_scale: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Write a 4-bit weight (arguments as in `kernels.dequantise`) with ``patches`` in it as int8 ``rows`` (out, in).

    Args:
        dtype: To rotate in, with fp32 sums: bf16 or fp16; that of the patches.
        patches: Low-rank ones that cover every row once, or none.
        row_scale: fp32, (out,). Zeros are replaced by the scales of these rows; what is there already is taken for
            them, so who changes the patches writes zeros. ``rows * row_scale[:, None]`` is the rotated weight.
    """
    assert rows_kernel is not None
    groups = shape[1] // GROUP
    code, hadamard = code_table(quant_type, packed.device), _hadamard(dtype, packed.device)
    nothing = Patch(0, rows, rows, row_scale)
    with _current(packed.device):
        for start, up, down, scale in patches or (nothing,):
            tiles = (up.shape[0] if patches else shape[0]) // ROWS
            sizes = {
                "GROUPS": groups,
                "RANKS": up.shape[1] if patches else 0,
                "BLOCK_BYTES": blocksize // 2,
                "ROWS": ROWS,
                "MOST": MAX_RANK,
                "num_warps": WARPS,
            }
            weight = (packed, absmax, code, hadamard, up, down, scale, row_scale)
            scales_kernel[(tiles,)](*weight, start, **sizes)
            rows_kernel[groups, tiles](*weight, rows, start, **sizes)


@functools.cache
def _hadamard(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """H16 = H4 (x) H4 / 4, (16, 16): twice in a row it turns 256 columns, comfy-kitchen's H256 = H16 (x) H16."""
    with torch.inference_mode(False):
        h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
        return (torch.kron(h4, h4) / 4).to(device, dtype)


def rotated(weight: torch.Tensor) -> torch.Tensor:
    """What the kernels rotate to, in plain torch: ``weight`` (out, in) in fp32."""
    h16 = _hadamard(torch.float32, weight.device)
    groups = weight.view(weight.shape[0], -1, 16, 16)
    return (h16 @ groups @ h16).view(weight.shape)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device.type).device(device)


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `write_int8_rows` can be used: tried with small weights, which compiles the kernels.

    Raises:
        RuntimeError: there is too little memory for that; another time there may be enough.
    """
    problem = _problem(device, dtype)
    if problem is not None:
        logger.info("int8: weights take longer to prepare, because Triton cannot be used here (%s)", problem)
    return problem is None


def _problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if rows_kernel is None:
        return "it is not installed"
    if device.type == "cpu":
        return "it is for GPUs"
    try:
        return _trial(device, dtype)
    except Exception as error:  # whatever a missing compiler, an old driver or a new GPU leads to
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"


def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """Each code, without a patch and with one."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(device)

    shape = count, columns = 2 * ROWS, 2 * GROUP
    packed, absmax = (256 * random(count * columns // 2)).to(torch.uint8), random(count * columns // 64)
    patch = Patch(0, random(count, MAX_RANK - 4).to(dtype), random(MAX_RANK - 4, columns).to(dtype), random(MAX_RANK - 4))
    for quant_type in CODES:
        dense = dequantise_by_table(packed, absmax, shape, 64, quant_type, torch.float32)
        for patches in ((), (patch,)):
            expected = rotated(sum(((p.up.float() * p.scale) @ p.down.float() for p in patches), start=dense))
            row_scale = torch.zeros(count, device=device)
            rows = torch.empty(shape, dtype=torch.int8, device=device)
            write_int8_rows(packed, absmax, shape, 64, quant_type, dtype, patches, row_scale, rows)
            off = (rows * row_scale[:, None] - expected).abs().amax(1)
            if not (off <= row_scale * 2).all():
                return "its kernels give other values"
    return None
