"""Modules that keep their host memory while they are on a device, so that moving them back copies nothing.

Where a GPU cannot hold all models, ComfyUI moves text encoders and VAE there and back for each prompt. Moving back
allocates RAM and fills it: 1.2 to 2.9 s for a T5 in fp8 (4.9 GB) on a machine with an H100.
"""

import weakref
from collections.abc import Callable, Sized
from typing import Any

import psutil
import torch
from torch import nn

from ..memory import GIB

SPARE_BYTES = 4 * GIB
"""Host memory is kept only if this much RAM is free beside it."""

Move = Callable[[torch.Tensor], torch.Tensor]
Kept = dict[str, tuple[torch.Tensor, "weakref.ref[torch.UntypedStorage]"]]

_classes: dict[type[nn.Module], type[nn.Module]] = {}
_keepers: "weakref.WeakSet[_KeepsHostMemory]" = weakref.WeakSet()


def keep_host_memory(model: nn.Module, written: Sized = ()) -> None:
    """From now on the parameters and buffers of ``model`` return to the host memory that they came from.

    This holds only for tensors that are still the copies made from there. A tensor that replaced one is moved as usual.
    While ``written`` is not empty, tensors may have been written to on the device, so all are copied. (It is ComfyUI's
    ``hook_backup``: hooks write in place, and part of a model can leave before they are undone.)
    """
    for module in model.modules():
        if module._parameters or module._buffers:
            module.__class__ = _keeping(type(module))
            assert isinstance(module, _KeepsHostMemory)
            module._written = written
            _keepers.add(module)


def give_back_host_memory() -> None:
    """Free the host memory of everything that is on a device now. It will be copied when it leaves the device."""
    for module in _keepers:
        module._kept = {}


class _KeepsHostMemory(nn.Module):
    _written: Sized
    _kept: Kept = {}  # noqa: RUF012  replaced, never changed
    """By the name of a tensor on a device: its host memory, and its memory on the device."""

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        before = self._named()
        homes = {} if self._written else {id(before[name]): host for name, (host, _) in self._still_there().items()}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            host = homes.get(id(tensor))
            if host is not None:
                target = fn(tensor.new_empty(0))
                if (target.device, target.dtype) == (host.device, host.dtype):
                    return host
            return fn(tensor)

        hosts = {name: tensor.data for name, tensor in before.items() if tensor.is_cpu}
        super()._apply(move, recurse=False)
        self._kept = self._still_there() | self._left(hosts)
        return self

    def _still_there(self) -> Kept:
        named = self._named()
        return {
            name: (host, memory)
            for name, (host, memory) in self._kept.items()
            if name in named and _is_in(memory(), named[name]) and _layout(named[name]) == _layout(host)
        }

    def _left(self, hosts: dict[str, torch.Tensor]) -> Kept:
        left = {}
        for name, tensor in self._named().items():
            host, memory = hosts.get(name), _memory(tensor)
            if host is not None and memory is not None and _layout(tensor) == _layout(host):
                left[name] = host, weakref.ref(memory)
        return left if left and psutil.virtual_memory().available >= SPARE_BYTES else {}

    def _named(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers, except those of tensor subclasses."""
        named = {**self._parameters, **self._buffers}
        return {
            name: tensor for name, tensor in named.items() if tensor is not None and type(tensor.data) is torch.Tensor
        }


def _keeping(kind: type[nn.Module]) -> type[nn.Module]:
    if issubclass(kind, _KeepsHostMemory):
        return kind
    if kind not in _classes:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _classes[kind] = type(kind.__name__, (_KeepsHostMemory, kind), names)
    return _classes[kind]


def _memory(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor on a device: the same object for as long as it exists.

    None for a tensor on the CPU, and where the device does not tell (DirectML).
    """
    try:
        return None if tensor.is_cpu else tensor.untyped_storage()
    except RuntimeError:
        return None


def _is_in(memory: torch.UntypedStorage | None, tensor: torch.Tensor) -> bool:
    return memory is not None and memory is _memory(tensor)


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()
