"""Text encoders and VAE: on the card for one stage of a prompt, and gone from it in no time."""

from typing import Any

import comfy.model_patcher

from ..host_memory import keep_host_memory


class UnpinnedModelPatcher(comfy.model_patcher.ModelPatcher):
    """Of a model that ComfyUI moves as ever, but does not pin.

    ComfyUI pins what finds no room on the card, or has to leave it, for the copies to come, and unpins it when all of
    the model leaves. For weights that are read once or twice a prompt that takes longer than it saves: without, a T5 in
    fp8 on a card of 4 GiB encoded 0.06 s slower, and what came after it was 0.23 s faster (an H100).
    """

    def pin_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> None:
        """It stays as it is."""


def leave_without_copies(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Let what ComfyUI has moved to the card leave it in no time: its host memory stays its own meanwhile."""
    comes_back = patcher.offload_device.type == "cpu"  # not with --gpu-only
    has_its_own_memory = patcher.load_device.type != "mps"
    if _moves(patcher) and comes_back and has_its_own_memory:
        keep_host_memory(patcher.model, patcher.hook_backup)


def leave_unpinned(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Have ``patcher`` and the clones to come pin nothing. Not for a VAE, which in tiles reads its weights often."""
    if _moves(patcher):
        patcher.__class__ = type("UnpinnedModelPatcher", (UnpinnedModelPatcher, type(patcher)), {})


def _moves(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether ComfyUI's ModelPatcher moves it, and no subclass: with dynamic VRAM, weights never leave host memory.

    A subclass that moves it as another class does says so in ``moves_as``.
    """
    return getattr(type(patcher), "moves_as", type(patcher)) is UnpinnedModelPatcher.__base__
