"""Fetch, wait, release: the streamed blocks' way through the staging slots.

While block i computes out of one slot, the next streamed block arrives in the other. Three rules make it right
whatever the caller does - skip, repeat or reorder blocks, stop in the middle, start again:

- A slot knows whose bytes it holds. A block that finds them in no slot fetches its own.
- What comes next is derived from the block that is called, never counted.
- A block left bound to a slot by a forward that did not finish is released by the next one.

The host waits for nothing: the copy stream waits for "free" (the compute that read the slot), compute waits for
"ready" (the copy that filled it).
"""

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .arena import HostArena
from .copies import Copies
from .plan import BlockSize, ResidencyPlan
from .record import BoundBlock, RecordLayout, Views, layout_of, views_of


class _Slot:
    """One staging buffer on the device, with the two events that guard its bytes."""

    def __init__(self, nbytes: int, layouts: set[RecordLayout], copies: Copies) -> None:
        self.buffer = _device_bytes(nbytes, copies)
        self.layouts = layouts
        self.bytes_of = {layout: self.buffer[: layout.nbytes] for layout in layouts}
        self.views_of: dict[RecordLayout, Views] = {layout: views_of(layout, self.buffer) for layout in layouts}
        self.holds: int | None = None
        self.ready = copies.event()
        self.free = copies.event()
        # The allocator may have handed out memory that earlier compute still reads.
        copies.record(self.free)


class Streamer:
    """Keeps some blocks of a model resident on a device and streams the rest from host memory.

    ``groups`` maps a kind to its blocks, all in execution order.
    From construction on the blocks' tensors are views of records in one host arena; tensors that were on the meta
    device are uninitialised there, others keep their values. `start` puts a plan into effect, `stop` takes
    everything off the device. The blocks compute the same bits under every plan.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Module]]) -> None:
        blocks = [block for group in groups.values() for block in group]
        kinds = [kind for kind, group in groups.items() for _ in group]
        layouts = [layout_of(block) for block in blocks]
        self.sizes = tuple(BlockSize(kind, layout.nbytes) for kind, layout in zip(kinds, layouts, strict=True))
        self.arena = HostArena([layout.nbytes for layout in layouts])
        self.blocks = tuple(BoundBlock(block, layout) for block, layout in zip(blocks, layouts, strict=True))
        self._host_views = tuple(
            views_of(layout, record) for layout, record in zip(layouts, self.arena.records, strict=True)
        )
        for index in range(len(self.blocks)):
            self._adopt(index)
        self.plan: ResidencyPlan | None = None
        self._copies: Copies | None = None
        self._slots: list[_Slot] = []
        self._residents: dict[int, torch.Tensor] = {}
        self._following: dict[int, tuple[int, ...]] = {}
        self._active: tuple[int, _Slot] | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device: residents and staging slots."""
        return sum(buffer.nbytes for buffer in self._residents.values()) + sum(s.buffer.nbytes for s in self._slots)

    def start(self, plan: ResidencyPlan, copies: Copies) -> None:
        """Put ``plan`` into effect; of a plan in effect, what both have in common stays where it is."""
        if self._copies is not copies:
            self.stop()
        self._release()
        self.plan, self._copies = plan, copies
        self._resize_staging(plan, copies)
        for index in self._residents.keys() - set(plan.resident):
            self.blocks[index].bind(self._host_views[index])
            del self._residents[index]
        for index in plan.resident:
            if index not in self._residents:
                self._make_resident(index, copies)
        depth = plan.slots + 1
        self._following = {
            index: tuple(plan.streamed[(position + step) % len(plan.streamed)] for step in range(depth))
            for position, index in enumerate(plan.streamed)
        }
        self._hook(plan.streamed)

    def stop(self) -> None:
        """Bind every block to host memory and free everything on the device. Idempotent."""
        self._release()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for slot in self._slots:
            # The allocator may hand this memory to compute while a copy into it is under way.
            self._require_copies().compute_waits(slot.ready)
        for index in self._residents:
            self.blocks[index].bind(self._host_views[index])
        self._slots.clear()
        self._residents.clear()
        self._following = {}
        self.plan = self._copies = None

    def _adopt(self, index: int) -> None:
        block, views = self.blocks[index], self._host_views[index]
        with torch.inference_mode(False), torch.no_grad():
            for (tensors, name), view in zip(block.targets, views, strict=True):
                if not tensors[name].is_meta:
                    view.copy_(tensors[name])
        block.bind(views)

    def _make_resident(self, index: int, copies: Copies) -> None:
        record = self.arena.records[index]
        buffer = _device_bytes(record.nbytes, copies)
        buffer.copy_(record, non_blocking=True)
        self.blocks[index].bind(views_of(self.blocks[index].layout, buffer))
        self._residents[index] = buffer

    def _resize_staging(self, plan: ResidencyPlan, copies: Copies) -> None:
        layouts = {self.blocks[index].layout for index in plan.streamed}
        fits = all(slot.buffer.nbytes == plan.slot_bytes and slot.layouts == layouts for slot in self._slots)
        if fits and len(self._slots) == plan.slots:
            return
        for slot in self._slots:
            copies.compute_waits(slot.ready)
        self._slots.clear()
        self._slots.extend(_Slot(plan.slot_bytes, layouts, copies) for _ in range(plan.slots))

    def _hook(self, streamed: Sequence[int]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        # Weak: a block that held its streamer would keep the arena alive until the garbage collector runs.
        streamer = weakref.proxy(self)
        for index in streamed:
            block = self.blocks[index].block
            self._hooks.append(block.register_forward_pre_hook(lambda *_, index=index: streamer._before(index)))
            self._hooks.append(block.register_forward_hook(lambda *_, index=index: streamer._after(index)))

    def _before(self, index: int) -> None:
        self._release()
        self._prefetch(self._following[index][:-1])
        slot = self._slot_of(index)
        assert slot is not None
        self._require_copies().compute_waits(slot.ready)
        self.blocks[index].bind(slot.views_of[self.blocks[index].layout])
        self._active = (index, slot)

    def _after(self, index: int) -> None:
        self._release()
        self._prefetch(self._following[index][1:])

    def _release(self) -> None:
        """Take the block that is computing, or was when its forward was cut short, out of its slot."""
        if self._active is None:
            return
        index, slot = self._active
        self._active = None
        self.blocks[index].bind(self._host_views[index])
        self._require_copies().record(slot.free)

    def _prefetch(self, indices: Sequence[int]) -> None:
        """See to it that each of ``indices`` is in a slot or on its way there."""
        for index in indices:
            if self._slot_of(index) is None:
                self._fetch(index, next(slot for slot in self._slots if slot.holds not in indices))

    def _fetch(self, index: int, slot: _Slot) -> None:
        slot.holds = None
        destination = slot.bytes_of[self.blocks[index].layout]
        self._require_copies().copy(destination, self.arena.records[index], after=slot.free, done=slot.ready)
        slot.holds = index

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == index), None)

    def _require_copies(self) -> Copies:
        assert self._copies is not None
        return self._copies


def _device_bytes(nbytes: int, copies: Copies) -> torch.Tensor:
    # An ordinary tensor: forwards may run in inference mode on one thread and outside it on another.
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=copies.device)
