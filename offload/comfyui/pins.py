"""How much host memory this package may pin, and its share in ComfyUI's counter of pinned bytes."""

import threading

import comfy.model_management
from comfy.cli_args import args as comfy_args

from ...memory import GIB
from .. import pinning
from ..pinnable import Shortfall
from ..pinning import pinned_by_all
from ..ram import ram_bytes

_counted_bytes = 0
_is_news = False
"""Whether pins have changed since they were counted."""

_counting = threading.Lock()
"""Held while ComfyUI's counter and ours change. Memory is let go on any thread, and by the garbage collector in the
middle of a count: who only tells of a change does not wait for it."""


def _count_pins() -> None:
    """Add what this package has pinned to ComfyUI's counter, so that ComfyUI's limit is for both.

    If somebody else is counting, on this thread or another, they count once more.
    """
    global _is_news
    _is_news = True
    while _is_news and _counting.acquire(blocking=False):
        try:
            _is_news = False
            _count()
        finally:
            _counting.release()


def _count() -> None:
    global _counted_bytes
    now = pinned_by_all()
    _pinned_by_comfyui()
    if hasattr(comfy.model_management, "TOTAL_PINNED_MEMORY"):
        comfy.model_management.TOTAL_PINNED_MEMORY += now - _counted_bytes
    _counted_bytes = now


def _pinned_by_comfyui() -> int:
    """ComfyUI's own pinned bytes. Restores this package's share of its counter if ComfyUI has reset that.

    ComfyUI sets the counter to 0 when the last of its own pins goes (0.3.68 to 0.18, ``unpin_memory``). It may have
    pinned more since then, which ``PINNED_MEMORY`` tells.
    """
    management = comfy.model_management
    total = getattr(management, "TOTAL_PINNED_MEMORY", _counted_bytes)
    if total < _counted_bytes + sum(getattr(management, "PINNED_MEMORY", {}).values()):
        total += _counted_bytes
        management.TOTAL_PINNED_MEMORY = total
    return total - _counted_bytes


pinning.pins_changed = _count_pins


def pin_limit(wanted_bytes: int) -> tuple[int, Shortfall]:
    """How many bytes this package may pin, and why no more: a share of the RAM, less what ComfyUI has pinned.

    ``wanted_bytes`` are to be pinned in addition. Newer ComfyUIs unpin idle models to make room for them.
    """
    if getattr(comfy_args, "disable_pinned_memory", False):
        return 0, Shortfall("--disable-pinned-memory forbids it", "Start ComfyUI without it for full speed.")
    management = comfy.model_management
    if wanted_bytes and hasattr(management, "ensure_pin_registerable"):
        management.ensure_pin_registerable(wanted_bytes, evict_active=False)
    share = 0.45 if management.WINDOWS else 0.9
    limit = ram_bytes() * share
    comfy_limit = getattr(management, "MAX_PINNED_MEMORY", limit)
    if comfy_limit > 0:  # else ComfyUI itself pins nothing (0.3.68), or nothing for this device
        limit = min(limit, comfy_limit)
    with _counting:
        by_comfyui = _pinned_by_comfyui()
    if _is_news:  # of a change meanwhile
        _count_pins()
    reason = f"ComfyUI and this package may pin {limit / GIB:.1f} GiB of the RAM together"
    return max(0, int(limit - by_comfyui)), Shortfall(reason, "Unload other models, or add RAM.")
