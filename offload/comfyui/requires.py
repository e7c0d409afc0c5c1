"""What streaming needs of ComfyUI's memory manager, found out by looking: versions and forks differ."""

import importlib
from functools import reduce

_NEEDED = {
    "comfy.model_patcher": (
        *(
            f"ModelPatcher.{method}"
            for method in (
                *("add_hook_patches", "add_patches", "add_wrapper_with_key", "apply_hooks", "cleanup", "clone"),
                *("detach", "get_all_callbacks", "get_key_patches", "is_clone", "load", "loaded_size", "model_size"),
                *("model_state_dict", "partially_load", "partially_unload", "patch_hooks", "patch_model"),
                *("prepare_state", "remove_wrappers_with_key", "unpatch_hooks", "unpatch_model", "use_ejected"),
            )
        ),
        "CallbacksMP.ON_LOAD",
        "LowVramPatch",
    ),
    "comfy.float": ("stochastic_rounding",),
    "comfy.patcher_extension": ("WrappersMP.APPLY_MODEL",),
    "comfy.model_management": (
        *("cast_to_device", "current_loaded_models", "get_free_memory", "get_torch_device", "unet_offload_device"),
    ),
    "comfy.lora": ("calculate_weight",),
    "comfy.weight_adapter": ("LoRAAdapter.load",),
}


class UnknownComfyUIError(RuntimeError):
    """This ComfyUI lacks something that streaming is built on."""


def require_comfyui() -> None:
    """Refuse a ComfyUI that has changed too much.

    Raises:
        UnknownComfyUIError: names its version, and what it has not.
    """
    missing = [f"{module}.{name}" for module, names in _NEEDED.items() for name in names if not _has(module, name)]
    if missing:
        raise UnknownComfyUIError(
            f"ComfyUI {_version()} has no {', '.join(missing)}, which streaming needs. Update this package, or ComfyUI "
            "if it is older than 0.3.64."
        )


def _has(module: str, name: str) -> bool:
    try:
        reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


def _version() -> str:
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return "of an unknown version"
