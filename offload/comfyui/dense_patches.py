"""ComfyUI's patches on a fresh dense weight, with their tensors where the weight is.

``comfy.lora.calculate_weight`` casts every tensor of a patch to the weight's device, anew in each forward. Here the
tensors are taken out of the patches, so that the streamer can bring them to the device with the weight.

Some layers keep their weight in other units than they compute with (scaled fp8). They have ``convert_weight`` and
``set_weight``, and ComfyUI patches the converted weight.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch.utils._pytree import tree_map

from .patch_check import trial

_FAIL_IN_16_BITS = ("oft", "boft")
"""Adapters of ComfyUI's that fail on a 16-bit weight: ComfyUI then leaves them out, with an error in the log."""


@dataclass(frozen=True)
class _Slot:
    """Where a patch had a tensor."""

    name: str


class DensePatches:
    """The patches of the weight or bias ``key`` of ``module``, applied as ComfyUI does it for a layer that it has
    offloaded (``LowVramPatch``): computed in the dtype of the weight.

    OFT and BOFT fail in 16 bits. Where one of them is among the patches, all are computed in fp32, as ComfyUI patches a
    model that fits. ``tensors`` are the host tensors that the patches need.
    """

    def __init__(self, key: str, patches: Sequence[Sequence[Any]], module: torch.nn.Module) -> None:
        self._key = key
        self._functions = _functions_of(module, key)
        self._prefix = f"{key.rpartition('.')[2]}_patch"
        self.tensors: dict[str, torch.Tensor] = {}
        self._patches = [(strength, _mapped(self._take, value), *rest) for strength, value, *rest in patches]
        self._is_in_fp32 = any(getattr(value, "name", None) in _FAIL_IN_16_BITS for _, value, *_ in patches)
        self._needs_original = any(isinstance(p[1], tuple) and p[1][0] == "model_as_lora" for p in patches)

    def _take(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return value
        slot = _Slot(f"{self._prefix}_{len(self.tensors)}")
        self.tensors[slot.name] = value.cpu().contiguous()
        return slot

    def apply(self, weight: torch.Tensor, tensors: Mapping[str, Any]) -> torch.Tensor:
        """Return the patched weight. Some patches widen it.

        ``weight`` may be overwritten. ``tensors`` has, under the names in `tensors`, their copies on its device.
        """

        def given(value: Any) -> Any:
            return tensors[value.name] if isinstance(value, _Slot) else value

        patches = [(strength, _mapped(given, value), *rest) for strength, value, *rest in self._patches]
        return self._patched(weight.to(self.math_dtype(weight.dtype)), patches).to(weight.dtype)

    def math_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a weight of ``dtype`` is patched."""
        return torch.float32 if self._is_in_fp32 and dtype in (torch.bfloat16, torch.float16) else dtype

    def _patched(self, weight: torch.Tensor, patches: Sequence[Any]) -> torch.Tensor:
        if not self._needs_original:
            return comfy.model_patcher.LowVramPatch(self._key, {self._key: patches}, *self._functions)(weight)
        original = {self._key: [(weight.clone(), None)]}
        return comfy.lora.calculate_weight(
            patches, weight, self._key, intermediate_dtype=weight.dtype, original_weights=original
        )

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight of ``shape`` after patching."""
        with trial():
            return tuple(self.apply(torch.empty(shape, device="meta"), self.tensors).shape)


def patched_copy(
    tensor: torch.Tensor, key: str, patches: Sequence[Sequence[Any]], module: torch.nn.Module, device: torch.device
) -> torch.Tensor:
    """A copy on ``device`` of ``tensor``, which is ``key`` of ``module``, with ``patches`` in it.

    It is made as ComfyUI's ``patch_weight_to_device`` makes it where a model fits: patched in fp32, then rounded to the
    tensor's own dtype.
    """
    convert, set_to = _functions_of(module, key)
    weight = comfy.model_management.cast_to_device(tensor, device, torch.float32, copy=True)
    if convert is not None:
        weight = convert(weight, inplace=True)
    original = {key: [(weight.clone(), None)]}
    patched = comfy.lora.calculate_weight(patches, weight, key, original_weights=original)
    string_to_seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
    if set_to is not None:
        return set_to(patched, seed=string_to_seed(key), return_weight=True)
    return comfy.float.stochastic_rounding(patched, tensor.dtype, seed=string_to_seed(key))


def _functions_of(module: torch.nn.Module, key: str) -> tuple[Any, Any]:
    """The layer's functions that convert a tensor to the values it computes with, and back; None where it has none."""
    name = key.rpartition(".")[2]
    return getattr(module, f"convert_{name}", None), getattr(module, f"set_{name}", None)


def _mapped(function: Any, value: Any) -> Any:
    """The ``value`` of a patch, with ``function`` applied to every leaf. Adapters are copied."""

    def replaced(leaf: Any) -> Any:
        if not hasattr(leaf, "weights"):
            return function(leaf)
        adapter = copy.copy(leaf)
        adapter.weights = tree_map(function, leaf.weights)
        return adapter

    return tree_map(replaced, value)
