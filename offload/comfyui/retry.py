"""A forward that runs out of the device's memory: it gives the resident blocks up and runs once more."""

from collections.abc import Callable
from typing import Any

from ...memory import is_out_of_memory
from ..plan import plan_for
from .coming_steps import note_step
from .lasting import lasting_allocations
from .streaming import Streaming


def retry_with_less(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's wrapper of a forward (``WrappersMP.APPLY_MODEL``). The modulation learns which step it is.

    ComfyUI's guider of two models calls the second with the wrappers of the first, and that one need not be streamed.
    """
    model = executor.class_obj
    if not hasattr(model, "streaming"):
        return executor(*args, **kwargs)
    note_step(model, args)
    return with_less(model, lambda: executor(*args, **kwargs))


def with_less(model: Any, forward: Callable[[], Any]) -> Any:
    """What ``forward`` of a streamed model gives, if need be of a second run with no block resident."""
    streaming: Streaming = model.streaming
    streamer = streaming.streamer
    try:
        return forward()
    except Exception as error:
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
