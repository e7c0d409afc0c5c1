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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .arena import THE_LIMIT, HostArena, Shortfall
from .block import Block, Extras, HostRecord, MappedRecord, blocks_in_host_memory, extras_in, refuse_shared
from .copies import Copies
from .plan import BlockSize, ResidencyPlan, plan_for, spread
from .record import RecordLayout, extras_layouts, layout_of
from .ring import Ring, lay_out
from .staging import RingMemory, Staged, ring_memory
from .telemetry import Telemetry

logger = logging.getLogger(__name__)


class Streamer:
    """Keeps some blocks of a model resident on a device and streams the rest from host memory.

    ``groups`` maps a kind to its blocks, all in execution order. From construction on their tensors are views of
    records in one host arena; tensors that were on the meta device are uninitialised there, others keep their
    values; ``each`` is told the index of each block that has moved, so that its old memory can go before the next one
    moves. `start` puts a plan into effect, `stop` takes everything off the device. The blocks compute the same bits
    under every plan. Who owns the blocks keeps the streamer.

    Raises:
        ValueError: a block has no tensors, or shares one with itself or another.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Module]],
        mapped: Mapping[nn.Module, Mapping[str, torch.Tensor]] | None = None,
        each: Callable[[int], None] = lambda _: None,
    ) -> None:
        modules = [block for group in groups.values() for block in group]
        kinds = [kind for kind, group in groups.items() for _ in group]
        refuse_shared(modules)
        layouts = [layout_of(block) for block in modules]
        numbers: dict[RecordLayout, int] = {}
        self._structures = [numbers.setdefault(layout, len(numbers)) for layout in layouts]
        self.whole_blocks = False
        self._places = {
            module: (index, path) for index, block in enumerate(modules) for path, module in block.named_modules()
        }
        apart = [
            {(path, name): tensor for path, named in tensors.items() for name, tensor in named.items()}
            for tensors in self._by_block(mapped or {}, len(modules))
        ]
        self.blocks, self.arena = blocks_in_host_memory(modules, kinds, layouts, apart, each)
        # Who else uses the memory has no use for its being pinned.
        weakref.finalize(self, self.arena.unpin).atexit = False
        self.extras_arena: HostArena | None = None
        self._extras: dict[tuple[int, str, str], weakref.ref[torch.Tensor]] = {}
        self.plan: ResidencyPlan | None = None
        self._asked: ResidencyPlan | None = None
        self.telemetry: Telemetry | None = None
        self._copies: Copies | None = None
        self._ring_memory: RingMemory | None = None
        self._lost_ring = False
        self._ring = Ring((), (), (), ())
        self._free: Any = None
        self._staged: list[Staged] = []
        self._active: Staged | None = None
        self._hooks: list[RemovableHandle] = []
        self._positions: dict[tuple[int, int], int] = {}
        self._orders: dict[int, tuple[int, ...]] = {}
        self._seen: tuple[int, list[int]] = (-1, [])

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device: residents, small parts, staging (which another streamer may share)."""
        ring = 0 if self._ring_memory is None else self._ring_memory.memory.nbytes
        return ring + sum(block.device_bytes for block in self.blocks)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that hold the blocks and their extras."""
        return sum(arena.nbytes for arena in self._arenas)

    @property
    def pinned_bytes(self) -> int:
        return sum(arena.pinned_bytes for arena in self._arenas)

    @property
    def all_pinned(self) -> bool:
        mapped = any(block.mapped is not None for block in self.blocks)
        return not mapped and all(arena.all_pinned for arena in self._arenas)

    def sizes(self, *, whole_blocks: bool = False) -> tuple[BlockSize, ...]:
        """What a plan is made for."""
        return tuple(block.size(whole=whole_blocks) for block in self.blocks)

    def pin(
        self,
        limit_bytes: int,
        device: torch.device,
        limited_by: Shortfall = THE_LIMIT,
        first: Iterable[int] = (),
    ) -> None:
        """Pin host memory as far as may be, before `start`; see `HostArena.pin`.

        ``first``: indices of blocks that matter most, as the streamed ones do.
        """
        for arena in self._arenas:
            arena.pin(limit_bytes, device, limited_by, first)
        for index, block in enumerate(self.blocks):
            block.own.is_pinned = self.arena.is_pinned(index)
            if block.travelling is not None and self.extras_arena is not None:
                block.travelling.is_pinned = self.extras_arena.is_pinned(index)

    def set_extras(self, extras: Mapping[nn.Module, Mapping[str, torch.Tensor]]) -> None:
        """Give modules of the blocks these host tensors, in place of those that an earlier call gave; {} for none.

        They become buffers of their modules (not in the state dict) and are where the module's own tensors are
        whenever it computes. Large ones are copied into host records and travel with the tile of their module; they
        are left alone if all of them are the same objects as before. Small ones stay on the device.

        After this `start` has to be called, with a plan for the new `sizes`, before the next forward.

        Raises:
            ValueError: a module is not in a block.
        """
        by_block = self._by_block(extras, len(self.blocks))
        layouts = [extras_layouts(block.own.layout, given) for block, given in zip(self.blocks, by_block, strict=True)]
        travelling = [extras_in(given, large) for given, (large, _) in zip(by_block, layouts, strict=True)]
        for block, (_, small) in zip(self.blocks, layouts, strict=True):
            if block.staying is not None and block.staying.layout != small:
                block.staying.remove()
                block.staying = None
                self._asked = None
        self._travel([large for large, _ in layouts], travelling)
        for block, given, (_, small) in zip(self.blocks, by_block, layouts, strict=True):
            if small.nbytes:
                self._stay(block, small, extras_in(given, small))

    def in_host_memory(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """Tensor ``name`` of a module of the blocks as it is in host memory; None if there is none."""
        if module not in self._places:
            return None
        index, path = self._places[module]
        return self.blocks[index].in_host_memory(path, name)

    def _by_block(self, given: Mapping[nn.Module, Mapping[str, torch.Tensor]], count: int) -> list[Extras]:
        by_block: list[dict[str, Mapping[str, torch.Tensor]]] = [{} for _ in range(count)]
        for module, tensors in given.items():
            if module not in self._places:
                raise ValueError(f"a {type(module).__name__} that gets tensors is not in a streamed block")
            index, path = self._places[module]
            by_block[index][path] = tensors
        return list(by_block)

    def _travel(self, layouts: Sequence[RecordLayout], extras: Sequence[Extras]) -> None:
        tensors = {
            (index, path, name): tensor
            for index, given in enumerate(extras)
            for path, named in given.items()
            for name, tensor in named.items()
        }
        known = self._extras
        if tensors.keys() == known.keys() and all(known[key]() is tensor for key, tensor in tensors.items()):
            return
        self._end_staging()
        self.plan = self._asked = None
        self._extras = {}  # until they are there
        for block in self.blocks:
            if block.travelling is not None:
                block.travelling.remove()
                block.travelling = None
        self.extras_arena = HostArena([layout.nbytes for layout in layouts], what="LoRA memory") if tensors else None
        if self.extras_arena is not None:
            for block, layout, host, given in zip(self.blocks, layouts, self.extras_arena.records, extras, strict=True):
                if layout.nbytes:
                    block.travelling = HostRecord(block.module, layout, host, given)
                    block.travelling.cut(whole=self.whole_blocks)
        self._extras = {key: weakref.ref(tensor) for key, tensor in tensors.items()}

    def _stay(self, block: Block, layout: RecordLayout, extras: Extras) -> None:
        with torch.inference_mode(False):
            host = torch.empty(layout.nbytes, dtype=torch.uint8)
        if block.staying is not None:
            block.staying.refill(host, extras)
            if block.staying.buffer is not None:
                self._write(block.staying.buffer, host)
            return
        self._asked = None
        block.staying = HostRecord(block.module, layout, host, extras)
        if self.plan is not None:
            self._put(block.staying, block.is_resident)

    def start(self, plan: ResidencyPlan, copies: Copies, *, whole_blocks: bool = False) -> None:
        """Put ``plan`` into effect; of a plan in effect, what both have in common stays where it is.

        Tiles are layers. A compiled block must not be entered between its layers: with ``whole_blocks`` a block is one
        tile, and the plan must be made for such sizes.

        Where the device has no room for all residents, the plan before stays in effect, or, if there is none, fewer
        are resident; ``self.plan`` tells, and the next call tries again.

        Raises:
            torch.OutOfMemoryError: not even streaming every block fits. Nothing is left on the device then.
            RuntimeError: tensors of a block were replaced from outside.
        """
        if (error := self._find_replaced()) is not None:
            raise error
        self._start(plan, copies, whole_blocks=whole_blocks)

    def _find_replaced(self) -> RuntimeError | None:
        self._release()
        found = ((block.replaced, index) for index, block in enumerate(self.blocks))
        return next((_replaced(layer, index) for layer, index in found if layer is not None), None)

    def _start(self, plan: ResidencyPlan, copies: Copies, *, whole_blocks: bool) -> None:
        if (self._copies, self._asked, self.whole_blocks) == (copies, plan, whole_blocks):
            return
        if self._copies is not copies or self.whole_blocks != whole_blocks:
            self.stop()
            self._copies, self.whole_blocks = copies, whole_blocks
            for block in self.blocks:
                block.cut(whole=whole_blocks)
            self._orders.clear()
        before = self.plan
        for candidate in (plan, *self._smaller(plan, before)):
            try:
                self._asked = candidate
                self._apply(candidate)
                break
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)
        else:
            self.stop()
            raise failure
        if candidate is not plan:
            logger.warning(
                "Streaming: the device has room for %d of %d resident blocks; the others are streamed",
                len(candidate.resident),
                len(plan.resident),
            )

    def change(self, plan: ResidencyPlan) -> None:
        """`start` again with ``plan``, the rest as it is. Giving residents up copies nothing and frees their memory.

        Others may need that memory: that tensors were replaced from outside is only said here."""
        if (error := self._find_replaced()) is not None:
            logger.error("Streaming: %s", error)
        self._start(plan, self._require_copies(), whole_blocks=self.whole_blocks)

    def stop(self) -> None:
        """Bind every block to host memory and free everything on the device. Idempotent."""
        try:
            self._end_staging()
        finally:
            self._ring_memory = None
            for block in self.blocks:
                block.drop()
            self.plan = self._asked = self.telemetry = self._copies = None

    @property
    def _arenas(self) -> tuple[HostArena, ...]:
        return tuple(arena for arena in (self.arena, self.extras_arena) if arena is not None)

    def _smaller(self, plan: ResidencyPlan, before: ResidencyPlan | None) -> Iterable[ResidencyPlan]:
        """What to try where the device has no room for ``plan``."""
        if before is not None and before.device_bytes < plan.device_bytes:
            yield before
        sizes, count = self.sizes(whole_blocks=self.whole_blocks), len(plan.resident)
        for fewer in sorted({3 * count // 4, count // 2, count // 4, 0} - {count}, reverse=True):
            yield plan_for(sizes, spread(plan.resident, fewer), plan.staging_bytes)

    def _apply(self, plan: ResidencyPlan) -> None:
        self._end_staging()
        self.plan = plan
        resident = set(plan.resident)
        for index, block in enumerate(self.blocks):
            if block.is_resident != (index in resident):
                block.drop()
        self._begin_staging(plan)
        for index in plan.resident:
            block = self.blocks[index]
            block.is_resident = True  # first: where memory runs out it is the plan's successor that drops it
            self._put_missing(block, resident=True)

    def _put_missing(self, block: Block, resident: bool) -> None:
        for record in block.records:
            if record.buffer is None:
                self._put(record, resident)

    def _put(self, record: HostRecord | MappedRecord, resident: bool) -> None:
        """Copy what is to be always on the device there, before any compute that comes after this."""
        sources = record.sources_for(resident)
        if not sources:
            return
        buffer = self._require_copies().empty(sum(nbytes for nbytes, _ in sources))
        start = 0
        for nbytes, source in sources:
            self._write(buffer[start : start + source.nbytes], source)
            start += nbytes
        record.take(buffer, resident)

    def _write(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` between the compute that was launched so far, which may read ``buffer``, and what follows."""
        copies = self._require_copies()
        free, ready = copies.event(), copies.event()
        copies.record(free)
        copies.copy(buffer, source, after=free, done=ready)
        copies.compute_waits(ready)

    def _begin_staging(self, plan: ResidencyPlan) -> None:
        copies = self._require_copies()
        if self._ring_memory is None or self._ring_memory.memory.nbytes != plan.staging_bytes:
            self._ring_memory = None
            self._ring_memory = ring_memory(plan.staging_bytes, copies)
        self._ring_memory.give_to(self)
        self._lost_ring = False
        self._free = copies.event()
        self.telemetry = Telemetry(copies)
        for index in plan.streamed:
            self._put_missing(self.blocks[index], resident=False)
            self._hook(index)
        self._place(plan)
        if self._staged:
            self._fetch_all((0, *self._ring.beside[0]))

    def _place(self, plan: ResidencyPlan) -> None:
        """Give every streamed tile its place in the ring."""
        assert self._ring_memory is not None
        memory, copies = self._ring_memory.memory, self._require_copies()
        order = [(index, local) for index in plan.streamed for local in self._order(index)]
        parts = [self.blocks[index].parts(local) for index, local in order]
        tiles = [sum(tile.tile.nbytes for tile, _ in together) for together in parts]
        self._ring = lay_out(tuple(tiles), plan.staging_bytes)
        self._staged = [
            Staged(f"{self.blocks[index].kind} {index} {together[0][0].tile.module}", together, memory[start:], copies)
            for (index, _), together, start in zip(order, parts, self._ring.offsets, strict=True)
        ]
        if self._staged:
            self._staged[0].time_copies(copies)
        self._positions = {tile: position for position, tile in enumerate(order)}
        self._released()  # what is in the ring now

    def _hook(self, index: int) -> None:
        # Weak: a block that held its streamer would keep the arena alive until the garbage collector runs.
        streamer = weakref.proxy(self)
        # A compiled block is traced with its hooks: they have to stay outside of what is compiled.
        hook: Any = torch.compiler.disable if self.whole_blocks else lambda function: function
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
        self._staged = []
        self._seen = (-1, [])

    def lose_ring(self) -> None:
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
        if not staged.is_home:
            raise _replaced(staged.parts[0].tile.tile.module or "a layer", key[0])
        if not staged.present:
            telemetry.missed()
            self._fetch_all((position, *self._ring.beside[position]))
        before = telemetry.before_wait()
        try:
            for part in staged.parts:
                self._require_copies().compute_waits(part.ready)
        except BaseException:
            staged.present = False  # its copy has failed
            raise
        if before is not None:
            telemetry.after_wait(before)
        with _label("bind", staged):
            staged.bind()
        self._active = staged

    def _after(self, key: tuple[int, int]) -> None:
        self._take_ring()
        self._release()
        self._learn_order(*key)
        self._fetch_all(self._ring.ahead[self._positions[key]])

    def _release(self) -> None:
        """Take the tile that computes, or was when its forward was cut short, off the ring."""
        if self._active is not None:
            self._active.unbind()
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
                    begun = staged.link.begun if staged.link is not None else None
                    for part in staged.parts:
                        copies.copy(part.place, part.source, after=self._free, done=part.ready, begun=begun)
                        begun = None
                self._require_telemetry().copied(staged.nbytes, staged.pinned_bytes, staged.link)
                staged.present = True

    def _order(self, index: int) -> Sequence[int]:
        """A block's tiles in the order in which blocks of its structure were seen to use them."""
        return self._orders.get(self._structures[index], range(len(self.blocks[index].own.tiles)))

    def _learn_order(self, index: int, local: int) -> None:
        structure = self._structures[index]
        if structure in self._orders:
            return
        seen_index, seen = self._seen
        if seen_index != index:
            seen = []
            self._seen = (index, seen)
        seen.append(local)
        if len(seen) == len(self.blocks[index].own.tiles):
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


def _replaced(layer: str, index: int) -> RuntimeError:
    return RuntimeError(
        f"the tensors of {layer} in streamed block {index} were replaced from outside. Change weights with a patch "
        "(LoRA and the like), or load the model again."
    )


def _label(verb: str, staged: Staged) -> AbstractContextManager[Any]:
    """A name in a profiler's trace; costs nothing where none runs."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return _NO_LABEL
    return torch.profiler.record_function(f"{verb} {staged.name}")


_NO_LABEL: AbstractContextManager[Any] = nullcontext()
