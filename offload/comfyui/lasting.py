"""Allocations on a device that outlive a forward.

ComfyUI 0.35 and later record the allocations of a forward, and give the same memory to the next forward. Memory that
outlives the forward must not be in the recording: it would be given away, or the recording would end.
"""

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def lasting_allocations() -> AbstractContextManager[None]:
    """A context in which no allocation is recorded. Where ComfyUI records none, it does nothing."""
    prefetch = _prefetch()
    if not hasattr(prefetch, "pause_malloc_graph"):
        return nullcontext()
    paused: AbstractContextManager[None] = prefetch.pause_malloc_graph(sync=True)
    return paused


@functools.cache  # to look for a module that is not there takes 0.3 ms, and a forward may come by here 76 times
def _prefetch() -> Any:
    """ComfyUI's module that records them; None in a version without it."""
    try:
        return importlib.import_module("comfy.model_prefetch")
    except ImportError:
        return None
