"""Whether a Triton kernel can be used on a device: only a trial tells.

Triton is not on every platform, and it needs a compiler. Where the trial fails, the log says once what happens instead.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..memory import is_out_of_memory

logger = logging.getLogger(__name__)

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
    logger.info("Triton cannot be used here (%s): %s", problem, consequence)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one: Triton launches there, wherever the tensors are."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device.type)
    # Nearly always it is the current one, and to ask takes the host a tenth of the time.
    return nullcontext() if module.current_device() == device.index else module.device(device)
