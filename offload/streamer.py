"""Fetch, wait, release: the streamed blocks' way through the staging ring.

While one tile computes, the next ones arrive. Three rules make it right whatever the caller does - skip, repeat or
reorder blocks, stop in the middle, start again:

- The ring knows whose bytes it holds. A tile that is not there is fetched when it is called for.
- What comes next is derived from the tile that is called for, never counted.
- A tile left in use by a forward that did not finish is released by the next one.

The host waits for nothing (`bounce` apart): compute waits on the device for a tile's copy ("ready"), and each copy for
all compute that was launched before it ("free"), which is what read the bytes that it overwrites.
"""

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .arena import HostArena
from .copies import Copies
from .plan import BlockSize, ResidencyPlan, plan_for
from .record import BoundTile, RecordLayout, Views, keep_in_place, layout_of, views_of
from .ring import Ring, lay_out
from .telemetry import Telemetry

logger = logging.getLogger(__name__)


class _Block:
    """A block in host memory, and what of it is on the device."""

    def __init__(self, block: nn.Module, layout: RecordLayout, record: torch.Tensor) -> None:
        self.module = block
        self.record = record
        self.small = BoundTile(block, layout.small, record)
        self.lay_out(layout)
        self.buffer: torch.Tensor | None = None
        self.is_resident = False
        keep_in_place(block)

    def lay_out(self, layout: RecordLayout) -> None:
        """Cut the record into the tiles of ``layout``, while none of it is on the device."""
        self.layout = layout
        self.tiles = tuple(BoundTile(self.module, tile, self.record) for tile in layout.tiles)

    def bytes_for(self, resident: bool) -> torch.Tensor:
        """What of the record is always on the device: all of it, or the small part."""
        return self.record if resident else self.record[self.small.tile.offset :]

    def take(self, buffer: torch.Tensor, resident: bool) -> None:
        """Bind to ``buffer``, a copy of `bytes_for`."""
        self.buffer, self.is_resident = buffer, resident
        start = 0 if resident else self.small.tile.offset
        for part in (*self.tiles, self.small) if resident else (self.small,):
            part.bind(views_of(part.tile, buffer[part.tile.offset - start :]))

    def drop(self) -> None:
        """Give the device's bytes up: back to host memory."""
        self.buffer, self.is_resident = None, False
        for part in (*self.tiles, self.small):
            part.bind(part.home)


class _Staged:
    """A streamed tile: its place in the ring, and whether its bytes are there, from its fetch to its use."""

    def __init__(self, name: str, tile: BoundTile, place: torch.Tensor, copies: Copies) -> None:
        self.name = name
        self.tile = tile
        self.place = place
        self.nbytes = place.nbytes
        self.views: Views = views_of(tile.tile, place)
        self.ready = copies.event()
        self.present = False


