"""Modules that keep their host memory while they are on a device: on the way back nothing is copied.

ComfyUI moves text encoders and VAE to the card and back for every prompt. Back means to allocate and fill as much RAM
as they had before: 1.2 to 2.9 s for a T5 in fp8 (4.9 GB), with an H100.
"""

import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn

SPARE_BYTES = 4 << 30
"""Host memory is kept only while so much is free beside it."""

Move = Callable[[torch.Tensor], torch.Tensor]

_classes: dict[type[nn.Module], type[nn.Module]] = {}
_keepers: "weakref.WeakSet[_KeepsHostMemory]" = weakref.WeakSet()


def keep_host_memory(model: nn.Module) -> None:
    """From now on the parameters and buffers of ``model`` return to the host memory that they came from.

    Only those that still are what was copied from there: a tensor that has taken the place of one goes its own way.
    What is written into one on the device is lost on the way back; ComfyUI's patchers write into copies, or undo it.
    """
    for module in model.modules():
        if module._parameters or module._buffers:
            module.__class__ = _keeping(type(module))
            assert isinstance(module, _KeepsHostMemory)
            _keepers.add(module)


def give_back_host_memory() -> None:
    """What is on a device now will be copied when it leaves; its host memory is free."""
    for module in _keepers:
        module._kept = {}


class _KeepsHostMemory(nn.Module):
    _kept: dict[str, tuple[torch.Tensor, int]] = {}  # noqa: RUF012  replaced, never changed
    """Of each tensor on a device: its host memory, and its address on the device."""

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        before = self._named()
        homes = {id(before[name]): host for name, host, _ in self._still_there()}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            host = homes.get(id(tensor))
            if host is not None:
                target = fn(tensor.new_empty(0))
                if (target.device, target.dtype) == (host.device, host.dtype):
                    return host
            return fn(tensor)

        hosts = {name: tensor.data for name, tensor in before.items() if tensor.is_cpu}
        super()._apply(move, recurse=False)
        self._kept = {name: (host, address) for name, host, address in self._still_there()} | self._left(hosts)
        return self

    def _still_there(self) -> list[tuple[str, torch.Tensor, int]]:
        named = self._named()
        return [
            (name, host, address)
            for name, (host, address) in self._kept.items()
            if name in named and not named[name].is_cpu and named[name].data_ptr() == address
        ]

    def _left(self, hosts: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, int]]:
        left = {}
        for name, tensor in self._named().items():
            host = hosts.get(name)
            if host is not None and not tensor.is_cpu and tensor.dtype == host.dtype:
                left[name] = host, tensor.data_ptr()
        return left if left and psutil.virtual_memory().available >= SPARE_BYTES else {}

    def _named(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers, but for tensors of classes of their own."""
        named = {**self._parameters, **self._buffers}
        return {
            name: tensor for name, tensor in named.items() if tensor is not None and type(tensor.data) is torch.Tensor
        }


def _keeping(kind: type[nn.Module]) -> type[nn.Module]:
    if issubclass(kind, _KeepsHostMemory):
        return kind
    if kind not in _classes:
        _classes[kind] = type(kind.__name__, (_KeepsHostMemory, kind), {})
    return _classes[kind]
