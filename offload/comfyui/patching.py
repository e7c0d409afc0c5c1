"""ComfyUI's patches (LoRA and the like) on a streamed model. They never change its weights, because clones share them.

How a tensor is patched depends on its layer:

- Some layers compute with patches beside their weight (`TakesPatches`). 4-bit layers do, and `LowRankBeside` does it
  for layers in ComfyUI's quantised formats.
- In other layers, a tensor that is small or outside the blocks gets a patched copy, which shadows it. It is on the
  device, or in host memory if the layer stays there.
- A large weight in a block is patched in each forward, from a fresh dense copy (`DensePatches`).

What a forward needs of the patches becomes buffers of the layer, so that it is streamed with the layer.

A patch whose strength is None stands by: it has no effect until it gets a strength.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .. import record
from ..extras import ByModule
from .dense_patches import DensePatches, patched_copy, patched_in_host_memory
from .low_rank_beside import LowRankBeside, is_quantised_linear
from .patch_check import Patch, name_and_place

Function = Callable[[torch.Tensor], torch.Tensor]

_CASTS = ("comfy_cast_weights", "comfy_force_cast_weights")
"""Attributes that make a layer of ComfyUI's compute in its input's dtype. The second is for quantised weights."""


_COPIES_TO_PATCH = 2
"""Scratch memory for patching one weight, in multiples of the weight: ComfyUI's own estimate
(``LOWVRAM_PATCH_ESTIMATE_MATH_FACTOR``)."""


class TakesPatches(Protocol):
    """A layer that can compute with patches of its weight without a dense copy of it; or an object that does so for it.

    A layer has two more attributes for that. ``computes_on`` is the device on which its forward runs; the weight of a
    streamed layer may be elsewhere. ``patched_shape`` is the shape of the weight after ``weight_function``.
    """

    def take_patches(self, patches: Sequence[Patch], dtype: torch.dtype) -> Mapping[str, torch.Tensor] | None:
        """From now on compute with ``patches``, and no earlier ones, in ``dtype``.

        Returns host tensors, by the names under which they are to be buffers of the layer. Those that have not changed
        are the same objects as before. Returns None if it cannot compute with these patches; then it uses none.
        """
        ...


class ChoosesCompute(Protocol):
    """A layer that can compute in more than one way."""

    def compute_by(self, compute: str | None, device: torch.device, dtype: torch.dtype) -> int:
        """From now on compute as ``compute`` says (None: exactly), in ``dtype`` on ``device``.

        Returns the bytes that it keeps on the device for that, wherever its weight is.
        """
        ...


class Patching:
    """The patches that are in effect on a model and on all its clones.

    With ``in_weights`` they are applied to a dense copy of each weight, as ComfyUI does it, and never beside it: that
    is slower, and gives ComfyUI's bits.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], *, in_weights: bool = False) -> None:
        self._model_of = weakref.ref(model)  # the model holds this: a cycle would delay the release of its memory
        self._in_blocks = {module for block in blocks for module in block.modules()}
        self._in_weights = in_weights
        quantised = [module for module in model.modules() if is_quantised_linear(module)] if not in_weights else []
        self._beside = {module: LowRankBeside(module) for module in quantised}
        self._takers: set[TakesPatches] = set()
        in_blocks: list[Any] = list(self._in_blocks)
        self._choosing: list[ChoosesCompute] = [layer for layer in in_blocks if hasattr(type(layer), "compute_by")]
        self.in_host_memory: Collection[nn.Module] = ()
        """Layers outside the blocks whose patched copies are in host memory."""
        self._shadows: list[tuple[nn.Module, str]] = []
        self._outside: list[tuple[nn.Module, str]] = []
        self._compute_bytes = 0
        self.scratch_bytes = 0
        """Bytes that a forward needs, for a moment, to patch its largest dense weight."""

    def apply(
        self,
        patches: Mapping[str, Sequence[Patch]],
        wrappers: Mapping[str, Sequence[Function]],
        device: torch.device,
        dtype: torch.dtype,
        *,
        casts: bool = False,
        compute: str | None = None,
    ) -> ByModule:
        """Put ``patches`` into effect, and no earlier ones, for forwards in ``dtype`` on ``device``.

        Args:
            patches: By the tensor's name in the model.
            wrappers: Functions that are called after the patches, by the tensor's name.
            casts: Have every layer of ComfyUI's compute in its input's dtype.
            compute: For layers of the blocks that can compute in more than one way.

        Returns:
            The tensors that modules inside blocks need as buffers.
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
        """Bytes on the device for patches and for the way to compute, beside the buffers that `apply` returned."""
        on_device = [(module, name) for module, name in self._shadows if module not in self.in_host_memory]
        shadows = [module.__dict__[name] for module, name in on_device]
        outside = [module.get_buffer(name) for module, name in self._outside]
        return self._compute_bytes + sum(tensor.nbytes for tensor in (*shadows, *outside))

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM for patched copies in host memory. What `apply` returned does not count."""
        return sum(module.__dict__[name].nbytes for module, name in self._shadows if module in self.in_host_memory)

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
        self._takers.add(taker)  # even if an error follows, it must be told when its patches go
        tensors: Mapping[str, torch.Tensor] | None = taker.take_patches(patches, dtype)
        if tensors is not None:
            takers.add(taker)
        return tensors

    def _dense(
        self, module: Any, name: str, key: str, patches: Sequence[Patch], dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        """Have ``module`` patch a fresh dense copy in each forward. Returns the tensors that it needs for that."""
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
        # Python looks here before it looks at _parameters, which the streamer rebinds and the state dict reads.
        make = patched_in_host_memory if module in self.in_host_memory else patched_copy
        module.__dict__[name] = make(tensor, key, patches, module, device)
        self._shadows.append((module, name))

    def _remove(self) -> None:
        for module, name in self._shadows:
            module.__dict__.pop(name, None)
        for module, name in self._outside:
            delattr(module, name)
        self._shadows.clear()
        self._outside.clear()


def _prepare(modules: Iterable[Any], device: torch.device, casts: bool) -> None:
    """Have the layers compute on ``device``, without patches."""
    # Each change of strength runs this. So only what differs is set: setting takes longer than looking.
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
            if module.patched_shape != module.shape:
                module.patched_shape = module.shape


def _has_empty_lists(module: Any) -> bool:
    """Whether the layer has empty lists of its own. At first, all layers of a class of ComfyUI's share theirs."""
    return module.__dict__.get("weight_function") == [] and module.__dict__.get("bias_function") == []


def _find(model: nn.Module, modules: Mapping[str, Any], key: str) -> tuple[Any, str]:
    path, _, name = key.rpartition(".")
    # ``modules`` has what torch.compile has wrapped under another path; get_submodule finds it under its own.
    return modules.get(path) or model.get_submodule(path), name


def _has(module: nn.Module, name: str) -> bool:
    """As ``hasattr``, which takes ten times as long where a module lacks the name."""
    return name in module.__dict__ or hasattr(type(module), name)


def _add_functions(module: Any, name: str, functions: Sequence[Function], *, first: bool = False) -> None:
    """Add to the functions of ``name``, in a new list: at first, all layers of a class of ComfyUI's share one."""
    others = getattr(module, f"{name}_function")
    setattr(module, f"{name}_function", [*functions, *others] if first else [*others, *functions])


def _own_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    return module._parameters.get(name, module._buffers.get(name))


def add(patches: dict[str, list[Patch]], taken: Mapping[Any, Any], strength: float, strength_model: float) -> list[Any]:
    """Add ``taken`` to ``patches`` as ``ModelPatcher.add_patches`` does. Returns the names of what was added."""
    for name, value in taken.items():
        key, offset, function = name_and_place(name)
        patches.setdefault(key, []).append((strength, value, strength_model, offset, function))
    return list(taken)


def patches_under(
    hooks: Any, patches: Mapping[str, Sequence[Patch]], hook_patches: Mapping[Any, Mapping[str, Sequence[Patch]]]
) -> dict[str, list[Patch]]:
    """The patches of a patcher and of all its hooks, by key. If a hook is not in ``hooks``, its patches stand by.

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