class _RingMemory:
    """Staging bytes on a device. Streamers with rings of one size share them: the one that runs has them."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._user: weakref.ref[Streamer] | None = None

    def give_to(self, streamer: "Streamer") -> None:
        before = self._user() if self._user is not None else None
        if before is not None and before is not streamer:
            before._lose_ring()
        self._user = weakref.ref(streamer)


_rings: weakref.WeakKeyDictionary[Copies, weakref.WeakValueDictionary[int, _RingMemory]] = weakref.WeakKeyDictionary()


def _ring_memory(nbytes: int, copies: Copies) -> _RingMemory:
    rings = _rings.setdefault(copies, weakref.WeakValueDictionary())
    ring = rings.get(nbytes)
    if ring is None:
        ring = rings[nbytes] = _RingMemory(copies.empty(nbytes))
    return ring


class Streamer:
    """Keeps some blocks of a model resident on a device and streams the rest from host memory.

    ``groups`` maps a kind to its blocks, all in execution order. From construction on their tensors are views of
    records in one host arena; tensors that were on the meta device are uninitialised there, others keep their
    values. `start` puts a plan into effect, `stop` takes everything off the device. The blocks compute the same bits
    under every plan. Who owns the blocks keeps the streamer.

    Raises:
        ValueError: a block has no tensors, or shares one with itself or another.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Module]]) -> None:
        modules = [block for group in groups.values() for block in group]
        kinds = [kind for kind, group in groups.items() for _ in group]
        _refuse_shared(modules)
        layouts = [layout_of(block) for block in modules]
        self._kinds = kinds
        numbers: dict[RecordLayout, int] = {}
        self._structures = [numbers.setdefault(layout, len(numbers)) for layout in layouts]
        self._layouts = {False: layouts, True: [layout.whole() for layout in layouts]}
        self._whole_blocks = False
        self.arena = HostArena([layout.nbytes for layout in layouts])
        self.blocks = tuple(map(_Block, modules, layouts, self.arena.records))
        self.plan: ResidencyPlan | None = None
        self._asked: ResidencyPlan | None = None
        self.telemetry: Telemetry | None = None
        self._copies: Copies | None = None
        self._ring_memory: _RingMemory | None = None
        self._lost_ring = False
        self._ring = Ring((), (), (), ())
        self._free: Any = None
        self._staged: list[_Staged] = []
        self._active: _Staged | None = None
        self._hooks: list[RemovableHandle] = []
        self._positions: dict[tuple[int, int], int] = {}
        self._orders: dict[int, tuple[int, ...]] = {}
        self._seen: tuple[int, list[int]] = (-1, [])

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device: residents, small parts, staging (which another streamer may share)."""
        ring = 0 if self._ring_memory is None else self._ring_memory.memory.nbytes
        return ring + sum(block.buffer.nbytes for block in self.blocks if block.buffer is not None)

    def sizes(self, *, whole_blocks: bool = False) -> tuple[BlockSize, ...]:
        """What a plan is made for."""
        layouts = self._layouts[whole_blocks]
        return tuple(layout.size(kind) for kind, layout in zip(self._kinds, layouts, strict=True))

    def start(self, plan: ResidencyPlan, copies: Copies, *, whole_blocks: bool = False) -> None:
        """Put ``plan`` into effect; of a plan in effect, what both have in common stays where it is.

        Tiles are layers. A compiled block must not be entered between its layers: with ``whole_blocks`` a block is one
        tile, and the plan must be made for such sizes.

        Where the device has no room for all residents, those stay that fit, in order; ``self.plan`` tells.

        Raises:
            torch.OutOfMemoryError: not even streaming every block fits. Nothing is left on the device then.
        """
        if (self._copies, self._asked, self._whole_blocks) == (copies, plan, whole_blocks):
            return
        self._asked = plan
        if self._copies is not copies or self._whole_blocks != whole_blocks:
            self.stop()
            self._copies, self._whole_blocks, self._asked = copies, whole_blocks, plan
            for block, layout in zip(self.blocks, self._layouts[whole_blocks], strict=True):
                block.lay_out(layout)
            self._orders.clear()
        wanted = plan
        while True:
            try:
                self._apply(wanted)
                break
            except torch.OutOfMemoryError:
                held = [index for index, block in enumerate(self.blocks) if block.is_resident]
                if len(held) == len(wanted.resident):
                    if not held:
                        self.stop()
                        raise
                    held.pop()
                wanted = plan_for(self.sizes(whole_blocks=whole_blocks), held, plan.staging_bytes)
        if wanted is not plan:
            logger.warning(
                "Streaming: the device has room for %d of %d resident blocks; the others are streamed",
                len(wanted.resident),
                len(plan.resident),
            )

    def stop(self) -> None:
        """Bind every block to host memory and free everything on the device. Idempotent."""
        try:
            self._end_staging()
        finally:
            self._ring_memory = None
            for block in self.blocks:
                block.drop()
            self.plan = self._asked = self.telemetry = self._copies = None

    def _apply(self, plan: ResidencyPlan) -> None:
        self._end_staging()
        self.plan = plan
        resident = set(plan.resident)
        for index, block in enumerate(self.blocks):
            if block.is_resident != (index in resident):
                block.drop()
        self._begin_staging(plan)
        for index in plan.resident:
            if not self.blocks[index].is_resident:
                self._put(self.blocks[index], resident=True)

    def _put(self, block: _Block, resident: bool) -> None:
        """Copy what is to be always on the device there, before any compute that comes after this."""
        copies = self._require_copies()
        source = block.bytes_for(resident)
        buffer = copies.empty(source.nbytes)
        # The allocator may have handed out bytes that earlier compute still reads.
        free, ready = copies.event(), copies.event()
        copies.record(free)
        copies.copy(buffer, source, after=free, done=ready)
        copies.compute_waits(ready)
        block.take(buffer, resident)

    def _begin_staging(self, plan: ResidencyPlan) -> None:
        copies = self._require_copies()
        if self._ring_memory is None or self._ring_memory.memory.nbytes != plan.staging_bytes:
            self._ring_memory = None
            self._ring_memory = _ring_memory(plan.staging_bytes, copies)
        self._ring_memory.give_to(self)
        self._lost_ring = False
        self._free = copies.event()
        self.telemetry = Telemetry(copies)
        for index in plan.streamed:
            if self.blocks[index].buffer is None:
                self._put(self.blocks[index], resident=False)
            self._hook(index)
        self._place(plan)
        if self._staged:
            self._measure_link()
            self._fetch_all((0, *self._ring.beside[0]))

    def _measure_link(self) -> None:
        copies, first = self._require_copies(), self._staged[0]
        begun, ended = copies.event(timed=True), copies.event(timed=True)
        copies.copy(first.place, first.tile.source, after=self._free, begun=begun, done=ended)
        self._require_telemetry().link_was_measured(first.place.nbytes, begun, ended)

    def _place(self, plan: ResidencyPlan) -> None:
        """Give every streamed tile its place in the ring."""
        assert self._ring_memory is not None
        memory, copies = self._ring_memory.memory, self._require_copies()
        order = [(index, local) for index in plan.streamed for local in self._order(index)]
        tiles = [self.blocks[index].tiles[local] for index, local in order]
        self._ring = lay_out([tile.tile.nbytes for tile in tiles], plan.staging_bytes)
        self._staged = [
            _Staged(
                f"{self._kinds[index]} {index} {tile.tile.module}", tile, memory[start:][: tile.tile.nbytes], copies
            )
            for (index, _), tile, start in zip(order, tiles, self._ring.offsets, strict=True)
        ]
        self._positions = {tile: position for position, tile in enumerate(order)}
        self._released()  # what is in the ring now

    def _hook(self, index: int) -> None:
        # Weak: a block that held its streamer would keep the arena alive until the garbage collector runs.
        streamer = weakref.proxy(self)
        # A compiled block is traced with its hooks: they have to stay outside of what is compiled.
        hook: Any = torch.compiler.disable if self._whole_blocks else lambda function: function
        for local, tile in enumerate(self.blocks[index].tiles):

            def before(*_: object, key: tuple[int, int] = (index, local)) -> None:
                streamer._before(key)

            def after(*_: object, key: tuple[int, int] = (index, local)) -> None:
                streamer._after(key)

            self._hooks.append(tile.module.register_forward_pre_hook(hook(before)))
            self._hooks.append(tile.module.register_forward_hook(hook(after)))

    def _end_staging(self) -> None:
        """Empty the ring, keeping its memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._release()
        staged_tiles, self._staged = self._staged, []
        self._seen = (-1, [])
        for staged in staged_tiles:
            # Whoever gets this memory next must not meet a copy that is under way.
            self._require_copies().compute_waits(staged.ready)

    def _lose_ring(self) -> None:
        """Another streamer takes the ring: what is in it is gone."""
        self._lost_ring = True
        self._release()
        for staged in self._staged:
            staged.present = False

    def _take_ring(self) -> None:
        assert self._ring_memory is not None
        if self._lost_ring:
            self._lost_ring = False
            self._ring_memory.give_to(self)
            self._released()

    def _before(self, key: tuple[int, int]) -> None:
        self._take_ring()
        self._release()
        telemetry = self._require_telemetry()
        position = self._positions[key]
        telemetry.tile(position)
        staged = self._staged[position]
        if not staged.tile.is_bound_to(staged.tile.home):
            raise RuntimeError(
                f"the tensors of {staged.tile.tile.module or 'a block'} in streamed block {key[0]} were replaced from "
                "outside. Change weights with a patch (LoRA and the like), or load the model again."
            )
        if not staged.present:
            telemetry.missed()
            self._fetch_all((position, *self._ring.beside[position]))
        before = telemetry.before_wait()
        try:
            self._require_copies().compute_waits(staged.ready)
        except BaseException:
            staged.present = False  # its copy has failed
            raise
        if before is not None:
            telemetry.after_wait(before)
        with _label("bind", staged):
            staged.tile.bind(staged.views)
        self._active = staged

    def _after(self, key: tuple[int, int]) -> None:
        self._take_ring()
        self._release()
        self._learn_order(*key)
        self._fetch_all(self._ring.ahead[self._positions[key]])

    def _release(self) -> None:
        """Take the tile that computes, or was when its forward was cut short, off the ring."""
        if self._active is not None:
            self._active.tile.bind(self._active.tile.home)
            self._active.present = False
            self._active = None
            self._released()

    def _released(self) -> None:
        """All compute launched so far is what the next copies must wait for."""
        self._require_copies().record(self._free)

    def _fetch_all(self, positions: Sequence[int]) -> None:
        """See to it that the tiles at ``positions`` are in the ring or on their way there."""
        copies = self._require_copies()
        for position in positions:
            staged = self._staged[position]
            if not staged.present:
                for evicted in self._ring.evicted[position]:
                    self._staged[evicted].present = False
                with _label("fetch", staged):
                    copies.copy(staged.place, staged.tile.source, after=self._free, done=staged.ready)
                self._require_telemetry().copied(staged.nbytes)
                staged.present = True

    def _order(self, index: int) -> Sequence[int]:
        """A block's tiles in the order in which blocks of its structure were seen to use them."""
        return self._orders.get(self._structures[index], range(len(self.blocks[index].tiles)))

    def _learn_order(self, index: int, local: int) -> None:
        structure = self._structures[index]
        if structure in self._orders:
            return
        seen_index, seen = self._seen
        if seen_index != index:
            seen = []
            self._seen = (index, seen)
        seen.append(local)
        if len(seen) == len(self.blocks[index].tiles):
            registered = tuple(range(len(seen)))
            self._orders[structure] = tuple(seen) if set(seen) == set(registered) else registered
            if self._orders[structure] == registered:
                return
            assert self.plan is not None
            self._place(self.plan)

    def _require_telemetry(self) -> Telemetry:
        assert self.telemetry is not None
        return self.telemetry

    def _require_copies(self) -> Copies:
        assert self._copies is not None
        return self._copies


def _label(verb: str, staged: _Staged) -> AbstractContextManager[Any]:
    """A name in a profiler's trace; costs nothing where none runs."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return _NO_LABEL
    return torch.profiler.record_function(f"{verb} {staged.name}")


_NO_LABEL: AbstractContextManager[Any] = nullcontext()


def _refuse_shared(blocks: Sequence[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for tensor in (*block.parameters(), *block.buffers()):
            other = owner.setdefault(id(tensor), index)
            if other != index:
                raise ValueError(
                    f"blocks {other} and {index} ({type(block).__name__}) share a tensor of shape "
                    f"{tuple(tensor.shape)}: such blocks cannot be streamed"
                )
