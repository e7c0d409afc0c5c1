"""LoRA files with a pair of which one half is missing: that layer is left out and named, the others work.

ComfyUI's reader leaves out a lower half on its own; at an upper one on its own it raises, before any model is asked.
"""

import functools
import logging
from typing import Any

from comfy.weight_adapter import LoRAAdapter

logger = logging.getLogger(__name__)


def leave_out_half_pairs() -> None:
    """From now on; where ComfyUI's reader raised nothing, nothing changes."""
    load = LoRAAdapter.load.__func__
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_or_leave(cls: type[LoRAAdapter], *args: Any, **kwargs: Any) -> LoRAAdapter | None:
        try:
            adapter: LoRAAdapter | None = load(cls, *args, **kwargs)
        except KeyError as missing:
            logger.warning("LoRA: the file lacks %s: the layer that it is for stays as it is", missing.args[0])
            return None
        return adapter

    LoRAAdapter.load = classmethod(load_or_leave)
