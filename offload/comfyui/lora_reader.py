"""LoRA files in which half of a pair is missing: the log names the layer, and the others work.

ComfyUI's reader skips a lone ``lora_down``, but raises KeyError on a lone ``lora_up``, before any model is asked.
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
    """From now on ComfyUI's reader skips a lone ``lora_up``, too. Files that it could read give the same as before."""
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
            if not missing.startswith(layer) or missing in file:
                raise
            logger.warning("LoRA: the file lacks %s, so the layer that it is for stays unchanged", missing)
            return None
        return adapter

    setattr(load_or_leave, _MARK, True)
    LoRAAdapter.load = classmethod(load_or_leave)
