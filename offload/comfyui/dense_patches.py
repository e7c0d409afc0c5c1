"""ComfyUI's patches on a fresh dense weight, with their tensors where the weight is.

``comfy.lora.calculate_weight`` casts every tensor of a patch to the weight's device, in each forward anew. Here they
are taken out of the patches, so that whoever owns the memory can bring them there with the weight.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import torch
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class _Slot:
    """Where a patch had a tensor."""

    name: str


class DensePatches:
    """The patches of the weight or bias ``key``, as ComfyUI applies them to a layer that it has offloaded
    (``LowVramPatch``): all math in the dtype of the weight. ``tensors`` are the host tensors that they need."""

    def __init__(self, key: str, patches: Sequence[Sequence[Any]]) -> None:
        self._key = key
        self._prefix = f"{key.rpartition('.')[2]}_patch"
        self.tensors: dict[str, torch.Tensor] = {}
        self._patches = [(strength, _mapped(self._take, value), *rest) for strength, value, *rest in patches]
        self._needs_original = any(isinstance(p[1], tuple) and p[1][0] == "model_as_lora" for p in patches)

    def _take(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return value
        slot = _Slot(f"{self._prefix}_{len(self.tensors)}")
        self.tensors[slot.name] = value.cpu().contiguous()
        return slot

    def apply(self, weight: torch.Tensor, tensors: Mapping[str, Any]) -> torch.Tensor:
        """The patched ``weight``, which may be written to, with ``tensors`` on its device; its shape may grow."""

        def given(value: Any) -> Any:
            return tensors[value.name] if isinstance(value, _Slot) else value

        patches = [(strength, _mapped(given, value), *rest) for strength, value, *rest in self._patches]
        original = {self._key: [(weight.clone(), None)]} if self._needs_original else None
        return comfy.lora.calculate_weight(
            patches, weight, self._key, intermediate_dtype=weight.dtype, original_weights=original
        )

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What becomes of a weight of ``shape``: some patches widen it."""
        return tuple(self.apply(torch.empty(shape, device="meta"), self.tensors).shape)


def _mapped(function: Any, value: Any) -> Any:
    """``value`` of a patch with every leaf replaced, adapters copied."""

    def replaced(leaf: Any) -> Any:
        if not hasattr(leaf, "weights"):
            return function(leaf)
        adapter = copy.copy(leaf)
        adapter.weights = tree_map(function, leaf.weights)
        return adapter

    return tree_map(replaced, value)
