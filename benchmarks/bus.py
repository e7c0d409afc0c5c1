"""A slower bus, imitated: every host-to-device copy is followed, on its stream, by a copy of padding.

A copy of n bytes takes n / link on the real bus; with n * (link / wanted - 1) bytes of padding behind it, as long as n
bytes take at the wanted rate. Whoever copies through torch is slowed down alike, on whichever stream; compute is not.
Copies that do not go through torch's operators (ComfyUI's dynamic VRAM in places) are not seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timing import copy_gbps
from torch.utils._python_dispatch import TorchDispatchMode

_PADDING_BYTES = 64 << 20
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class PaddedCopies(TorchDispatchMode):
    """Follows every copy from the host to ``device`` by ``share`` times its bytes of padding."""

    def __init__(self, device: torch.device, share: float) -> None:
        super().__init__()
        is_cuda = device.type == "cuda"
        self.share = share
        self.padded_bytes = 0
        self._device = device
        self._source = torch.empty(_PADDING_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        self._target = torch.empty(_PADDING_BYTES, dtype=torch.uint8, device=device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            source = args[1] if func is _COPIES[0] else args[0]
            if result.device == self._device and source.device.type == "cpu" and source.numel() > 1:
                self._pad(source.nbytes)
        return result

    def _pad(self, nbytes: int) -> None:
        left = int(nbytes * self.share)
        self.padded_bytes += left
        while left > 0:
            size = min(left, _PADDING_BYTES)
            torch.ops.aten.copy_.default(self._target[:size], self._source[:size], True)
            left -= size


@contextmanager
def slow_bus(device: torch.device, gbps: float) -> Iterator[float]:
    """Make copies to ``device`` as slow as over a bus of ``gbps``; gives the rate that a pinned copy then shows.

    Raises:
        ValueError: the real bus is not faster than that.
    """
    if not gbps:
        yield 0.0
        return
    probe = torch.empty(_PADDING_BYTES, dtype=torch.uint8, pin_memory=True)
    link = copy_gbps(probe, device)
    if link <= gbps:
        raise ValueError(f"a bus of {gbps} GB/s cannot be imitated: the real one has {link:.1f} GB/s")
    with PaddedCopies(device, link / gbps - 1):
        yield copy_gbps(probe, device)
