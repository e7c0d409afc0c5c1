"""Whether anybody but ComfyUI and this package takes part in a forward, so that it must not run twice for one step.

Nodes that skip what changes little between steps (EasyCache, TeaCache, first-block caches) keep what a forward has
computed for the next one. If a forward ran again, they would take what it left the first time.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import nn

from .own_model import blocks_of

_OURS = __name__.removesuffix(".offload.comfyui.company")
_KNOWN = (_OURS + ".", "comfy_api.torch_helpers.")
"""Where functions are from that keep nothing of a forward."""


def has_company(model: Any, options: Mapping[str, Any]) -> bool:
    """Of a streamed ``model`` of ComfyUI's, called with these transformer ``options``."""
    transformer = model.diffusion_model
    patcher = model.current_patcher
    return bool(
        options.get("patches")
        or options.get("patches_replace")
        or any(_is_unknown(function) for function in _wrappers(options))
        or (patcher is not None and "model_function_wrapper" in patcher.model_options)
        or transformer._forward_hooks
        or transformer._forward_pre_hooks
        or _is_replaced(transformer, "forward")
        or _is_replaced(transformer, "forward_orig")
        or _has_other_blocks(model)
    )


def _wrappers(options: Mapping[str, Any]) -> Iterator[Any]:
    """Those that run within the forward."""
    by_type = options.get("wrappers") or {}
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        for functions in by_type.get(kind, {}).values():
            yield from functions


def _is_unknown(function: Any) -> bool:
    return not (getattr(function, "__module__", None) or "").startswith(_KNOWN)


def _is_replaced(module: nn.Module, name: str) -> bool:
    """Whether a method is not ComfyUI's: set on the module, or that of a class of others, or put into ComfyUI's."""
    method = getattr(type(module), name, None)
    return name in vars(module) or (method is not None and not method.__module__.startswith("comfy."))


def _has_other_blocks(model: Any) -> bool:
    """Whether somebody has put blocks of their own, or forwards of theirs, in the place of the model's."""
    own = set(blocks_of(model))
    lists = (getattr(model.diffusion_model, name, ()) for name in model.streaming.modulation.steps.lists)
    blocks = [getattr(block, "_orig_mod", block) for of_list in lists for block in of_list]  # torch.compile wraps them
    return any(block not in own or _is_replaced(block, "forward") for block in blocks)
