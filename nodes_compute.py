"""How a model's 4-bit Linears multiply: the nodes' input for it, and what the log says about it after a sampling."""

import logging
from dataclasses import dataclass
from typing import get_args

import comfy.patcher_extension
import torch

from .memory import is_out_of_memory
from .nf4_loader.linear import int8_weight, kitchen, measured
from .nf4_loader.linear.int8 import Compute
from .nf4_loader.linear.linear4bit import Linear4bit
from .offload.comfyui.patcher import StreamedModelPatcher

logger = logging.getLogger(__name__)

EXACT: Compute = "exact"
COMPUTE = {
    "compute": (
        list(get_args(Compute)),
        {
            "default": EXACT,
            "tooltip": "For models in NF4 or FP4: exact computes bit for bit as bitsandbytes does. int8 where faster "
            "uses int8 tensor cores for the layers for which they were measured to be faster on this GPU. That changes "
            "the picture a little: it adds a relative error of 0.013 to each layer, beside the 0.09 of NF4 itself.",
        },
    )
}

_CLEANUP = comfy.patcher_extension.CallbacksMP.ON_CLEANUP

_ROWS_AT_1024 = 4096 + 512
"""Image and text tokens of Flux at 1024x1024."""


@dataclass(frozen=True)
class Int8Figures:
    """Measured on a device: int8 is faster for ``faster`` of ``measured`` kinds of layers.

    With int8 for these, all kinds together are ``times`` as fast as exact ones. ``is_used``: the model computes so.
    """

    is_used: bool
    faster: int
    measured: int
    times: float


def choose(patcher: StreamedModelPatcher, compute: str | None) -> StreamedModelPatcher:
    """Have ``patcher`` compute as ``compute`` says, and return it.

    None is for nodes that offer no choice: it is exact, and nothing is measured or logged.
    """
    patcher.compute = compute
    patcher.callbacks.get(_CLEANUP, {}).pop(__name__, None)
    if compute is not None:
        patcher.add_callback_with_key(_CLEANUP, __name__, _say)
    return patcher


def figures(patcher: StreamedModelPatcher) -> Int8Figures | None:
    """For the device of ``patcher``; None if nothing was measured there or int8 gains nothing."""
    own = [timing for case, timing in measured.timings.items() if case.device == patcher.load_device]
    faster = [timing for timing in own if timing.int8_is_faster]
    if not own or (not faster and patcher.compute in (None, EXACT)):
        return None
    exact_ms = sum(timing.exact_ms for timing in own)
    best_ms = sum(timing.int8_ms if timing.int8_is_faster else timing.exact_ms for timing in own)
    return Int8Figures(patcher.compute not in (None, EXACT), len(faster), len(own), exact_ms / best_ms)


_said: dict[torch.device, Int8Figures | None] = {}
"""The figures that the log told last, by device."""


def _say(patcher: StreamedModelPatcher) -> None:
    """At the end of a sampling: one line, if there is something new to say."""
    try:
        if patcher.compute == EXACT and patcher.load_device not in _said:
            _measure_largest(patcher)
        found = figures(patcher)
    except Exception:  # the picture is finished, and must not be lost because advice about it fails
        logger.exception("NF4: the gain of int8 could not be measured")
        found = None
    if _said.get(patcher.load_device) != found and found is not None:
        _log(found, patcher.load_device)
    _said[patcher.load_device] = found


def _log(found: Int8Figures, device: torch.device) -> None:
    if not found.is_used:
        logger.info(
            "NF4: int8 was measured to be %.1f times as fast for the largest layers on %s. To use it, set compute to "
            "'int8 where faster' in the node; the picture changes a little.",
            found.times,
            device,
        )
    elif found.faster:
        logger.info(
            "NF4: %d of %d measured kinds of layers compute in int8 on %s; together all of them are %.2f times as fast",
            found.faster,
            found.measured,
            device,
            found.times,
        )
    else:
        logger.info("NF4: int8 is faster for none of the layers on %s, so all of them compute exactly", device)


def _measure_largest(patcher: StreamedModelPatcher) -> None:
    """Time the largest 4-bit layer of the blocks in both ways, at 1024x1024, if int8 can be used at all."""
    device, dtype = patcher.load_device, patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    blocks = patcher.model.streaming.streamer.blocks
    shapes = {m.shape for block in blocks for m in block.module.modules() if isinstance(m, Linear4bit)}
    fitting = [shape for shape in shapes if shape[1] % kitchen.GROUP == 0]
    if not fitting or kitchen.problem_on(device, dtype) is not None:
        return
    shape = max(fitting, key=lambda shape: shape[0] * shape[1])
    try:
        by_kernel = int8_weight.takes(shape) and int8_weight.works_on(device, dtype)
        measured.timing_of(measured.Case(shape, _ROWS_AT_1024, dtype, device, by_kernel))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
