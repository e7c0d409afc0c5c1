"""Text encoders and VAE: on the card for one stage of a prompt, and gone from it in no time."""

from typing import Any

import comfy.model_patcher

from ..host_memory import keep_host_memory


class VisitingModelPatcher(comfy.model_patcher.ModelPatcher):
    """Of a model that goes to the device as ComfyUI decides, and that ComfyUI does not pin.

    What does not fit, or has to leave for the next stage, ComfyUI pins for the copies to come, and unpins when the
    model leaves. For weights that are read once or twice a prompt that costs more than it wins: a T5 in fp8 on a card
    of 4 GiB takes 0.1 s longer without, and what comes after it 0.25 s less (an H100).
    """

    def pin_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


def leave_without_copies(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Let what ComfyUI moves to the card as a whole leave it in no time: its host memory stays its own meanwhile.

    Its clones, too. Nothing changes where weights never leave host memory (dynamic VRAM), do not come back to it
    (--gpu-only), or the device's memory is the host's.
    """
    goes_there = type(patcher) is comfy.model_patcher.ModelPatcher
    comes_back = patcher.offload_device.type == "cpu"
    if goes_there and comes_back and patcher.load_device.type != "mps":
        keep_host_memory(patcher.model, patcher.hook_backup)
        patcher.__class__ = VisitingModelPatcher
