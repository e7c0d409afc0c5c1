"""LoRA files in which half of a pair is missing: the log names the layer, and the others work.

ComfyUI's reader skips a lone ``lora_down``, but raises KeyError on a lone ``lora_up``. It is the same reader for all
models: it is replaced only while there are streamed ones, and for others it still does what it did.
"""

import functools
import logging
import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

import comfy.model_patcher
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import nn

logger = logging.getLogger(__name__)

_MARK = "leaves_out_half_pairs"

_FRAMES = 12
"""How far up from the reader the function is that applies the LoRA to a model, at most."""

_streamed: set[int] = set()
"""The ids of the streamed models."""


def leave_out_half_pairs(model: nn.Module) -> None:
    """For LoRAs that are read for streamed models, as long as ``model``, which is one, is there."""
    _streamed.add(id(model))
    weakref.finalize(model, _stop_without_models, id(model))
    load = getattr(LoRAAdapter.load, "__func__", None)
    if load is None or hasattr(load, _MARK):
        return  # somebody has replaced it; or this is done, perhaps by another copy of this package

    @functools.wraps(load)
    def load_or_leave(
        cls: type[LoRAAdapter], layer: str, file: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> LoRAAdapter | None:
        try:
            adapter: LoRAAdapter | None = load(cls, layer, file, *args, **kwargs)
        except KeyError as error:
            missing = str(error.args[0]) if error.args else ""
            if not missing.startswith(layer) or missing in file or not _is_for_streamed(sys._getframe(1)):
                raise
            logger.warning("LoRA: the file lacks %s, so the layer that it is for stays unchanged", missing)
            return None
        return adapter

    setattr(load_or_leave, _MARK, LoRAAdapter.__dict__["load"])
    LoRAAdapter.load = classmethod(load_or_leave)


def _stop_without_models(gone: int) -> None:
    """Give ComfyUI its reader back when the last streamed model is ``gone``; not where somebody has wrapped ours."""
    _streamed.discard(gone)
    load = getattr(LoRAAdapter.load, "__func__", None)
    before = vars(load).get(_MARK) if load is not None else None
    if before is not None and not _streamed:
        LoRAAdapter.load = before


def _is_for_streamed(frame: FrameType | None) -> bool:
    """Whether one of the functions that are running applies a LoRA to a streamed model."""
    for _ in range(_FRAMES):
        if frame is None:
            return False
        patchers = [value for value in frame.f_locals.values() if isinstance(value, comfy.model_patcher.ModelPatcher)]
        if any(hasattr(patcher.model, "streaming") for patcher in patchers):
            return True
        frame = frame.f_back
    return False
