"""The ModelPatcher of a streamed model.

ComfyUI calls the patcher; the `Streamer` on the model does the work. All state that clones share sits on the
model (ComfyUI's own rule); a clone carries only its settings, so two of them may be sampled in turn.
"""

import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import nn

from .. import pinning_ahead
from ..plan import STAGING_BYTES, BlockSize, Residency, ResidencyPlan, least_device_bytes, plan_by_budget, plan_for
from .compiled import is_compiled
from .lasting import lasting_allocations
from .node_names import OF_MODELS
from .patch_check import Patch, accepted
from .patch_log import PatchRun
from .patching import add, patches_under
from .reads import ReadPatcher
from .retry import retry_with_less
from .streaming import Streaming, StreamingReport, refuse_to_save, tell_observers
from .weights import weight_of

logger = logging.getLogger(__name__)


_SETTINGS = ("residency", "staging_bytes", "whole_blocks", "compute", "node_id", "cached_patcher_init")


class StreamedModelPatcher(ReadPatcher):
    """Keeps some of a model's blocks on the load device and streams the others at every forward.

    The model must have gone through `attach_streaming`. Settings belong to the patcher: set them on a fresh one or a
    clone. They take effect when ComfyUI next loads the model, and move only the difference: ``residency`` says what
    stays, ``staging_bytes`` is the size of the ring, ``whole_blocks`` streams blocks in place of layers (compiled ones
    are streamed so in any case), ``compute`` is how layers compute that have more than one way (None: the exact one),
    ``node_id`` goes into reports.
    """

    residency = Residency()
    staging_bytes: int = STAGING_BYTES
    whole_blocks: bool = False
    node_id: str | None = None
    patch_run = PatchRun()
    advice = OF_MODELS
    cached_patcher_init: Any = None
    """ComfyUI's (0.18 and later): how it loads the model once more, for a further GPU."""
    current_hooks: Any

    def __init__(
        self, model: nn.Module, load_device: torch.device, offload_device: torch.device, *args: Any, **kwargs: Any
    ) -> None:
        # ComfyUI 0.3.64 asks for model_size() before it sets these.
        self.load_device = load_device
        self.wrappers: dict[str, Any] = {}
        self.object_patches: dict[str, Any] = {}
        super().__init__(model, load_device, offload_device, *args, **kwargs)
        self.retry_with_less_resident()

    def retry_with_less_resident(self) -> None:
        """Have forwards that run out of memory give up the resident blocks and run once more."""
        apply_model = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        self.remove_wrappers_with_key(apply_model, __name__)
        self.add_wrapper_with_key(apply_model, __name__, retry_with_less)

    def clone(self, *args: Any, **kwargs: Any) -> "StreamedModelPatcher":
        """ComfyUI's, with the settings."""
        self.patch_run = self.patch_run.tell()
        other = super().clone(*args, **kwargs)
        for name in _SETTINGS:
            setattr(other, name, getattr(self, name))
        return other

    @property
    def plan(self) -> ResidencyPlan:
        """The plan that this patcher's settings ask for."""
        return self._plan_within(math.inf)

    def report(self) -> StreamingReport:
        """Where the blocks are now, and the cost of the latest forward."""
        kinds = tuple(size.kind for size in self._sizes)
        return self._streaming.report(self.node_id, kinds, self.plan.resident, self.loaded_size())

    def require_budget(self) -> None:
        """Refuse a budget that the model cannot run in.

        Raises:
            BudgetTooSmallError: the message says what the least is.
        """
        if (budget := self.residency.budget_bytes) is not None:
            plan_by_budget(self._sizes, budget, other_bytes=self._bytes_beside_blocks)

    @property
    def _bytes_beside_blocks(self) -> int:  # of a budget
        return self._streaming.needed_bytes

    def model_size(self) -> int:
        """Bytes that the model wants on the load device: ComfyUI makes this much room. It is not the whole model.

        Weights of the modulation count only while they are there: they take room that is free, and no other model has
        to leave for them.
        """
        if self._computes_from_host:
            return self._streaming.ram_bytes
        return self._streaming.other_bytes + self._streaming.patching.device_bytes + self.plan.device_bytes

    def get_ram_usage(self) -> int:
        """Bytes of RAM that the model takes. Newer ComfyUIs choose by it what to drop when RAM is short."""
        return self._streaming.ram_bytes

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False, **kwargs: Any
    ) -> int:
        """Bring the model to ``device_to`` as its settings say, or as much of that as there is room for.

        ``extra_memory`` is the room in bytes beside what the model has there; negative, it is to take less. Returns
        the bytes that this added.

        Raises:
            ValueError: a node asks for patched weights, to read them (``force_patch_weights``), and there are patches.
        """
        if force_patch_weights and self.patches:
            refuse_to_save(self.advice)
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            used = self.loaded_size()
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            try:
                self.load(device_to, max(used + extra_memory, 1), force_patch_weights=force_patch_weights)
            except BaseException:
                self.detach()
                raise
            return self.loaded_size() - used

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False, **kwargs: Any
    ) -> int:
        """Give up residents until ``memory_to_free`` bytes are freed. Returns how many bytes that freed.

        If all together are not enough, none is given up: ComfyUI then unloads the whole model. See `Streaming.give_up`.
        """
        if self._computes_from_host:
            return 0
        before = self._held_bytes()
        try:
            self._streaming.give_up(memory_to_free, self.staging_bytes)
        finally:
            if (held := self._held_bytes()) != before:
                self.residency_changed()
        return before - held

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **kwargs: Any,
    ) -> None:
        """ComfyUI's: ``lowvram_model_memory`` is the room for the whole model in bytes; 0 means any."""
        with self.use_ejected(), pinning_ahead.paused():
            self.unpatch_hooks()
            device = self.load_device if device_to is None else device_to
            free = self._free_bytes(device)  # before anything is moved: it counts what was there
            self.model.to(device)  # everything but the blocks, which keep their place
            self._apply_patches(
                patches_under(None, self.patches, self.hook_patches), self.weight_wrapper_patches, device, self.compute
            )
            if self._computes_from_host:
                self._streaming.stop()  # another clone may have had it on a device
            else:
                room = math.inf if full_load or not lowvram_model_memory else lowvram_model_memory
                plan, for_all = self._plan_within(room), self._within_budget(min(room, free))
                self._stream(device, plan, modulation_stays=self._streaming.has_room_for_modulation(plan, for_all))
            self.model.device = device
            self.model.model_lowvram = False
            self.residency_changed()
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(comfy.model_patcher.CallbacksMP.ON_LOAD):
                callback(self, device, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def pre_run(self) -> None:
        """The beginning of a sampling.

        Raises:
            FileMapError: somebody has written to the file that the weights are in.
        """
        self.patch_run = self.patch_run.tell()
        self._streaming.require_unchanged()
        super().pre_run()

    def prepare_state(self, *args: Any, **kwargs: Any) -> None:
        """Each forward of a sampling begins here."""
        super().prepare_state(*args, **kwargs)
        telemetry = self._streaming.streamer.telemetry
        if telemetry is not None and telemetry.has_news():
            tell_observers(self)

    def cleanup(self) -> None:
        """The end of a sampling."""
        super().cleanup()
        self.report_forwards()

    def report_forwards(self) -> None:
        """Log what the forwards so far have cost, and tell the observers: the next forward may be far off."""
        self._streaming.rest()
        tell_observers(self)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """ComfyUI's; with the weights, everything leaves the device."""
        if unpatch_weights:
            self._apply_patches({}, {}, self.offload_device, compute=None)
            self._streaming.stop()
        super().unpatch_model(device_to, unpatch_weights)

    def state_dict_for_saving(self, *_: Any, **__: Any) -> None:
        """Refuse: raises ValueError."""
        refuse_to_save(self.advice)

    def add_patches(
        self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """As ComfyUI's, without the patches that do not fit; the log names these.

        Raises:
            ValueError: the patches are another model's weights, which is what nodes that merge models give.
        """
        if any(isinstance(value, list) for value in patches.values()):
            raise ValueError(
                "a streamed model cannot be merged with another: its weights stay as they are in the file. It may be "
                "the second input of the merge, with a dense model as the first one. Save the result in 4 bits (node: "
                f"{self.advice.quantise}) or stream it (node: {self.advice.stream})."
            )
        return self._add(self.patches, patches, strength_patch, strength_model)

    def add_hook_patches(
        self, hook: Any, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """As `add_patches`."""
        return self._add(self.hook_patches.setdefault(hook.hook_ref, {}), patches, strength_patch, strength_model)

    def _add(self, to: Any, patches: Mapping[Any, Any], strength: float, strength_model: float) -> list[Any]:
        # ComfyUI's own makes the whole state dict each time, and some nodes add a LoRA's patches one by one.
        with self.use_ejected():
            found = accepted(patches, self.patches, partial(weight_of, self.model), strength, strength_model)
        self.patch_run = self.patch_run.plus(patches, found, strength)
        self.patches_uuid = uuid.uuid4()
        return add(to, found.taken, strength, strength_model)

    def patch_hooks(self, hooks: Any) -> None:
        """Put the patches of ``hooks`` (a HookGroup or None) into effect, at the strengths that they have now."""
        if hooks is None and self.current_hooks is None:
            return  # nothing changes: ComfyUI asks for this at the end of each sampling
        before, stays = self._streaming.streamer.plan, self._streaming.modulation_stays
        patches = patches_under(hooks, self.patches, self.hook_patches)
        try:
            with self.use_ejected():
                self._apply_patches(patches, self.weight_wrapper_patches, self.load_device, self.compute)
                self.current_hooks = hooks
            if before is not None:
                plan = plan_for(self._sizes, before.resident, before.staging_bytes)
                self._stream(self.load_device, plan, modulation_stays=stays)
        except BaseException:
            self.current_hooks = None
            self.detach()
            raise

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        """ComfyUI's: no hook's patches count any more."""
        if self.current_hooks is not None:
            self.patch_hooks(None)

    def pin_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Does nothing: weights are in the arena, which this package pins itself."""

    @property
    def _streaming(self) -> Streaming:
        return self.model.streaming

    @property
    def _sizes(self) -> tuple[BlockSize, ...]:
        return self._streaming.streamer.sizes(whole_blocks=self._needs_whole_blocks)

    @property
    def _needs_whole_blocks(self) -> bool:
        """Whether to stream whole blocks: it is asked for, or a node runs blocks or the model through torch.compile."""
        return self.whole_blocks or is_compiled(self)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return self.model.manual_cast_dtype or self.model.get_dtype()

    @property
    def _computes_from_host(self) -> bool:
        return self.load_device.type == "cpu"

    def _plan_within(self, room: float) -> ResidencyPlan:
        """The best plan for ``room`` bytes of the device within the settings; the least one if nothing fits."""
        sizes, limit = self._sizes, self._within_budget(room) - self._streaming.taken_bytes
        return plan_by_budget(sizes, max(limit, least_device_bytes(sizes)), self.staging_bytes, self.residency.counts)

    def _within_budget(self, room: float) -> float:
        """What the settings allow the whole model of ``room`` bytes."""
        budget = self.residency.budget_bytes
        return room if budget is None else min(room, budget)

    def _free_bytes(self, device: torch.device) -> float:
        """Bytes that the model has on ``device`` or could have there, and leave what ComfyUI wants at the least."""
        free: int = comfy.model_management.get_free_memory(device)
        return self.loaded_size() + free - comfy.model_management.minimum_inference_memory()

    def _stream(self, device: torch.device, plan: ResidencyPlan, *, modulation_stays: bool) -> None:
        wanted, whole = None if self.residency == Residency() else self.plan, self._needs_whole_blocks
        self._streaming.start(plan, device, whole_blocks=whole, wanted=wanted, modulation_stays=modulation_stays)

    def residency_changed(self) -> None:
        """Tell ComfyUI and the observers how much is on the device now."""
        self.model.model_loaded_weight_memory = self._held_bytes()
        self._share_state()
        tell_observers(self)

    def _held_bytes(self) -> int:
        """Bytes on the load device now: fewer than `model_size` where it had no room for all residents."""
        return self._streaming.held_bytes(from_host=self._computes_from_host)

    def _apply_patches(
        self,
        patches: Mapping[str, Sequence[Patch]],
        wrappers: Mapping[str, Any],
        device: torch.device,
        compute: str | None,
    ) -> None:
        """Have the model compute on ``device``, by ``compute``, with ``patches``, then with ComfyUI's ``wrappers``."""
        patching, casts, dtype = self._streaming.patching, self.force_cast_weights, self._compute_dtype
        with lasting_allocations():
            self._streaming.give(patching.apply(patches, wrappers, device, dtype, casts=casts, compute=compute))
