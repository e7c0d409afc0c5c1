"""What makes a model a streamed one: what all its patchers share, and what each of them reports."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...memory import MIB
from ..arena import HostArena
from ..bounce import through_bounce_buffers
from ..copies import copies_to
from ..plan import ResidencyPlan
from ..streamer import Streamer
from ..telemetry import ForwardCost
from .lasting import lasting_allocations
from .lora_reader import leave_out_half_pairs
from .node_names import QUANTISE
from .patching import Extras, Patching
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
    other_bytes: int
    said: set[str] = field(default_factory=set)
    extras: Extras = field(default_factory=dict)

    def give(self, extras: Extras) -> None:
        """Give the layers of the blocks ``extras``. If these are new, the streamer must be started before a forward."""
        if _by_name(extras) != _by_name(self.extras):
            self.extras = {}  # what the layers have if the next line fails
            self.streamer.set_extras(extras)
        self.extras = extras

    def say_once(self, text: str) -> None:
        """A warning in the log, the first time it is said of this model."""
        if text not in self.said:
            self.said.add(text)
            logger.warning("%s", text)

    def start(
        self, plan: ResidencyPlan, device: torch.device, *, whole_blocks: bool, wanted: ResidencyPlan | None
    ) -> None:
        """Put ``plan`` into effect on ``device``, from memory that is pinned as far as ComfyUI's limits allow.

        The log tells a plan that is new, and whether it keeps less than ``wanted``. See `Streamer.start` for errors.
        """
        streamer, before = self.streamer, self.streamer.plan
        limit_bytes, limited_by = pin_limit(streamer.host_bytes - streamer.pinned_bytes)
        streamer.pin(limit_bytes, device, limited_by, first=plan.streamed)
        copies = copies_to(device)
        if not streamer.all_pinned:
            copies = through_bounce_buffers(copies)
        with lasting_allocations():
            streamer.start(plan, copies, whole_blocks=whole_blocks)
        if streamer.plan is not None and streamer.plan != before:
            self._say_plan(streamer.plan, wanted)

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
            host_bytes=self.streamer.host_bytes,
            pinned_bytes=self.streamer.pinned_bytes,
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
    arena: HostArena | None = None,
    *,
    patch_in_weights: bool = False,
) -> None:
    """Move the blocks of ``model`` (by kind, in execution order) into a host arena, ready to be streamed.

    Blocks on the meta device take what is in the arena, or get uninitialised memory; others keep their values. For
    ``mapped``, ``each`` and ``arena`` see `Streamer`, for ``patch_in_weights`` `Patching`.
    """
    leave_out_half_pairs()
    streamer = Streamer(groups, mapped, each, arena)
    blocks = [block for group in groups.values() for block in group]
    in_blocks = sum(_nbytes(block) for block in blocks)
    patching = Patching(model, blocks, in_weights=patch_in_weights)
    model.streaming = Streaming(streamer, patching, other_bytes=_nbytes(model) - in_blocks)  # type: ignore[assignment]
    model.state_dict_for_saving = refuse_to_save  # type: ignore[assignment]


def _by_name(extras: Extras) -> dict[tuple[nn.Module, str], int]:
    return {(module, name): id(tensor) for module, tensors in extras.items() for name, tensor in tensors.items()}


def _nbytes(module: nn.Module) -> int:
    own = ((*part._parameters.values(), *part._buffers.values()) for part in module.modules())
    return sum(tensor.nbytes for tensors in own for tensor in tensors if tensor is not None)


def refuse_to_save(*_: Any, **__: Any) -> None:
    """Raises ValueError."""
    raise ValueError(
        "a streamed model cannot be saved by this node: it would write wrong packed weights and patches. To save a "
        f"4-bit model use the node {QUANTISE}; to save a dense one, connect the MODEL from before it is streamed."
    )
