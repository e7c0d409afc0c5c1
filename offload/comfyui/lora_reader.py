"""LoRA files with a pair of which one half is missing: that layer is left out and named, the others work.

ComfyUI's reader leaves out a lower half on its own; at an upper one on its own it raises, before any model is asked.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter

logger = logging.getLogger(__name__)

_MARK = "leaves_out_half_pairs"


def leave_out_half_pairs() -> None:
    """From now on; where ComfyUI's reader raised nothing, nothing changes."""
    load = getattr(LoRAAdapter.load, "__func__", None)
    if load is None or hasattr(load, _MARK):
        return  # not as ComfyUI has it, or done, perhaps by another copy of this package

    @functools.wraps(load)
    def load_or_leave(
        cls: type[LoRAAdapter], layer: str, file: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> LoRAAdapter | None:
        try:
            adapter: LoRAAdapter | None = load(cls, layer, file, *args, **kwargs)
        except KeyError as error:
            missing = str(error.args[0]) if error.args else ""
            if not missing.startswith(layer) or missing in file:
                raise
            logger.warning("LoRA: the file lacks %s: the layer that it is for stays as it is", missing)
            return None
        return adapter

    setattr(load_or_leave, _MARK, True)
    LoRAAdapter.load = classmethod(load_or_leave)
