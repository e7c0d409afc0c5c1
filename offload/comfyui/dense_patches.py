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
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from ...low_rank.factors import factors_of
from .patch_check import Patch, trial

PIECE_BYTES = 64 << 20
"""In fp32, of a large weight that is patched some rows at a time."""

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

    With ``as_if_it_fits`` all of them are applied as ComfyUI patches a model that fits (``patch_weight_to_device``): in
    the dtype that it takes for that, and the result is rounded to the dtype that the weight is kept in.
    """

    def __init__(
        self, key: str, patches: Sequence[Patch], module: torch.nn.Module, *, as_if_it_fits: bool = False
    ) -> None:
        self._key = key
        self._functions = _functions_of(module, key)
        self._prefix = f"{key.rpartition('.')[2]}_patch"
        self.tensors: dict[str, torch.Tensor] = {}
        self._patches = [(strength, _mapped(self._take, value), *rest) for strength, value, *rest in patches]
        self._is_in_fp32 = any(getattr(value, "name", None) in _FAIL_IN_16_BITS for _, value, *_ in patches)
        kept: Any = module._parameters.get(key.rpartition(".")[2])  # a 4-bit weight is none of these
        self._rounds_to: torch.dtype | None = kept.dtype if as_if_it_fits and kept is not None else None
        self._as_if_it_fits = as_if_it_fits
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
        patched = self._patched(weight.to(self.math_dtype(weight.dtype, weight.device)), patches)
        return patched.to(weight.dtype)

    def math_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype in which a weight of ``dtype`` on ``device`` is patched."""
        if self._as_if_it_fits:
            return _dtype_for_patching(device)
        return torch.float32 if self._is_in_fp32 and dtype in (torch.bfloat16, torch.float16) else dtype

    def _patched(self, weight: torch.Tensor, patches: Sequence[Patch]) -> torch.Tensor:
        if self._as_if_it_fits:
            return self._patched_to_fit(weight, patches)
        if not self._needs_original:
            return comfy.model_patcher.LowVramPatch(self._key, {self._key: patches}, *self._functions)(weight)
        original = {self._key: [(weight.clone(), None)]}
        return comfy.lora.calculate_weight(
            patches, weight, self._key, intermediate_dtype=weight.dtype, original_weights=original
        )

    def _patched_to_fit(self, weight: torch.Tensor, patches: Sequence[Patch]) -> torch.Tensor:
        convert, set_to = self._functions
        weight = convert(weight, inplace=True) if convert is not None else weight
        original = {self._key: [(weight.clone(), None)]}
        patched = comfy.lora.calculate_weight(patches, weight, self._key, original_weights=original)
        if patched.is_meta:
            return patched
        if set_to is not None:
            stored: Any = set_to(patched, seed=_seed_of(self._key), return_weight=True)
            is_packed = bool(is_traceable_wrapper_subclass(stored))
            patched = stored.dequantize() if is_packed else stored
        elif self._rounds_to is not None:
            patched = comfy.float.stochastic_rounding(patched, self._rounds_to, seed=_seed_of(self._key))
        return patched

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight of ``shape`` after patching."""
        with trial():
            return tuple(self.apply(torch.empty(shape, device="meta"), self.tensors).shape)


def patched_copy(
    tensor: torch.Tensor, key: str, patches: Sequence[Patch], module: torch.nn.Module, device: torch.device
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
    if set_to is not None:
        return set_to(patched, seed=_seed_of(key), return_weight=True)
    return comfy.float.stochastic_rounding(patched, tensor.dtype, seed=_seed_of(key))


def patched_in_host_memory(
    tensor: torch.Tensor, key: str, patches: Sequence[Sequence[Any]], module: torch.nn.Module, device: torch.device
) -> torch.Tensor:
    """As `patched_copy`, of a weight that is too large for the device: the copy is in host memory.

    Plain LoRA is added on ``device``, some rows at a time. Other patches need the whole weight: the CPU adds them.
    """
    shape: Any = tuple(tensor.shape)
    if len(shape) != 2 or any(patch[3] is not None for patch in patches) or factors_of(patches, shape) is None:
        return patched_copy(tensor, key, patches, module, torch.device("cpu"))
    patched = torch.empty_like(tensor, device="cpu")
    count = max(1, PIECE_BYTES // (4 * shape[1]))
    for start in range(0, len(tensor), count):
        rows = slice(start, start + count)
        own = [(strength, _of_rows(adapter, rows), *rest) for strength, adapter, *rest in patches]
        patched[rows] = patched_copy(tensor[rows], key, own, module, device)
    return patched


def _of_rows(lora: Any, rows: slice) -> Any:
    """What a plain LoRA of ComfyUI's adds to these rows of the weight."""
    up, *others = lora.weights
    part = copy.copy(lora)
    part.weights = (up[rows], *others)
    return part


def _seed_of(key: str) -> int:
    string_to_seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
    seed: int = string_to_seed(key)
    return seed


def _dtype_for_patching(device: torch.device) -> torch.dtype:
    """In which ComfyUI patches a model that fits: fp32, in newer versions fp16 where the device is fast at it."""
    chosen = getattr(comfy.model_management, "lora_compute_dtype", None)
    return torch.float32 if chosen is None or device.type == "meta" else chosen(device)


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
