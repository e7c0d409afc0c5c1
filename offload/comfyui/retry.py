"""A forward that fails: one that runs out of the device's memory gives the resident blocks up and runs once more, and
one that comfy-kitchen has no kernel for says what to do."""

from collections.abc import Callable
from importlib import metadata
from typing import Any

from ...memory import is_out_of_memory
from ..plan import plan_for
from .lasting import lasting_allocations
from .streaming import Streaming


def retry_with_less(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's wrapper of a forward (``WrappersMP.APPLY_MODEL``)."""
    return with_less(executor.class_obj, lambda: executor(*args, **kwargs))


def with_less(model: Any, forward: Callable[[], Any]) -> Any:
    """What ``forward`` of a streamed model gives, if need be of a second run with no block resident.

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
    try:
        none_stay = plan_for(streamer.sizes(whole_blocks=streamer.whole_blocks), (), streamer.plan.staging_bytes)
        with lasting_allocations():
            streamer.change(none_stay)
    finally:
        if model.current_patcher is not None:
            model.current_patcher.residency_changed()
    streaming.say_once(
        f"Streaming: out of memory, so the {given_up} resident blocks were given up and the forward runs again. It is "
        "slower where the bus is; a lower budget or fewer resident blocks avoid the first attempt."
    )
    return forward()
    return executor(*args, **kwargs)


def _is_of_comfy_kitchen(error: BaseException) -> bool:
    """Whether none of its backends could compute what it was asked for. Not every ComfyUI has it."""
    return any(kind.__module__ == "comfy_kitchen.exceptions" for kind in type(error).__mro__)
