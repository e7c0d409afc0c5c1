"""ComfyUI's patches (LoRA and the like) on a streamed model. Its weights stay as they are: clones share them.

A layer that computes with its patches beside the weight takes them (`TakesPatches`): 4-bit ones do, and `LowRankBeside`
does it for those in ComfyUI's quantised formats. Of the others, what is small, or outside the blocks, gets a patched
copy on the device, which shadows it; a large weight in a block is patched in each forward, from a fresh dense copy
(`DensePatches`). What a forward needs of patches becomes buffers of the layer, and so streams with it.

Patches are ComfyUI's: (strength, adapter or tuple, strength_model, offset, function). One whose strength is None stands
by, to be given a strength later.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .. import record
from .dense_patches import DensePatches, patched_copy
from .low_rank_beside import LowRankBeside, is_quantised_linear

Patch = Sequence[Any]
Function = Callable[[torch.Tensor], torch.Tensor]
Extras = Mapping[nn.Module, Mapping[str, torch.Tensor]]


_CASTS = ("comfy_cast_weights", "comfy_force_cast_weights")
"""What makes a layer of ComfyUI's compute in its input's dtype: each, and those whose weights are quantised."""


_COPIES_TO_PATCH = 2
"""Of a weight, as ComfyUI estimates what its patches take beside it (``LOWVRAM_PATCH_ESTIMATE_MATH_FACTOR``)."""


class TakesPatches(Protocol):
    """Computes with some patches of a layer's weight without a dense copy of it: a layer itself, or what is beside it.

    A layer that does has two attributes more: ``computes_on`` is where the forward runs, which for a streamed layer is
    not where its weight is now; ``patched_shape`` is the shape of the weight with what ``weight_function`` does to it.
    """

    def take_patches(self, patches: Sequence[Patch], dtype: torch.dtype) -> Mapping[str, torch.Tensor] | None:
        """Compute with ``patches`` in ``dtype``, in place of earlier ones. Returns host tensors that are to be buffers
        of the layer under these names, the same objects as before as far as they have not changed; or None, if it
        cannot: then it computes with none of them."""
        ...


class ChoosesCompute(Protocol):
    """A layer that can compute in more than one way."""

    def compute_by(self, compute: str | None, device: torch.device, dtype: torch.dtype) -> int:
        """Compute from now on as ``compute`` says (None: exactly), in ``dtype`` on ``device``. Returns the bytes that
        it keeps on the device for that, wherever its weight is."""
        ...


class Patching:
    """The patches that are in effect on a model, of which all its clones see the same.

    With ``in_weights`` they are applied to a dense copy of each weight, as ComfyUI does it, and never beside it: that
    is slower, and gives ComfyUI's bits.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], *, in_weights: bool = False) -> None:
        self._model_of = weakref.ref(model)  # which has this: a cycle would keep its memory until a collection
        self._in_blocks = {module for block in blocks for module in block.modules()}
        self._in_weights = in_weights
        quantised = [module for module in model.modules() if is_quantised_linear(module)] if not in_weights else []
        self._beside = {module: LowRankBeside(module) for module in quantised}
        self._takers: set[TakesPatches] = set()
        in_blocks: list[Any] = list(self._in_blocks)
        self._choosing: list[ChoosesCompute] = [layer for layer in in_blocks if hasattr(type(layer), "compute_by")]
        self._shadows: list[tuple[nn.Module, str]] = []
        self._outside: list[tuple[nn.Module, str]] = []
        self._compute_bytes = 0
        self.scratch_bytes = 0
        """What a forward takes for a while to patch its largest dense weight."""

    def apply(
        self,
        patches: Mapping[str, Sequence[Patch]],
        wrappers: Mapping[str, Sequence[Function]],
        device: torch.device,
        dtype: torch.dtype,
        *,
        casts: bool = False,
        compute: str | None = None,
    ) -> Extras:
        """Put ``patches`` into effect, in place of earlier ones, for a forward in ``dtype`` on ``device``.

        ``wrappers`` are functions that come after the patches. Both are by the tensor's name in the model. ``casts``
        has every layer of ComfyUI's compute in its input's dtype. ``compute`` is for layers of the blocks that can
        compute in more than one way. Returns what the modules inside blocks need as buffers.
        """
        self._remove()
        self.scratch_bytes = 0
        model = self._model
        modules = dict(model.named_modules(remove_duplicate=False))
        _prepare(modules.values(), device, casts)
        self._compute_bytes = sum(layer.compute_by(compute, device, dtype) for layer in self._choosing)
        for key, functions in wrappers.items():
            module, name = _find(model, modules, key)
            _add_functions(module, name, functions)
        takers: set[TakesPatches] = set()
        extras: dict[nn.Module, dict[str, torch.Tensor]] = {}
        for key, of_key in patches.items():
            module, name = _find(model, modules, key)
            active = [patch for patch in of_key if patch[0] is not None]
            tensors = self._taken(module, name, of_key, dtype, takers) if key not in wrappers else None
            if tensors is None and self._can_shadow(module, name):
                self._shadow(module, name, key, active, device)
                continue
            if tensors is None:
                tensors = self._dense(module, name, key, active, dtype, device)
            if module in self._in_blocks:
                extras.setdefault(module, {}).update(tensors)
            else:
                self._put(module, tensors, device)
        for taker in self._takers - takers:
            taker.take_patches((), dtype)
        self._takers = takers
        return extras

    @property
    def device_bytes(self) -> int:
        """Bytes of what patches have put on the device themselves, beside what they gave the blocks' layers, and what
        layers keep there to compute in the way that was asked for."""
        shadows = [module.__dict__[name] for module, name in self._shadows]
        outside = [module.get_buffer(name) for module, name in self._outside]
        return self._compute_bytes + sum(tensor.nbytes for tensor in (*shadows, *outside))

    @property
    def _model(self) -> nn.Module:
        model = self._model_of()
        assert model is not None
        return model

    def _can_shadow(self, module: nn.Module, name: str) -> bool:
        tensor = _own_tensor(module, name)
        if tensor is None:
            return False  # a 4-bit weight
        is_small = module not in self._in_blocks or tensor.nbytes < record.SMALL_BYTES
        return is_small or not hasattr(module, f"{name}_function")

    def _taken(
        self, module: Any, name: str, patches: Sequence[Patch], dtype: torch.dtype, takers: set[TakesPatches]
    ) -> Mapping[str, torch.Tensor] | None:
        taker: Any = self._beside.get(module, module)
        if name != "weight" or self._in_weights or not hasattr(taker, "take_patches"):
            return None
        self._takers.add(taker)  # whatever happens from here on, it is to be told when its patches go
        tensors: Mapping[str, torch.Tensor] | None = taker.take_patches(patches, dtype)
        if tensors is not None:
            takers.add(taker)
        return tensors

    def _dense(
        self, module: Any, name: str, key: str, patches: Sequence[Patch], dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        """Have ``module`` patch a fresh dense copy in each forward."""
        if not patches:
            return {}
        dense, buffers = DensePatches(key, patches, module, as_if_it_fits=self._in_weights), module._buffers
        scratch = getattr(module, name).numel() * dense.math_dtype(dtype, device).itemsize * _COPIES_TO_PATCH
        self.scratch_bytes = max(self.scratch_bytes, scratch)
        _add_functions(module, name, [lambda weight: dense.apply(weight, buffers)], first=True)
        if name == "weight" and hasattr(module, "patched_shape"):
            module.patched_shape = dense.shape_of(module.patched_shape)
        return dense.tensors

    def _put(self, module: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor.to(device), persistent=False)
            self._outside.append((module, name))

    def _shadow(self, module: nn.Module, name: str, key: str, patches: Sequence[Patch], device: torch.device) -> None:
        """Have ``module`` see a patched copy."""
        if not patches:
            return
        tensor = _own_tensor(module, name)
        assert tensor is not None
        # Found before _parameters, which the streamer rebinds and the state dict reads.
        module.__dict__[name] = patched_copy(tensor, key, patches, module, device)
        self._shadows.append((module, name))

    def _remove(self) -> None:
        for module, name in self._shadows:
            module.__dict__.pop(name, None)
        for module, name in self._outside:
            delattr(module, name)
        self._shadows.clear()
        self._outside.clear()


def _prepare(modules: Iterable[Any], device: torch.device, casts: bool) -> None:
    """Have the layers compute on ``device`` and patch nothing."""
    # A change of strength comes by here: what is as it should be is left alone, setting it takes longer.
    for module in modules:
        if _has(module, "weight_function") and not _has_empty_lists(module):
            module.weight_function, module.bias_function = [], []
        if _has(module, "comfy_cast_weights"):
            for switch in _CASTS:  # without one a layer does what its class says
                module.__dict__.pop(switch, None)
                if casts:
                    setattr(module, switch, True)
        if _has(module, "take_patches"):
            if module.computes_on != device:
                module.computes_on = device
            module.patched_shape = module.shape


def _has_empty_lists(module: Any) -> bool:
    """Of its own: ComfyUI's layers begin with lists that all of a class share."""
    return module.__dict__.get("weight_function") == [] and module.__dict__.get("bias_function") == []


def _find(model: nn.Module, modules: Mapping[str, Any], key: str) -> tuple[Any, str]:
    path, _, name = key.rpartition(".")
    # What torch.compile has wrapped is among them under another path, but is found under its own.
    return modules.get(path) or model.get_submodule(path), name


def _has(module: nn.Module, name: str) -> bool:
    """As ``hasattr``, which takes ten times as long to find that a module does not have it."""
    return name in module.__dict__ or hasattr(type(module), name)


def _add_functions(module: Any, name: str, functions: Sequence[Function], *, first: bool = False) -> None:
    """To those of ``name``; in a new list, for ComfyUI's layers begin with one that all of a class share."""
    others = getattr(module, f"{name}_function")
    setattr(module, f"{name}_function", [*functions, *others] if first else [*others, *functions])


def _own_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    return module._parameters.get(name, module._buffers.get(name))


def patches_under(
    hooks: Any, patches: Mapping[str, Sequence[Patch]], hook_patches: Mapping[Any, Mapping[str, Sequence[Patch]]]
) -> dict[str, list[Patch]]:
    """The patches of a patcher and of all its hooks, by key. Patches of hooks that are not in ``hooks`` stand by.

    ``hooks`` is a HookGroup or None; ``hook_patches`` has the patches of each hook by its reference.
    """
    strengths = {hook.hook_ref: hook.strength for hook in hooks.hooks} if hooks is not None else {}
    combined = {key: list(of_key) for key, of_key in patches.items()}
    for reference, of_hook in hook_patches.items():
        strength = strengths.get(reference)
        for key, of_key in of_hook.items():
            scaled = [(None if strength is None else own * strength, *rest) for own, *rest in of_key]
            combined.setdefault(key, []).extend(scaled)
    return combined
