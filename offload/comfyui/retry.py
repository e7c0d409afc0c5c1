"""A forward that fails: one that runs out of the device's memory gives up what is resident and runs once more, one that
was taken for another step runs once more, and one that comfy-kitchen has no kernel for says what to do."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import metadata
from typing import Any

import torch

from ...memory import is_out_of_memory
from ..plan import ResidencyPlan, plan_for
from ..turns import turns
from .coming_steps import note_step
from .company import has_company, has_company_now
from .lasting import lasting_allocations
from .streaming import Streaming

_PIXELS = 8
"""Pixels of a latent's side, where ComfyUI's format of it does not say."""


def retry_with_less(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's wrapper of a forward (``WrappersMP.APPLY_MODEL``). The modulation learns which step it is.

    ComfyUI's guider of two models calls the second with the wrappers of the first, and that one need not be streamed.

    Raises:
        RuntimeError: see `with_less` and `SharedState.require_in_effect`.
    """
    model = executor.class_obj
    if not hasattr(model, "streaming"):
        return executor(*args, **kwargs)
    model.streaming.shared.require_in_effect(model)
    latent, sigma, options = _by_name(*args, **kwargs)
    note_step(model, sigma, options)
    telemetry = model.streaming.streamer.telemetry
    if telemetry is not None:
        telemetry.picture = _picture_of(model, latent)

    def forward() -> Any:
        # Compiled blocks run no hooks that would pass the turn on.
        with nullcontext() if model.streaming.streamer.whole_blocks else turns.taken():
            return with_less(model, lambda: executor(*args, **kwargs))

    return _guessed(model, options, forward)


def _by_name(
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: Mapping[str, Any] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, Any]]:
    """Latent, sigma and options of the arguments of ComfyUI's ``BaseModel.apply_model``.

    Other packages' wrappers may give some of them by name.
    """
    return x, t, transformer_options or {}


def _guessed(model: Any, options: Mapping[str, Any], forward: Callable[[], Any]) -> Any:
    """The output of ``forward``. It runs again if it was not the forward for which modulation was computed ahead."""
    modulation = model.streaming.modulation
    if modulation is None or not modulation.ahead.may_guess or _has_company(model, options):
        return forward()
    ahead = modulation.ahead
    with ahead.guessing() as guesses:
        output = forward()
    if guesses.are_right():  # here the host waits, while other threads have the turn
        return output
    del output
    ahead.was_wrong()
    return forward()


def _has_company(model: Any, options: Mapping[str, Any]) -> bool:
    ahead = model.streaming.modulation.ahead
    if ahead.company is None or ahead.company[0] != id(model):  # once in a sampling
        ahead.company = id(model), has_company(model)
    return ahead.company[1] or has_company_now(model, options)


def with_less(model: Any, forward: Callable[[], Any]) -> Any:
    """The output of a streamed model's ``forward``.

    If memory runs out, it runs again without the modulation's weights on the device, then with no block resident.

    Raises:
        RuntimeError: comfy-kitchen cannot compute the model's format on this device.
    """
    streaming: Streaming = model.streaming
    streamer = streaming.streamer
    plan, before = streamer.plan, (streamer.plan, streaming.modulation_stays)
    try:
        return forward()
    except Exception as error:
        if _is_of_comfy_kitchen(error):
            raise RuntimeError(
                f"comfy-kitchen {metadata.version('comfy-kitchen')} cannot compute this model's format on "
                f"{model.device} ({error}). Update ComfyUI and its requirements, or load the model from a file in "
                "bf16, fp16 or fp8."
            ) from error
        if not is_out_of_memory(error) or plan is None or not (plan.resident or streaming.modulation_stays):
            raise
        failure = error.with_traceback(None)
    # Outside of the handler, so that the traceback keeps none of the forward's tensors.
    streaming.forget()
    if streaming.modulation is not None:
        streaming.modulation.ahead.begin_again()
    try:
        given_up = _give_up(streaming, plan)
    finally:
        if model.current_patcher is not None:
            model.current_patcher.residency_changed()
    if (streamer.plan, streaming.modulation_stays) == before:
        raise failure
    streaming.say_once(
        f"Streaming: out of memory in {type(model).__name__}, so {given_up} given up and the forward runs again. "
        "Forwards are now slower if the bus is slower than the GPU. A lower budget or fewer resident blocks avoid the "
        "failed attempt."
    )
    return with_less(model, forward)


def _give_up(streaming: Streaming, plan: ResidencyPlan) -> str:
    """Take the modulation's weights off the device, else all blocks that ``plan`` keeps. Says which it was."""
    streamer = streaming.streamer
    with lasting_allocations():
        if streaming.modulation is not None and streaming.modulation_stays:
            streaming.modulation.give_up()
            return "the modulation's weights were"
        streamer.change(plan_for(streamer.sizes(whole_blocks=streamer.whole_blocks), (), plan.staging_bytes))
        return f"the {len(plan.resident)} resident blocks were"


def _is_of_comfy_kitchen(error: BaseException) -> bool:
    """Whether comfy-kitchen had no backend for the computation. Not every ComfyUI has comfy-kitchen."""
    return any(kind.__module__ == "comfy_kitchen.exceptions" for kind in type(error).__mro__)


def _picture_of(model: Any, latent: torch.Tensor) -> tuple[int, int] | None:
    """Width and height in pixels of what ``latent`` (batch, channels, ..., height, width) becomes; None for sound."""
    if latent.dim() < 4:
        return None
    scale = getattr(model.latent_format, "spacial_downscale_ratio", _PIXELS)
    return int(latent.shape[-1] * scale), int(latent.shape[-2] * scale)
