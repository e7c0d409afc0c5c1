"""Checks that ComfyUI's memory manager has what streaming needs. It asks for names, as versions and forks differ."""

import importlib
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import nn

_NEEDED = {
    "comfy.model_patcher": (
        *(
            f"ModelPatcher.{method}"
            for method in (
                *("add_callback_with_key", "add_hook_patches", "add_patches", "add_wrapper_with_key", "apply_hooks"),
                *("cleanup", "clone", "detach", "get_all_callbacks", "get_key_patches", "is_clone", "load"),
                *("loaded_size", "model_size", "model_state_dict", "partially_load", "partially_unload"),
                *("patch_hooks", "patch_model", "pre_run", "prepare_state", "remove_wrappers_with_key"),
                *("unpatch_hooks", "unpatch_model", "use_ejected"),
            )
        ),
        "CallbacksMP.ON_CLEANUP",
        "CallbacksMP.ON_LOAD",
        "LowVramPatch",
    ),
    "comfy.float": ("stochastic_rounding",),
    "comfy.patcher_extension": ("WrappersMP.APPLY_MODEL", "WrappersMP.DIFFUSION_MODEL"),
    "comfy.model_management": (
        *("cast_to_device", "current_loaded_models", "get_free_memory", "get_torch_device", "unet_offload_device"),
    ),
    "comfy.lora": ("calculate_weight",),
    "comfy.weight_adapter": ("LoRAAdapter.load",),
}
"""Names in modules."""

_NEEDED_OF_PATCHERS = (
    *("backup", "callbacks", "current_hooks", "force_cast_weights", "forced_hooks", "hook_backup", "hook_patches"),
    *("injections", "load_device", "model", "model_options", "object_patches", "object_patches_backup"),
    *("offload_device", "parent", "patches", "patches_uuid", "weight_wrapper_patches", "wrappers"),
    *("model.current_weight_patches_uuid", "model.device", "model.model_loaded_weight_memory", "model.model_lowvram"),
)
"""Attributes of each ModelPatcher, and those that it gives its model: only an instance has them."""


class UnknownComfyUIError(RuntimeError):
    """This ComfyUI lacks something that streaming is built on."""


def require_comfyui() -> None:
    """Refuse a ComfyUI that has changed too much.

    Raises:
        UnknownComfyUIError: names its version, and what it lacks.
    """
    missing = list(_missing_in_modules()) or list(_missing_of_patchers())
    if missing:
        raise UnknownComfyUIError(
            f"ComfyUI {_version()} has no {', '.join(missing)}, which streaming needs. Update this package, or ComfyUI "
            "if it is older than 0.3.64."
        )


def _missing_in_modules() -> Iterator[str]:
    for module, names in _NEEDED.items():
        try:
            found = importlib.import_module(module)
        except (ImportError, AttributeError):
            yield module
            continue
        yield from (f"{module}.{name}" for name in names if not _has(found, name))


def _missing_of_patchers() -> Iterator[str]:
    """The attributes of a ModelPatcher over an empty module, made as ours are."""
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    try:
        patcher = ModelPatcher(nn.Module(), cpu, cpu)
    except Exception as error:  # a changed constructor may raise anything
        yield f"ModelPatcher of a model and two devices ({type(error).__name__}: {error})"
        return
    missing = [name for name in _NEEDED_OF_PATCHERS if not _has(patcher, name)]
    if missing:
        yield f"{', '.join(missing)} in its ModelPatchers"


def _has(what: Any, name: str) -> bool:
    try:
        reduce(getattr, name.split("."), what)
    except AttributeError:
        return False
    return True


def _version() -> str:
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return "of an unknown version"
