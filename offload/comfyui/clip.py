"""A CLIP of ComfyUI's whose text encoders are streamed, layer by layer, within a budget of their own."""

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import nn

from ...memory import is_out_of_memory
from ..plan import Residency, ResidencyPlan, plan_for
from .adopt import Kind, stream_model
from .block_lists import lists_of_encoders
from .large_layers import LargeLayers
from .node_names import OF_ENCODERS
from .patch_check import name_and_place
from .patcher import StreamedModelPatcher
from .patching import patches_under
from .retry import with_less
from .streaming import attach_streaming, refuse_to_save
from .weights import weight_of

_WIDEST_AT_ONCE = 2
"""How many times the widest expanded weight fits into what is left for a forward. An output that comes to lie where one
weight was makes the allocator take new memory for the next one of that size. With a prompt of 512 tokens Mistral 3 uses
0.83 GiB at once; an allocator that reuses the smallest piece holds 1.43 GiB for that (computed)."""


class StreamedEncoders(nn.Module):
    """Before the class of ``CLIP.cond_stage_model``: what encoding a prompt has around it.

    A prompt that runs out of memory is encoded once more with no layer resident. Raises FileMapError where somebody has
    written to the file that the weights are in.
    """

    streaming: Any
    patcher_of: Callable[[], Any] = staticmethod(lambda: None)
    """A weak reference to the patcher that has loaded it."""

    @property
    def current_patcher(self) -> Any:
        """What ComfyUI's diffusion models have: the patcher that has loaded it.

        ComfyUI sets it before a run, and to None after one. The patcher that has loaded the model stays the same."""
        return self.patcher_of()

    @current_patcher.setter
    def current_patcher(self, patcher: Any) -> None:
        if patcher is not None:
            self.patcher_of = weakref.ref(patcher)

    def encode_token_weights(self, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's."""
        encode: Any = super().encode_token_weights  # type: ignore[misc]
        return self._run(lambda: encode(*args, **kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's, where it has it."""
        generate: Any = super().generate  # type: ignore[misc]
        return self._run(lambda: generate(*args, **kwargs))

    def _run(self, forward: Callable[[], Any]) -> Any:
        self.streaming.streamer.file.require_unchanged()
        try:
            return with_less(self, forward)
        finally:
            if self.current_patcher is not None:
                self.current_patcher.report_forwards()


def stream_encoders(model: nn.Module) -> None:
    """Make the text encoders ``model``, which went through `attach_streaming`, those of a `StreamedEncoderPatcher`."""
    streaming: Any = model.streaming
    blocks = [block.module for block in streaming.streamer.blocks]
    large = LargeLayers(model, blocks)
    streaming.outside_bytes -= large.nbytes_of(large.layers)
    streaming.only_in_ram += large.nbytes_of(large.layers)
    streaming.patching.in_host_memory = large.layers
    model.large_layers = large  # type: ignore[assignment]
    layers = (layer for block in blocks for layer in block.modules())
    model.widest_bytes = max((_expanded_bytes(layer) for layer in layers), default=0)  # type: ignore[assignment]
    model.__class__ = type(f"Streamed{type(model).__name__}", (StreamedEncoders, type(model)), {})


def _expanded_bytes(layer: nn.Module) -> int:
    """Bytes of the dense weight that a Linear makes in each forward, in the fp32 that text encoders compute in."""
    if not isinstance(layer, nn.Linear):
        return 0
    kept: Any = layer._parameters.get("weight")  # a 4-bit weight is no parameter
    is_dense = kept is not None and kept.dtype == torch.float32
    return 0 if is_dense else layer.out_features * layer.in_features * torch.float32.itemsize


class StreamedEncoderPatcher(StreamedModelPatcher):
    """Of the text encoders of one CLIP. The model must have gone through `attach_streaming` and have ``large_layers``.

    It asks ComfyUI only for what it needs with every layer streamed, so that a prompt pushes off the device only what
    it cannot do without. Of what is free beyond that it takes as much as its settings allow.
    """

    advice = OF_ENCODERS

    def retry_with_less_resident(self) -> None:
        """Nothing: ComfyUI runs no wrapper around text encoders, so `StreamedEncoders` does it."""

    def _add(self, to: Any, patches: Mapping[Any, Any], strength: float, strength_model: float) -> list[Any]:
        # ComfyUI hands the patches of the MODEL on to the CLIP as well: that they are not for it is no news.
        own = {
            name: value for name, value in patches.items() if weight_of(self.model, name_and_place(name)[0]) is not None
        }
        return super()._add(to, own, strength, strength_model) if own else []

    def take_own_model(self) -> None:
        """Nothing: a CLIP and its patcher have one model object, and nodes keep their settings on the CLIP."""

    def model_size(self) -> int:
        """Bytes that must be on the load device, or are there."""
        if self._computes_from_host:
            return super().model_size()
        streaming = self._streaming
        needed = streaming.other_bytes + streaming.patching.device_bytes + self._all_streamed.device_bytes
        held: int = getattr(self.model, "model_loaded_weight_memory", 0)
        return max(needed, held)

    def load(
        self, device_to: torch.device | None = None, lowvram_model_memory: float = 0, *args: Any, **kwargs: Any
    ) -> None:
        """As of any streamed model; and if all of it has room, the large layers come along."""
        device = self.load_device if device_to is None else device_to
        self._place_large_layers(device, self._beside_a_forward(lowvram_model_memory or math.inf))
        super().load(device_to, lowvram_model_memory, *args, **kwargs)
        self.model.patcher_of = weakref.ref(self)

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> int:
        """As of any streamed model; the large layers go first."""
        freed = self._large.device_bytes
        if freed:
            self._move_large_layers(self._large.take_back)
            self.residency_changed()
        if freed >= memory_to_free:
            return freed
        return freed + super().partially_unload(device_to, memory_to_free - freed, *args, **kwargs)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """ComfyUI's; with the weights, everything leaves the device."""
        if unpatch_weights:
            self._move_large_layers(self._large.take_back)
        super().unpatch_model(device_to, unpatch_weights)

    def _place_large_layers(self, device: torch.device, room: float) -> None:
        """Have those without patches on ``device`` if the model has ``room`` there (bytes), else all in host memory."""
        large, sizes, budget = self._large, self._sizes, self.residency.budget_bytes
        unpatched = frozenset(large.layers) - self._patched_layers
        taken = self._streaming.patching.device_bytes + plan_for(sizes, range(len(sizes))).device_bytes
        others = self._streaming.other_bytes - large.device_bytes + large.nbytes_of(unpatched)
        if self._computes_from_host or others + taken > min(room, math.inf if budget is None else budget):
            self._move_large_layers(large.take_back)
            return
        try:
            self._move_large_layers(lambda: large.bring_to(device, unpatched))
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    def _move_large_layers(self, move: Callable[[], None]) -> None:
        """Call ``move``, and count where they are after it."""
        before = self._large.device_bytes
        try:
            move()
        finally:
            brought = self._large.device_bytes - before
            self._streaming.outside_bytes += brought
            self._streaming.only_in_ram -= brought

    @property
    def _patched_layers(self) -> set[nn.Module]:
        """The large layers whose weight has patches, a hook's too."""
        keys = {f"{path}.weight": layer for path, layer in self.model.named_modules() if layer in self._large.layers}
        return {keys[key] for key in patches_under(None, self.patches, self.hook_patches) if key in keys}

    def _plan_within(self, room: float) -> ResidencyPlan:
        return super()._plan_within(self._beside_a_forward(room))

    def _beside_a_forward(self, room: float) -> float:
        """How many bytes of ``room`` are for weights. The forward has what ComfyUI left beside it, too."""
        kept = comfy.model_management.minimum_inference_memory() - comfy.model_management.extra_reserved_memory()
        return room - max(0, _WIDEST_AT_ONCE * self.model.widest_bytes - kept)

    @property
    def _bytes_beside_blocks(self) -> int:
        # The large layers leave the device before a budget is too small for them.
        return super()._bytes_beside_blocks - self._large.device_bytes

    @property
    def _all_streamed(self) -> ResidencyPlan:
        """The least of what runs at full speed: every layer streamed, or what there is if that is less."""
        plan = self.plan
        streamed = plan_for(self._sizes, (), plan.staging_bytes or self.staging_bytes)
        return min(plan, streamed, key=lambda either: either.device_bytes)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.float32  # ComfyUI's text encoders bring everything there

    @property
    def _large(self) -> LargeLayers:
        large: LargeLayers = self.model.large_layers
        return large


class StreamedClip(comfy.sd.CLIP):
    """ComfyUI's CLIP with a `StreamedEncoderPatcher`."""

    patcher: StreamedEncoderPatcher
    cond_stage_model: Any
    cloned_from: "StreamedClip | None" = None
    """The CLIP that was loaded: it lives as long as a clone does."""

    def clone(self, *args: Any, **kwargs: Any) -> "StreamedClip":
        other: Any = super().clone(*args, **kwargs)
        other.__class__ = StreamedClip
        other.cloned_from = self.cloned_from or self
        return other

    def get_sd(self) -> None:
        """Refuse: raises ValueError."""
        refuse_to_save(OF_ENCODERS)

    state_dict_for_saving = get_sd


def clip_with(clip: comfy.sd.CLIP, patcher: StreamedEncoderPatcher) -> StreamedClip:
    """``clip`` with its settings and tokenizer, and ``patcher`` in the place of its own."""
    other: Any = clip.clone()
    other.__class__ = StreamedClip
    other.patcher, other.cond_stage_model = patcher, patcher.model
    return other


def _attach(model: nn.Module, lists: Mapping[str, list[nn.Module]], each: Callable[[int], None]) -> None:
    attach_streaming(model, lists, each=each, patch_in_weights=True)
    stream_encoders(model)


_ENCODERS = Kind(StreamedEncoderPatcher, lists_of_encoders, _attach, OF_ENCODERS)


def stream_clip(clip: comfy.sd.CLIP, residency: Residency, node_id: str | None) -> comfy.sd.CLIP:
    """A clone of ``clip``, with its patches and options, whose layers are streamed as ``residency`` says.

    See `stream_model`, also for errors.
    """
    patcher = stream_model(clip.patcher, residency, node_id, _ENCODERS)
    return clip_with(clip, patcher) if isinstance(patcher, StreamedEncoderPatcher) else clip
