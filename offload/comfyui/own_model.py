"""A model object of its own for each MODEL that a loader gives, over the same layers and memory.

Nodes put state on the model object that all clones of a MODEL share, and on its transformer and blocks: DyPE an
attribute, RES4LYF other classes. With other settings, a loader of ComfyUI's gives a newly read model, which has none of
that state. Here it gives new objects for the model and for all modules down to the layers, which hold the tensors and
are shared: the file is read once, and for ComfyUI's memory manager all of them are one model.

Models that have tensors in other modules as well (Wan in each block) keep one transformer for all: blocks of their own
would need the streamer's bindings and the patches of these tensors, too, and either transformer and blocks must be new
or neither.
"""

import copy
import weakref
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from torch import nn

from ..record import stay_in_place


@dataclass
class SharedState:
    """State that all model objects over the same modules must share, because ComfyUI keeps it on each of them."""

    device: torch.device | None = None
    loaded_bytes: int = 0
    _patched: "weakref.ref[nn.Module] | None" = None
    _patcher: "weakref.ref[SharedModulesPatcher] | None" = None
    _originals: dict[str, Any] = field(default_factory=dict)

    def use(self, patcher: "SharedModulesPatcher") -> None:
        """The model of ``patcher`` is to be patched. Object patches of other patchers are taken back: in part they are
        on modules that this model has as well."""
        originals = patcher.object_patches_backup
        if self._originals is not originals:
            self.restore(patcher.model)
        self._patched, self._patcher, self._originals = weakref.ref(patcher.model), weakref.ref(patcher), originals

    def require_in_effect(self, model: Any) -> None:
        """
        Raises:
            RuntimeError: the layers have the patches of another model, so ``model`` would compute with those.
        """
        patched = self._patched() if self._patched is not None else None
        if patched is None or patched is model:
            return
        wanted, in_effect = model.current_patcher, self._patcher() if self._patcher is not None else None
        if wanted is None or in_effect is None or not wanted.computes_like(in_effect):
            raise RuntimeError(
                "two MODELs of one file with other patches (LoRA and the like) cannot take turns within a sampling: "
                "they share their weights in memory, and the patches are those of the one that was loaded last. Load "
                "one of them from a copy of the file under another name."
            )

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
    compute: str | None = None
    """How layers compute that have more than one way; None: the exact one."""
    keeps: nn.Module | None = None
    """The object that was loaded last. Without it, ComfyUI takes what it has on the device for gone."""

    def take_own_model(self) -> None:
        """Have a model object of its own from now on; not for a patcher that has clones or is loaded.

        Its modules are as they were read: object patches of a loaded model come back when that is loaded again.
        """
        self._shared.restore(self.model)
        self.model = _over_the_same_layers(self.model)
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

    def computes_like(self, other: "SharedModulesPatcher") -> bool:
        """Whether a forward of its model is the same while what ``other`` asks for is in effect on the layers."""
        on_layers = (self.patches_uuid, self.compute) == (other.patches_uuid, other.compute)
        return on_layers and not self.object_patches and not other.object_patches

    def patch_model(self, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's."""
        self._shared.use(self)
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


def _over_the_same_layers(model: Any) -> nn.Module:
    """Another object with the attributes of ``model``; setting one of either changes nothing of the other's.

    So it is with its transformer and blocks, if all tensors of the transformer are in layers.
    """
    other = copy.copy(model)
    for name, value in vars(model).items():
        if isinstance(value, dict | list | set):
            vars(other)[name] = copy.copy(value)
    schedule = other._modules.get("model_sampling")
    if schedule is not None:
        other._modules["model_sampling"] = copy.deepcopy(schedule)
    if not any(_is_layer(module) and module._modules for module in model.diffusion_model.modules()):
        own: dict[nn.Module, nn.Module] = {}
        other._modules["diffusion_model"] = _own(model.diffusion_model, own)
        other.own_blocks = tuple(own.get(block.module, block.module) for block in model.streaming.streamer.blocks)
    return other


def blocks_of(model: Any) -> tuple[nn.Module, ...]:
    """The blocks of a streamed model as nodes find them in it."""
    own: tuple[nn.Module, ...] | None = vars(model).get("own_blocks")
    return tuple(block.module for block in model.streaming.streamer.blocks) if own is None else own


_OF_TORCH = frozenset(vars(nn.Module())) - {"_modules"}
"""Attributes of a module that torch keeps, hooks among them: streaming has its own on modules that are not layers."""


def _own(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Another object for ``module`` and each module in it, except for layers. ``done`` maps modules to theirs."""
    if _is_layer(module):
        return module
    if module not in done:
        other = done[module] = object.__new__(type(module))
        for name, value in vars(module).items():
            is_shared = name in _OF_TORCH or not (isinstance(value, dict | list | set) or is_dataclass(value))
            vars(other)[name] = value if is_shared else copy.copy(value)
        other._parameters, other._buffers = {}, {}
        for name, child in module._modules.items():
            other._modules[name] = None if child is None else _own(child, done)
        if "_apply" in vars(module):
            stay_in_place(other)
    return done[module]


def _is_layer(module: nn.Module) -> bool:
    """Whether it has tensors of its own, or could have them."""
    return bool(module._parameters or module._buffers)
