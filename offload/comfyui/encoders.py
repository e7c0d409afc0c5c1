"""Text encoders and VAE, which are on the GPU for one stage of a prompt: they leave it without copies."""

from typing import Any

import comfy.model_patcher

from ..host_memory import keep_host_memory


class UnpinnedModelPatcher(comfy.model_patcher.ModelPatcher):
    """Moves a model as ComfyUI does, but pins nothing.

    ComfyUI pins weights that have no room on the GPU or have to leave it, to make later copies faster, and unpins them
    when the whole model leaves. For weights that are read once or twice a prompt, that takes longer than it saves:
    without pins a T5 in fp8 encoded 0.06 s slower, and everything after it was 0.23 s faster (an H100 with 4 GiB).
    """

    def pin_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


def leave_without_copies(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Keep the host memory of a model while it is on the GPU, so that unloading it copies nothing."""
    comes_back = patcher.offload_device.type == "cpu"  # not with --gpu-only
    has_its_own_memory = patcher.load_device.type != "mps"
    if _moves(patcher) and comes_back and has_its_own_memory:
        keep_host_memory(patcher.model, patcher.hook_backup)


def leave_unpinned(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Have ``patcher`` and its future clones pin nothing. Not for a VAE: decoding in tiles reads its weights often."""
    if _moves(patcher):
        patcher.__class__ = type("UnpinnedModelPatcher", (UnpinnedModelPatcher, type(patcher)), {})


def _moves(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether ``patcher`` moves its model as ComfyUI's plain ModelPatcher does.

    The subclass for dynamic VRAM does not: its weights never leave host memory. A subclass of ours names, in
    ``moves_as``, the class whose way of moving it keeps.
    """
    return getattr(type(patcher), "moves_as", type(patcher)) is UnpinnedModelPatcher.__base__
