"""Whether a Triton kernel can be used on a device: only a trial tells.

Triton is not on every platform, and it needs a compiler. Where the trial fails, the log says once what happens instead.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...low_rank.branch import Patch
from ...memory import is_out_of_memory
from ..checkpoint.quant_state import QuantState
from . import by_table

logger = logging.getLogger(__name__)

BLOCKSIZE = 64
"""Of the weights that are tried."""

Trial = Callable[[torch.device, torch.dtype], str | None]
"""Runs a kernel on a small weight. Returns what is wrong with the result, or None."""


def problem_with(kernel: object | None, trial: Trial, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot be used on a device, or None. The trial compiles it.

    Args:
        kernel: None if importing it failed.

    Raises:
        RuntimeError: there is too little memory to try; another time there may be enough.
    """
    if kernel is None:
        return "it is not installed"
    if device.type == "cpu":
        return "it is for GPUs"
    try:
        return trial(device, dtype)
    except Exception as error:  # a missing compiler, an old driver, a new GPU: they raise anything
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"


def log_problem(problem: str, consequence: str) -> None:
    logger.info("NF4: %s, because Triton cannot be used here (%s)", consequence, problem)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one: Triton launches there, wherever the tensors are."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device.type)
    # Nearly always it is the current one, and to ask takes the host a tenth of the time.
    return nullcontext() if module.current_device() == device.index else module.device(device)


class RandomNumbers:
    """The arguments of a trial, the same each time. The device's own generator is left alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def uniform(self, *shape: int) -> torch.Tensor:
        """From 0 to 1, in fp32."""
        return torch.rand(shape, generator=self._generator, device="cpu").to(self._device)

    def weight(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``packed`` and ``absmax`` as in `kernels.dequantise`, in blocks of BLOCKSIZE."""
        packed = (256 * self.uniform(rows * columns // 2)).to(torch.uint8)
        return packed, self.uniform(rows * columns // BLOCKSIZE)

    def patch(self, start: int, rows: int, columns: int, rank: int, dtype: torch.dtype) -> Patch:
        up, down = self.uniform(rows, rank).to(dtype), self.uniform(rank, columns).to(dtype)
        return Patch(start, up, down, self.uniform(rank))


def patched_by_table(
    packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, patches: Iterable[Patch]
) -> torch.Tensor:
    """The weight with ``patches`` in it, (out, in) in fp32, in plain torch: what a kernel's result is compared with."""
    weight = by_table.dequantise(packed, absmax, state, torch.float32)
    for start, up, down, scale in patches:
        weight[start : start + len(up)] += (up.float() * scale) @ down.float()
    return weight
