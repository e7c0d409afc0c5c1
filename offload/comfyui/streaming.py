"""The state of a streamed model that all its patchers share, and the report of each patcher."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from ...memory import MIB
from .. import pinning
from ..bounce import through_bounce_buffers
from ..copies import copies_to
from ..extras import ByModule
from ..plan import ResidencyPlan, keeps_all, plan_for, spread
from ..streamer import Streamer
from ..telemetry import ForwardCost, summarise
from ..turns import turns
from .lasting import lasting_allocations
from .lora_reader import leave_out_half_pairs
from .modulation import Modulated, modulated
from .node_names import OF_MODELS, Advice
from .own_model import SharedState
from .patching import Patching
from .pins import pin_limit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamingReport:
    """What is where, and what it costs. ``node_id`` is the node that made the patcher, if it is known.

    ``wanted`` are the blocks that the settings keep resident. ``resident`` and ``streamed`` are the blocks of the plan
    in effect; None while the model is not on the device.
    """

    node_id: str | None
    kinds: tuple[str, ...]
    wanted: tuple[int, ...]
    resident: tuple[int, ...] | None
    streamed: tuple[int, ...] | None
    device_bytes: int
    host_bytes: int
    pinned_bytes: int
    link_gbps: float | None
    cost: ForwardCost | None

    @property
    def is_lowered(self) -> bool:
        """Whether less is resident than asked for."""
        return self.resident is not None and len(self.resident) < len(self.wanted)


@dataclass
class Streaming:
    """What the clones of a streamed model share. It is ``model.streaming``."""

    streamer: Streamer
    patching: Patching
    outside_bytes: int
    """Bytes of the model's tensors that are in no block."""
    only_in_ram: int = field(default=0, kw_only=True)
    """Bytes of tensors in no block that stay in RAM. ``outside_bytes`` does not count them."""
    modulation: Modulated | None = None
    """The layers in the blocks that are computed ahead, which ``streamer`` does not move."""
    said: set[str] = field(default_factory=set)
    extras: ByModule = field(default_factory=dict)
    shared: SharedState = field(default_factory=SharedState)

    @property
    def streamers(self) -> tuple[Streamer, ...]:
        return (self.streamer,) if self.modulation is None else (self.streamer, self.modulation.streamer)

    @property
    def other_bytes(self) -> int:
        """Bytes that the model has on the device beside its blocks."""
        return self.outside_bytes + (0 if self.modulation is None else self.modulation.device_bytes)

    @property
    def needed_bytes(self) -> int:
        """Bytes of the device that the model cannot do without beside its blocks, outputs computed ahead among them."""
        return self.outside_bytes + (0 if self.modulation is None else self.modulation.needed_bytes)

    @property
    def taken_bytes(self) -> int:
        """Bytes that the blocks have to leave to all else: what is needed beside them, and what patches take."""
        return self.needed_bytes + self.patching.device_bytes + self.patching.scratch_bytes

    @property
    def modulation_stays(self) -> bool:
        """Whether the weights of the modulation are all on the device now."""
        return self.modulation is not None and self.modulation.stays

    def has_room_for_modulation(self, plan: ResidencyPlan, room: float) -> bool:
        """Whether the modulation's weights may stay beside ``plan``, with ``room`` bytes for the whole model."""
        return self.modulation is not None and keeps_all(plan, self.modulation.more_bytes, room - self.taken_bytes)

    def held_bytes(self, *, from_host: bool) -> int:
        """Bytes on the device now. With ``from_host`` the device is the CPU, and all host memory counts."""
        in_all = self.ram_bytes if from_host else self.other_bytes + self.streamer.device_bytes
        return self.patching.device_bytes + in_all

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM that the model takes."""
        beside = self.outside_bytes + self.only_in_ram + self.patching.ram_bytes
        return beside + sum(streamer.ram_bytes for streamer in self.streamers)

    @property
    def host_bytes(self) -> int:
        """See `Streamer.host_bytes`."""
        return sum(streamer.host_bytes for streamer in self.streamers)

    @property
    def pinned_bytes(self) -> int:
        return sum(streamer.pinned_bytes for streamer in self.streamers)

    @property
    def all_pinned(self) -> bool:
        return all(streamer.all_pinned for streamer in self.streamers)

    def require_unchanged(self) -> None:
        """Raises `FileMapError` where somebody has written to a file that weights are in."""
        for streamer in self.streamers:
            streamer.file.require_unchanged()

    def in_host_memory(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """See `Streamer.in_host_memory`."""
        found = (streamer.in_host_memory(module, name) for streamer in self.streamers)
        return next((tensor for tensor in found if tensor is not None), None)

    def give(self, extras: ByModule) -> None:
        """Give the layers of the blocks ``extras``. If these are new, streamers must be started before a forward."""
        self.forget()
        if _by_name(extras) != _by_name(self.extras):
            ahead = frozenset() if self.modulation is None else self.modulation.ahead.modules
            self.extras = {}
            try:
                for streamer in self.streamers:
                    modules = extras.keys() & ahead if streamer is not self.streamer else extras.keys() - ahead
                    streamer.set_extras({module: tensors for module, tensors in extras.items() if module in modules})
            except BaseException:
                for streamer in self.streamers:
                    streamer.set_extras({})
                raise
        self.extras = extras

    def forget(self) -> None:
        """Keep no outputs that were computed ahead. Idempotent."""
        if self.modulation is not None:
            self.modulation.forget()

    def stop(self) -> None:
        """Take everything off the device. Idempotent."""
        self.forget()
        self.streamer.stop()
        if self.modulation is not None:
            self.modulation.stop()

    def rest(self) -> None:
        """A sampling is over: nothing of it is kept, the latest forward ends here, and the log says what it cost."""
        self.forget()
        for streamer in self.streamers:
            if streamer.telemetry is not None:
                streamer.telemetry.rest()
        if self.streamer.telemetry is not None and (summary := summarise(self.streamer.telemetry, self.all_pinned)):
            logger.info("Streaming: %s", summary)

    def say_once(self, text: str) -> None:
        """A warning in the log, the first time it is said of this model."""
        if text not in self.said:
            self.said.add(text)
            logger.warning("%s", text)

    def start(
        self,
        plan: ResidencyPlan,
        device: torch.device,
        *,
        whole_blocks: bool,
        wanted: ResidencyPlan | None,
        modulation_stays: bool,
    ) -> None:
        """Put ``plan`` into effect on ``device``, from memory that is pinned as far as ComfyUI's limits allow.

        ``modulation_stays``: whether the modulation's weights stay, if all blocks do. The log tells a plan that is new,
        and whether it keeps less than ``wanted``. See `Streamer.start` for errors.
        """
        streamer, before = self.streamer, (self.streamer.plan, self.modulation_stays)
        self._pin(device, first=plan.streamed)
        copies = copies_to(device)
        if not self.all_pinned:
            copies = through_bounce_buffers(copies)
        with lasting_allocations():
            is_alone = not plan.streamed
            if self.modulation is not None:  # its ring first: where room is short, fewer blocks are resident
                stays = modulation_stays and self.modulation.is_there
                self.modulation.start(copies, stays=stays, is_alone=is_alone)
            streamer.start(plan, copies, whole_blocks=whole_blocks)
            stays = modulation_stays and streamer.plan is not None and not streamer.plan.streamed
            if self.modulation is not None and self.modulation_stays != stays:
                self.modulation.start(copies, stays=stays, is_alone=is_alone)
                streamer.start(plan, copies, whole_blocks=whole_blocks)  # weights that now pass may have made room
        if streamer.plan is not None and (streamer.plan, self.modulation_stays) != before:
            self._say_plan(streamer.plan, wanted)

    def _pin(self, device: torch.device, first: Sequence[int]) -> None:
        """Pin the host memory as far as ComfyUI's limits allow, beginning with the blocks ``first`` (indices)."""
        if all(each.is_pinned_for(device) for each in self.streamers):
            pinning.pins_changed()  # ComfyUI may have lost count
            return  # to ask for the limit takes the system a millisecond
        limit_bytes, limited_by = pin_limit(self.host_bytes - self.pinned_bytes)
        for each in self.streamers:
            each.pin(limit_bytes, device, limited_by, first=first if each is self.streamer else ())

    def give_up(self, nbytes: float, staging_bytes: int) -> bool:
        """Free ``nbytes`` of the device: the modulation's weights go first, then resident blocks. Whether it could be
        done; if not, nothing is given up. ``staging_bytes`` is the size of a ring, where there is none yet.

        This copies the small parts of what is given up and the first tiles of the rings, but no whole block.
        """
        streamer, plan = self.streamer, self.streamer.plan
        if plan is None:
            return False
        sizes, staging = streamer.sizes(whole_blocks=streamer.whole_blocks), plan.staging_bytes or staging_bytes
        fewer = (plan_for(sizes, spread(plan.resident, count), staging) for count in range(len(plan.resident))[::-1])
        freed = self._bytes_freed_by_modulation
        found = next((one for one in (plan, *fewer) if freed + plan.device_bytes - one.device_bytes >= nbytes), None)
        if found is None:
            return False
        with lasting_allocations():
            if self.modulation is not None and self.modulation_stays:
                self.modulation.give_up()
                logger.info("Streaming: gave up the modulation's weights; they pass once for several steps")
            if found is not plan:
                streamer.change(found)
                logger.info("Streaming: gave up %d resident blocks", len(plan.resident) - len(found.resident))
        return True

    @property
    def _bytes_freed_by_modulation(self) -> int:
        modulation = self.modulation
        return modulation.more_bytes + modulation.kept_bytes if modulation is not None and modulation.stays else 0

    def _say_plan(self, plan: ResidencyPlan, wanted: ResidencyPlan | None) -> None:
        logger.info(
            "Streaming: %d blocks resident, %d streamed; %.0f MiB on the device (%.0f blocks, %.0f staging, "
            "%.0f other), %.0f MiB over the bus a forward",
            len(plan.resident),
            len(plan.streamed),
            (self.other_bytes + plan.device_bytes) / MIB,
            (plan.resident_bytes + plan.small_bytes) / MIB,
            plan.staging_bytes / MIB,
            self.other_bytes / MIB,
            plan.bytes_per_forward / MIB,
        )
        if wanted is not None and len(plan.resident) < len(wanted.resident):
            self.say_once(
                f"Streaming: there is room for {len(plan.resident)} of the {len(wanted.resident)} blocks that shall "
                "stay on the device; the others are streamed. The picture is the same."
            )

    def report(
        self, node_id: str | None, kinds: tuple[str, ...], wanted: tuple[int, ...], device_bytes: int
    ) -> StreamingReport:
        """The report of a patcher with these settings, ``device_bytes`` of whose model are on the device."""
        plan, telemetry = self.streamer.plan, self.streamer.telemetry
        return StreamingReport(
            node_id=node_id,
            kinds=kinds,
            wanted=wanted,
            resident=plan.resident if plan is not None else None,
            streamed=plan.streamed if plan is not None else None,
            device_bytes=device_bytes,
            host_bytes=self.host_bytes,
            pinned_bytes=self.pinned_bytes,
            link_gbps=telemetry.link_gbps if telemetry is not None else None,
            cost=(telemetry.last_timed or telemetry.last) if telemetry is not None else None,
        )


