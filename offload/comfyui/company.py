"""Whether anybody but ComfyUI, PyTorch and this package takes part in a forward, so that it must not run twice.

Nodes that skip what changes little between steps (EasyCache, TeaCache, first-block caches) keep what a forward has
computed for the next one. If a forward ran again, they would take what it left the first time. So whatever is not known
here is company: hooks, patches, wrappers, replaced methods, modules of other classes.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

_OURS = __name__.removesuffix(".offload.comfyui.company") + "."
_COMPUTES = (_OURS, "comfy.", "comfy_kitchen.", "torch.")
"""Whose functions only compute."""

_WRAPS = (_OURS, "comfy_api.torch_helpers.")
"""Whose wrappers keep nothing of a forward."""

_OPTIONS = frozenset({"wrappers", "callbacks", "sample_sigmas", "sigmas", "cond_or_uncond", "uuids"})
"""What ComfyUI's own samplings have in the transformer options."""


def has_company_now(model: Any, options: Mapping[str, Any]) -> bool:
    """In this forward of a streamed ``model`` of ComfyUI's, called with these transformer ``options``."""
    patcher = model.current_patcher
    kinds = (options.get("wrappers") or {}).values()
    wrappers = (function for by_key in kinds for functions in by_key.values() for function in functions)
    return (
        patcher is None
        or "model_function_wrapper" in patcher.model_options
        or bool(patcher.injections)
        or any(name not in _OPTIONS and value not in (None, {}, []) for name, value in options.items())
        or any(not _is_of(function, _WRAPS) for function in wrappers)
        or bool(torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks)
    )


def has_company(model: Any) -> bool:
    """In the modules of ``model``. This looks at all of them: 2 ms for Flux."""
    modules = list(model.diffusion_model.modules())
    kinds = {kind for module in (model, *modules) for kind in type(module).__mro__}
    names = {kind.__module__ for kind in kinds if kind.__module__.startswith("comfy.")}
    return (
        any(not _is_of(function, _COMPUTES) for module in modules for function in _of_module(module))
        or any(not _is_of(function, _COMPUTES) for kind in kinds for function in _of_class(kind))
        or any(not _is_of(function, _COMPUTES) for name in names for function in _functions(_computing(name)))
        or any(name in vars(model) for name in ("apply_model", "_apply_model"))
        or not type(model.model_sampling).__module__.startswith(("comfy.", "comfy_extras."))
    )


def _of_module(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The functions that a module has beside those of its class."""
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()
    own = vars(module)
    yield from own.get("weight_function") or ()
    yield from own.get("bias_function") or ()
    for name, value in own.items():
        if name.startswith("forward") or name == "_forward":
            yield value


def _of_class(kind: type) -> Iterator[Any]:
    """The functions in a class itself, and whatever is there in the place of those that compute.

    Of torch's classes only the latter: transformers adds methods to `nn.Module`.
    """
    is_torchs = kind.__module__.startswith("torch.")
    for name, value in vars(kind).items():
        if name in _METHODS or (isinstance(value, FunctionType) and not is_torchs):
            yield value


_METHODS = (
    *("forward", "forward_orig", "_forward", "apply_model", "_apply_model"),
    *("__call__", "_call_impl", "_wrapped_call_impl"),
)


def _functions(values: Iterable[Any]) -> Iterator[Callable[..., Any]]:
    return (value for value in list(values) if isinstance(value, FunctionType))


def _computing(name: str) -> Iterator[Any]:
    """The functions by which the classes of a module of ComfyUI's compute: packages replace some of them."""
    return (value for key, value in vars(sys.modules[name]).items() if "attention" in key or "rope" in key)


def _is_of(function: Any, places: tuple[str, ...]) -> bool:
    """Whether a function, a method or an object that is called was written in one of these places.

    Not by ``__module__``, which a decorator copies from what it wraps.
    """
    function = getattr(function, "_torchdynamo_orig_callable", function)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        function = next((vars(kind)["__call__"] for kind in type(function).__mro__ if "__call__" in vars(kind)), None)
    written_in = getattr(function, "__globals__", {}).get("__name__") or ""
    return f"{written_in}.".startswith(places)
