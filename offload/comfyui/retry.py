"""A forward that fails: one that runs out of the device's memory gives the resident blocks up and runs once more, and
one that comfy-kitchen has no kernel for says what to do."""

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from ...memory import is_out_of_memory
from ..plan import plan_for
from .coming_steps import note_step
from .lasting import lasting_allocations
from .streaming import Streaming

_PIXELS = 8
"""Pixels of a latent's side, where ComfyUI's format of it does not say."""


def retry_with_less(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's wrapper of a forward (``WrappersMP.APPLY_MODEL``). The modulation learns which step it is.

    ComfyUI's guider of two models calls the second with the wrappers of the first, and that one need not be streamed.
    """
    model = executor.class_obj
    if not hasattr(model, "streaming"):
        return executor(*args, **kwargs)
    note_step(model, args)
    telemetry = model.streaming.streamer.telemetry
    if telemetry is not None:
        telemetry.picture = _picture_of(model, args[0])
    return with_less(model, lambda: executor(*args, **kwargs))


def with_less(model: Any, forward: Callable[[], Any]) -> Any:
    """The output of a streamed model's ``forward``. If memory runs out, it runs again with no block resident.

    Raises:
        RuntimeError: comfy-kitchen cannot compute the model's format on this device.
    """
    streaming: Streaming = model.streaming
    streamer = streaming.streamer
    try:
        return forward()
    except Exception as error:
        if _is_of_comfy_kitchen(error):
            raise RuntimeError(
                f"comfy-kitchen {metadata.version('comfy-kitchen')} cannot compute this model's format on "
                f"{model.device} ({error}). Update ComfyUI and its requirements, or load the model from a file in "
                "bf16, fp16 or fp8."
            ) from error
        if not is_out_of_memory(error) or streamer.plan is None or not streamer.plan.resident:
            raise
    # Outside of the handler, so that the traceback keeps none of the forward's tensors.
    given_up = len(streamer.plan.resident)
    streaming.forget()
    try:
        none_stay = plan_for(streamer.sizes(whole_blocks=streamer.whole_blocks), (), streamer.plan.staging_bytes)
        with lasting_allocations():
            streamer.change(none_stay)
    finally:
        if model.current_patcher is not None:
            model.current_patcher.residency_changed()
    streaming.say_once(
        f"Streaming: out of memory, so the {given_up} resident blocks were given up and the forward runs again. "
        "Forwards are now slower if the bus is slower than the GPU. A lower budget or fewer resident blocks avoid the "
        "failed attempt."
    )
    return forward()


def _is_of_comfy_kitchen(error: BaseException) -> bool:
    """Whether comfy-kitchen had no backend for the computation. Not every ComfyUI has comfy-kitchen."""
    return any(kind.__module__ == "comfy_kitchen.exceptions" for kind in type(error).__mro__)


def _picture_of(model: Any, latent: torch.Tensor) -> tuple[int, int] | None:
    """Width and height in pixels of what ``latent`` (batch, channels, ..., height, width) becomes; None for sound."""
    if latent.dim() < 4:
        return None
    scale = getattr(model.latent_format, "spacial_downscale_ratio", _PIXELS)
    return int(latent.shape[-1] * scale), int(latent.shape[-2] * scale)
