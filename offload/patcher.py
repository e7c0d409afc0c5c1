"""The ModelPatcher of a streamed model: the one file of this package that knows ComfyUI.

ComfyUI calls the patcher; the `Streamer` on the model does the work. All state that clones share sits on the
model (ComfyUI's own rule); a clone carries only its settings, so two of them may be sampled in turn.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import psutil
import torch
from comfy.cli_args import args as comfy_args
from torch import nn

from .arena import Shortfall
from .bounce import through_bounce_buffers
from .copies import copies_to
from .plan import STAGING_BYTES, ResidencyPlan, plan_by_counts
from .streamer import Streamer
from .telemetry import summarise

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024


@dataclass
class Streaming:
    """What the clones of a streamed model share; lives on the model as ``model.streaming``."""

    streamer: Streamer
    other_bytes: int


def attach_streaming(model: nn.Module, groups: Mapping[str, Sequence[nn.Module]]) -> None:
    """Move the blocks of ``model`` (by kind, in execution order) into a host arena, ready to be streamed.

    Blocks on the meta device get uninitialised memory, others keep their values.
    """
    streamer = Streamer(groups)
    total = sum(tensor.nbytes for tensor in _tensors(model))
    in_blocks = sum(tensor.nbytes for group in groups.values() for block in group for tensor in _tensors(block))
    model.streaming = Streaming(streamer, other_bytes=total - in_blocks)  # type: ignore[assignment]


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


class StreamedModelPatcher(comfy.model_patcher.ModelPatcher):
    """Keeps some of a model's blocks on the load device and streams the others at every forward.

    The model must have gone through `attach_streaming`. Settings are the patcher's own; set them on a fresh one or a
    clone. They take effect when ComfyUI loads the model the next time, and then move only the difference:
    ``resident`` is the number of resident blocks of each kind, ``staging_bytes`` the size of the ring, ``whole_blocks``
    streams blocks, not layers (done anyway where they are compiled).
    """

    resident: Mapping[str, int] = {}
    staging_bytes: int = STAGING_BYTES
    whole_blocks: bool = False

    def __init__(
        self, model: nn.Module, load_device: torch.device, offload_device: torch.device, *args: Any, **kwargs: Any
    ) -> None:
        self.load_device = load_device  # ComfyUI 0.3.64 asks for model_size() before it sets this
        super().__init__(model, load_device, offload_device, *args, **kwargs)

    def clone(self, *args: Any, **kwargs: Any) -> "StreamedModelPatcher":
        other = super().clone(*args, **kwargs)
        other.resident = self.resident
        other.staging_bytes = self.staging_bytes
        other.whole_blocks = self.whole_blocks
        return other

    @property
    def plan(self) -> ResidencyPlan:
        """What this patcher's settings ask for."""
        sizes = self._streaming.streamer.sizes(whole_blocks=self._needs_whole_blocks)
        return plan_by_counts(sizes, self.resident, self.staging_bytes)

    def model_size(self) -> int:
        """Bytes that the model wants on the load device. ComfyUI makes this much room, so it must not be the whole."""
        if self._computes_from_host:
            return self._streaming.other_bytes + self._streaming.streamer.arena.nbytes
        return self._streaming.other_bytes + self.plan.device_bytes

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False, **kwargs: Any
    ) -> int:
        """Bring the model to ``device_to`` as its settings say; returns the bytes that this added there."""
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            used = self.loaded_size()
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            try:
                self.load(device_to, force_patch_weights=force_patch_weights)
            except BaseException:
                self.detach()
                raise
            return self.loaded_size() - used

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False, **kwargs: Any
    ) -> int:
        """Frees nothing by halves; ComfyUI then unloads the model whole, which copies nothing."""
        return 0

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **kwargs: Any,
    ) -> None:
        with self.use_ejected():
            self.unpatch_hooks()
            device = self.load_device if device_to is None else device_to
            self.model.to(device)  # everything but the blocks, which keep their place
            if not self._computes_from_host:
                self._stream(device)
            self._set_weight_functions(self.patches)
            self.model.device = device
            self.model.model_lowvram = False
            self.model.model_loaded_weight_memory = self._held_bytes()
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(comfy.model_patcher.CallbacksMP.ON_LOAD):
                callback(self, device, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def cleanup(self) -> None:
        """The end of a sampling."""
        super().cleanup()
        streamer = self._streaming.streamer
        summary = summarise(streamer.telemetry, streamer.arena.pinned_bytes == streamer.arena.nbytes)
        if summary:
            logger.info("Streaming: %s", summary)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self._set_weight_functions({})
            self._streaming.streamer.stop()
        super().unpatch_model(device_to, unpatch_weights)

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Patches never change the weights, which every clone shares: see `_set_weight_functions`."""

    def pin_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> None:
        """The arena is what is pinned, and not by ComfyUI."""

    @property
    def _streaming(self) -> Streaming:
        return self.model.streaming

    @property
    def _needs_whole_blocks(self) -> bool:
        """Asked for, or a block or the whole model is run through torch.compile: by ComfyUI's node or another's."""
        wrappers = self.model_options.get("transformer_options", {}).get("wrappers", {})
        return (
            self.whole_blocks
            or any("torch.compile" in keyed for keyed in wrappers.values())
            or any(type(patch).__name__ == "OptimizedModule" for patch in self.object_patches.values())
            or any(block.module._compiled_call_impl is not None for block in self._streaming.streamer.blocks)
        )

    @property
    def _computes_from_host(self) -> bool:
        return self.load_device.type == "cpu"

    def _stream(self, device: torch.device) -> None:
        streamer, plan = self._streaming.streamer, self.plan
        limit_bytes, limited_by = _pin_limit()
        streamer.arena.pin(limit_bytes, device, limited_by)
        copies = copies_to(device)
        if not streamer.arena.all_pinned:
            copies = through_bounce_buffers(copies)
        if streamer.plan != plan:
            logger.info(
                "Streaming: %d blocks resident, %d streamed; %.0f MiB on the device (%.0f blocks, %.0f staging, "
                "%.0f other), %.0f MiB over the bus a forward",
                len(plan.resident),
                len(plan.streamed),
                self.model_size() / _MIB,
                (plan.resident_bytes + plan.small_bytes) / _MIB,
                plan.staging_bytes / _MIB,
                self._streaming.other_bytes / _MIB,
                plan.bytes_per_forward / _MIB,
            )
        streamer.start(plan, copies, whole_blocks=self._needs_whole_blocks)

    def _held_bytes(self) -> int:
        """What is on the load device now: less than `model_size` where it had no room for all residents."""
        on_device = 0 if self._computes_from_host else self._streaming.streamer.device_bytes
        return self._streaming.other_bytes + (on_device or self._streaming.streamer.arena.nbytes)

    def _set_weight_functions(self, patches: Mapping[str, Any]) -> None:
        """Have each patched layer compute its patched weight from a fresh dense copy, as ComfyUI's lowvram does."""
        for module in self.model.modules():
            if hasattr(module, "weight_function"):
                module.weight_function, module.bias_function = [], []
        skipped = []
        for key, patch in patches.items():
            path, _, name = key.rpartition(".")
            functions = getattr(comfy.utils.get_attr(self.model, path), f"{name}_function", None)
            if functions is None:
                skipped.append(key)
            else:
                functions.append(functools.partial(_patched, key, patch))
        if skipped:
            logger.warning("Streaming: %d patches not applied: %s", len(skipped), ", ".join(skipped[:4]))


def _patched(key: str, patch: Any, weight: torch.Tensor) -> torch.Tensor:
    return comfy.lora.calculate_weight(patch, weight, key, intermediate_dtype=weight.dtype)


def _pin_limit() -> tuple[int, Shortfall]:
    """How much this package may pin: a share of the RAM, less what ComfyUI pinned, none if forbidden; and why."""
    if getattr(comfy_args, "disable_pinned_memory", False):
        return 0, Shortfall("--disable-pinned-memory forbids it", "Start ComfyUI without it for full speed.")
    management = comfy.model_management
    share = 0.45 if management.WINDOWS else 0.9
    limit = psutil.virtual_memory().total * share
    comfy_limit = getattr(management, "MAX_PINNED_MEMORY", limit)
    pinned_by_comfy = getattr(management, "TOTAL_PINNED_MEMORY", 0)
    shared = max(0, min(limit, comfy_limit))
    reason = f"ComfyUI and this package may pin {shared / 2**30:.1f} GiB of the RAM together"
    return max(0, int(shared - pinned_by_comfy)), Shortfall(reason, "Unload other models, or add RAM.")
