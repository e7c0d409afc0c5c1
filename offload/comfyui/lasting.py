"""Device memory that outlives a forward, for ComfyUI's compiler (0.35 and later), which records what forwards allocate.

An allocation of ours within such a recording would be given away again by its next replay, or end it.
"""

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def lasting_allocations() -> AbstractContextManager[None]:
    """Within it no allocation is recorded; where ComfyUI records none, it does nothing."""
    try:
        prefetch: Any = importlib.import_module("comfy.model_prefetch")
    except ImportError:
        return nullcontext()
    if not hasattr(prefetch, "pause_malloc_graph"):
        return nullcontext()
    paused: AbstractContextManager[None] = prefetch.pause_malloc_graph(sync=True)
    return paused