observers: list[Callable[[Any], None]] = []
"""Called with the `StreamedModelPatcher` after a model was loaded, a forward was timed, residency was lowered, or a
sampling ended. What they raise goes to the log."""


def tell_observers(patcher: Any) -> None:
    """Call them with ``patcher``."""
    for observer in observers:
        try:
            observer(patcher)
        except Exception:  # who only looks on must not end a prompt
            logger.exception("Streaming: a report was not delivered")


def attach_streaming(
    model: nn.Module,
    groups: Mapping[str, Sequence[nn.Module]],
    mapped: Mapping[nn.Module, Mapping[str, torch.Tensor]] | None = None,
    each: Callable[[int], None] = lambda _: None,
    twin: Streaming | None = None,
    *,
    patch_in_weights: bool = False,
) -> None:
    """Move the blocks of ``model`` (by kind, in execution order) into a host arena, ready to be streamed.

    Blocks on the meta device take what is in the arena, or get uninitialised memory; others keep their values. For
    ``mapped`` and ``each`` see `Streamer`, for ``patch_in_weights`` `Patching`. ``twin`` streams an equal model to
    another device: both share its arenas.
    """
    leave_out_half_pairs(model)
    blocks = [block for group in groups.values() for block in group]
    for block in blocks:
        block.register_forward_pre_hook(turns.pass_on)
    modulation = modulated(model, blocks, mapped or {}, each, None if twin is None else twin.modulation)
    ahead = modulation.ahead.modules if modulation is not None else frozenset()
    others = {module: tensors for module, tensors in (mapped or {}).items() if module not in ahead}
    arena = None if twin is None else twin.streamer.arena
    streamer = Streamer(groups, others, each, arena, without=ahead)
    outside_bytes = _nbytes(model) - sum(_nbytes(block) for block in blocks)
    patching = Patching(model, blocks, in_weights=patch_in_weights)
    model.streaming = Streaming(streamer, patching, outside_bytes, modulation)  # type: ignore[assignment]
    model.state_dict_for_saving = lambda *_, **__: refuse_to_save(OF_MODELS)  # type: ignore[assignment]


def _by_name(extras: ByModule) -> dict[tuple[nn.Module, str], int]:
    return {(module, name): id(tensor) for module, tensors in extras.items() for name, tensor in tensors.items()}


def _nbytes(module: nn.Module) -> int:
    own = ((*part._parameters.values(), *part._buffers.values()) for part in module.modules())
    return sum(tensor.nbytes for tensors in own for tensor in tensors if tensor is not None)


def refuse_to_save(advice: Advice) -> NoReturn:
    """Raises ValueError."""
    raise ValueError(
        "a streamed model cannot be saved by this node: it would write packed weights, or leave patches (LoRAs) out. "
        f"To save a 4-bit model use the node {advice.quantise}; to save a dense one, connect the {advice.output} from "
        "before it is streamed."
    )
