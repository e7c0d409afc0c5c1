"""A model object of its own for each MODEL that a loader gives, over the same modules and memory.

Nodes put state on the model object that all clones of a MODEL share. With other settings, a loader of ComfyUI's gives
a newly read model, which has none of that state. Here it gives a new object: the file is read once, and for ComfyUI's
memory manager all of them are one model. The transformer stays the same object: nodes that change it (RES4LYF) change
its blocks as well, and either both must be new or neither.
"""

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from torch import nn


@dataclass
class SharedState:
    """State that all model objects over the same modules must share, because ComfyUI keeps it on each of them."""

    device: torch.device | None = None
    loaded_bytes: int = 0
    _patched: "weakref.ref[nn.Module] | None" = None
    _originals: dict[str, Any] = field(default_factory=dict)

    def use(self, model: nn.Module, originals: dict[str, Any]) -> None:
        """``model`` is to be patched, with ``originals`` for what its object patches replace. Object patches of other
        patchers are taken back: in part they are on modules that this model has as well."""
        if self._originals is not originals:
            self.restore(model)
        self._patched, self._originals = weakref.ref(model), originals

    def restore(self, model: nn.Module) -> None:
        """Take back the object patches that are in effect, on ``model`` if the one that has them is gone."""
        before = self._patched() if self._patched is not None else None
        for key, original in self._originals.items():
            comfy.utils.set_attr(model if before is None else before, key, original)
        self._originals.clear()


class SharedModulesPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose model object may be one of several over the same modules.

    ``model.streaming.shared`` is their `SharedState`.
    """

    model: Any
    object_patches_backup: dict[str, Any]
    keeps: nn.Module | None = None
    """The object that was loaded last. Without it, ComfyUI takes what it has on the device for gone."""

    def take_own_model(self) -> None:
        """Have a model object of its own from now on; not for a patcher that has clones or is loaded.

        Its modules are as they were read: object patches of a loaded model come back when that is loaded again.
        """
        self._shared.restore(self.model)
        self.model = _over_the_same_modules(self.model)
        self.object_patches_backup = {}

    def is_clone(self, other: Any) -> bool:
        """ComfyUI's: whether the same weights are moved for both."""
        theirs = getattr(getattr(other, "model", None), "streaming", None)
        return theirs is not None and theirs is self.model.streaming

    def loaded_size(self) -> int:
        """ComfyUI's: bytes on the device, whichever of the model objects brought them there."""
        size: int = self._shared.loaded_bytes
        return size

    def current_loaded_device(self) -> Any:
        """ComfyUI's: where the model is now."""
        return self._shared.device if self._shared.device is not None else self.model.device

    def patch_model(self, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's."""
        self._shared.use(self.model, self.object_patches_backup)
        root = self
        while isinstance(root.parent, SharedModulesPatcher) and root.parent.is_clone(self):
            root = root.parent
        root.keeps = self.model
        return super().patch_model(*args, **kwargs)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """ComfyUI's."""
        if unpatch_weights:
            self.current_hooks = None  # else ComfyUI takes their patches back by putting all others on the device
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._share_state()

    def _share_state(self) -> None:
        """Take over what ComfyUI has written to the model object."""
        self._shared.device, self._shared.loaded_bytes = self.model.device, self.model.model_loaded_weight_memory

    @property
    def _shared(self) -> Any:
        return self.model.streaming.shared


def _over_the_same_modules(model: nn.Module) -> nn.Module:
    """Another object with the attributes of ``model``; setting one of either changes nothing of the other's."""
    other = copy.copy(model)
    for name, value in vars(model).items():
        if isinstance(value, dict | list | set):
            vars(other)[name] = copy.copy(value)
    schedule = other._modules.get("model_sampling")
    if schedule is not None:
        other._modules["model_sampling"] = copy.deepcopy(schedule)
    return other
