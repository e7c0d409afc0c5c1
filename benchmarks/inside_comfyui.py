"""This package as ``flux_nf4``, inside the ComfyUI tree that the environment variable COMFYUI_PATH names."""

import importlib
import os
import subprocess
import sys
from typing import Any

import torch
from arguments import comfyui_tree

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


def enter_comfyui() -> None:
    """Make ComfyUI importable, as its own ``main.py`` does: on the GPU if there is one, with dynamic VRAM if it can."""
    sys.path.insert(0, str(comfyui_tree()))
    arguments, sys.argv = sys.argv, [sys.argv[0], *([] if torch.cuda.is_available() else ["--cpu"])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = arguments
    _enable_dynamic_vram(comfy.cli_args)


def allocator_of_comfyui() -> str:
    """What ComfyUI's start sets PYTORCH_CUDA_ALLOC_CONF to on this machine; it must be set before torch is imported."""
    code = "import comfy.options as o; o.enable_args_parsing(); import cuda_malloc, os; print(os.environ.get(NAME, ''))"
    command = [sys.executable, "-c", f"NAME = {ALLOCATOR!r}; {code}"]
    ended = subprocess.run(command, cwd=comfyui_tree(), capture_output=True, text=True, check=False)
    return ended.stdout.strip()


def use_allocator_of_comfyui() -> None:
    """Start this script anew with it in the environment, where there is none: torch reads that when it is imported."""
    if ALLOCATOR not in os.environ:
        os.environ[ALLOCATOR] = allocator_of_comfyui()
        os.execv(sys.executable, [sys.executable, *sys.argv])


def import_package() -> None:
    """Enter ComfyUI, with this package importable as ``flux_nf4``."""
    enter_comfyui()
    import package  # noqa: F401


def has_dynamic_vram() -> bool:
    """Whether ComfyUI pages weights in by need (0.18 and later, with comfy-aimdo), as `enter_comfyui` has set it."""
    management = sys.modules.get("comfy.memory_management")
    return bool(getattr(management, "aimdo_enabled", False))


def _enable_dynamic_vram(cli_args: Any) -> None:
    """What ``main.py`` of ComfyUI 0.18 and later does when it starts."""
    enables = getattr(cli_args, "enables_dynamic_vram", None)
    if enables is None or not torch.cuda.is_available() or not enables():
        return
    control = importlib.import_module("comfy_aimdo.control")
    control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    index = comfy.model_management.get_torch_device().index
    many = hasattr(control, "init_devices")  # newer ones take (device, GiB to leave free)
    if control.init_devices([(index, 0)]) if many else control.init_device(index):
        control.set_log_info()  # without it each allocation is logged by Python, thousands in a forward
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
