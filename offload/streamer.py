"""The `Streamer`: it keeps some blocks on the device and has a `Conveyor` stream the others.

It also gives blocks extra tensors (a LoRA's factors), and keeps fewer blocks if the device runs out of memory.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..memory import is_out_of_memory
from .arena import HostArena
from .block import Block, Extras, HostRecord, blocks_in, extras_in, layouts_of, names_in, split
from .call_order import CallOrders
from .conveyor import Conveyor, hooks_of_residents, tensors_replaced
from .copies import Copies, InlineCopies
from .extras import Places, Travelling, remove_staying
from .file_arena import FileArena
from .pinnable import THE_LIMIT, PinnableMemory, Shortfall
from .plan import BlockSize, ResidencyPlan, smaller_plans
from .put import put, put_missing, write
from .record import RecordLayout, extras_layouts, refuse_copies
from .staging import RingMemory, ring_memory
from .telemetry import Telemetry

logger = logging.getLogger(__name__)


class Streamer:
    """Keeps some blocks of a model resident on a device and streams the rest from host memory.

    `start` puts a plan into effect, `stop` takes everything off the device. The blocks compute the same bits under
    every plan. The streamer must live as long as its blocks are used.

    Args:
        groups: The blocks by kind, in execution order. Their tensors become views of the records in ``arena``. A tensor
            on the meta device gets the value that the record has; any other tensor is copied to the record.
        mapped: Memory of files (`map_parts`: uint8, flat) by module and tensor name. It is streamed from there.
        each: Called with the index of each block that has moved to its record: its old memory can be freed then.
        arena: The host memory; None makes a new arena. Streamers over equal models on several devices may share one.
        without: Modules in the blocks that another streamer moves.
        may_be_compiled: Whether anybody may run the blocks through torch.compile.
        what: What the log calls the blocks that stay.

    Raises:
        ValueError: a block has no tensors, a tensor occurs twice, or ``arena`` was made for other blocks.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Module]],
        mapped: Mapping[nn.Module, Mapping[str, torch.Tensor]] | None = None,
        each: Callable[[int], None] = lambda _: None,
        arena: HostArena | None = None,
        without: Collection[nn.Module] = (),
        *,
        may_be_compiled: bool = True,
        what: str = "resident blocks",
    ) -> None:
        modules = [block for group in groups.values() for block in group]
        kinds = [kind for kind, group in groups.items() for _ in group]
        layouts = layouts_of(modules, without)
        self._what = what
        self._places = Places(modules, without)
        apart = [names_in(tensors) for tensors in self._places.by_block(mapped or {})]
        splits = split(layouts, apart)
        self.arena = HostArena([own.nbytes for own, _ in splits]) if arena is None else arena
        self.blocks = blocks_in(self.arena, modules, kinds, splits, apart, each)
        self.file = FileArena([list(names.values()) for names in apart])
        self.arena.keep_pinned_for(self)
        self.file.keep_pinned_for(self)
        self._travelling = Travelling()
        self._has_extras = False
        self._sizes: dict[bool, tuple[BlockSize, ...]] = {}
        numbers = {layout: number for number, layout in enumerate(dict.fromkeys(layouts))}
        self._structures = [numbers[layout] for layout in layouts]
        self.whole_blocks = False
        self._may_be_compiled = may_be_compiled
        self._orders = self._new_orders()
        self.plan: ResidencyPlan | None = None
        self._asked: ResidencyPlan | None = None
        self._copies: Copies = _NOWHERE
        self._ring: RingMemory | None = None
        self._conveyor: Conveyor | None = None
        self._hooks: list[RemovableHandle] = []

    def __deepcopy__(self, memo: object) -> None:
        refuse_copies(memo)

    @property
    def telemetry(self) -> Telemetry | None:
        """What forwards cost under the present plan; None if no block is streamed."""
        return None if self._conveyor is None else self._conveyor.telemetry

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device: residents, small parts and the staging ring, which streamers may share."""
        ring = 0 if self._ring is None else self._ring.memory.nbytes
        return ring + sum(block.device_bytes for block in self.blocks)

    @property
    def extras_arena(self) -> HostArena | None:
        """Host memory of the large extras; None without any."""
        return self._travelling.arena

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that hold the blocks and their extras. The memory of files counts, too."""
        return sum(arena.nbytes for arena in self._arenas)

    @property
    def ram_bytes(self) -> int:
        """`host_bytes` without the memory of files."""
        return self.host_bytes - self.file.nbytes

    @property
    def pinned_bytes(self) -> int:
        """How many of `host_bytes` are pinned."""
        return sum(arena.pinned_bytes for arena in self._arenas)

    @property
    def all_pinned(self) -> bool:
        """Whether every copy to the device reads pinned memory."""
        return all(arena.all_pinned for arena in self._arenas)

    def is_pinned_for(self, device: torch.device) -> bool:
        """Whether `pin` has nothing left to do for ``device``."""
        return all(arena.is_pinned_for(device) for arena in self._arenas)

    def sizes(self, *, whole_blocks: bool = False) -> tuple[BlockSize, ...]:
        """The sizes of the blocks in bytes, from which plans are made."""
        if whole_blocks not in self._sizes:
            self._sizes[whole_blocks] = tuple(block.size(whole=whole_blocks) for block in self.blocks)
        return self._sizes[whole_blocks]

    def pin(
        self,
        limit_bytes: int,
        device: torch.device,
        limited_by: Shortfall = THE_LIMIT,
        first: Sequence[int] = (),
    ) -> None:
        """Pin as much host memory as ``limit_bytes`` allow. Call it before `start`; see `PinnableMemory.pin`.

        ``first``: indices of the blocks to pin first: the streamed ones gain most.
        """
        for arena in self._arenas:
            if not arena.is_pinned_for(device):
                arena.pin(limit_bytes, device, limited_by, first)

    def set_extras(self, extras: Mapping[nn.Module, Mapping[str, torch.Tensor]]) -> None:
        """Give modules of the blocks extra host tensors. They replace those of an earlier call; {} removes them.

        They become buffers of their modules (not in the state dict), and are on the device whenever the module
        computes. Small ones stay on the device. Large ones are copied into host records and travel with the tile of
        their module; this copy is skipped if all of them are the same objects as before.

        After this, call `start` with a plan for the new `sizes` before the next forward. After an exception there are
        no extras, and nothing is on the device.

        Raises:
            ValueError: a module is not in a block. Nothing has changed.
        """
        by_block = self._places.by_block(extras)
        if not extras and not self._has_extras:
            return  # as at the beginning of most samplings
        self._has_extras = bool(extras)
        self._sizes.clear()
        try:
            self._replace_extras(by_block)
        except BaseException:
            self._has_extras = False
            self.stop()
            self._travelling.remove(self.blocks)
            for block in self.blocks:
                remove_staying(block)
            raise

    def in_host_memory(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """The host copy of tensor ``name`` of a module in the blocks; None if there is none."""
        place = self._places.of(module)
        return None if place is None else self.blocks[place[0]].in_host_memory(place[1], name)

    def start(self, plan: ResidencyPlan, copies: Copies, *, whole_blocks: bool = False) -> None:
        """Put ``plan`` into effect. Blocks that are resident before and after it stay where they are.

        A tile is a layer. With ``whole_blocks`` a tile is a block, as compiled blocks need, since no hook can run
        between their layers; ``plan`` must then be made from `sizes` of whole blocks.

        If the device has no room for all residents, the earlier plan stays in effect, or, if there is none, fewer
        blocks are resident. ``self.plan`` is the plan in effect, and the next call tries again. After any other
        exception nothing is on the device.

        Raises:
            torch.OutOfMemoryError: not even streaming every block fits. Some backends raise another class. Nothing is
                left on the device then.
            RuntimeError: tensors of a block were replaced from outside. The earlier plan stays in effect.
        """
        if (error := self._find_replaced()) is not None:
            raise error
        self._start(plan, copies, whole_blocks=whole_blocks)

    def change(self, plan: ResidencyPlan) -> None:
        """Call `start` with another plan and the same copies. To give residents up, it copies no whole block, but their
        small parts and the first tiles of the ring. The caller may need the memory at once, so tensors that were
        replaced from outside are logged as an error and raise nothing."""
        if (error := self._find_replaced()) is not None:
            logger.error("Streaming: %s", error)
        self._start(plan, self._copies, whole_blocks=self.whole_blocks)

    def stop(self) -> None:
        """Bind every block to host memory and free everything on the device. Idempotent."""
        try:
            self._close()
        finally:
            self._ring = None
            for block in self.blocks:
                block.drop()
            self.plan = self._asked = None
            self._copies = _NOWHERE

    @property
    def _arenas(self) -> tuple[PinnableMemory, ...]:
        extras = () if self.extras_arena is None else (self.extras_arena,)
        return (self.arena, *((self.file,) if self.file.nbytes else ()), *extras)

    def _replace_extras(self, by_block: Sequence[Extras]) -> None:
        layouts = [extras_layouts(block.own.layout, given) for block, given in zip(self.blocks, by_block, strict=True)]
        for block, (_, small) in zip(self.blocks, layouts, strict=True):
            if block.staying is not None and block.staying.layout != small:
                remove_staying(block)
                self._asked = None
        large = [layout for layout, _ in layouts]
        travelling = [extras_in(given, layout) for given, layout in zip(by_block, large, strict=True)]
        if not self._travelling.are(travelling):
            self._close()
            self.plan = self._asked = None
            self._travelling.replace(self.blocks, large, travelling, whole=self.whole_blocks)
        for block, given, (_, small) in zip(self.blocks, by_block, layouts, strict=True):
            if small.nbytes:
                self._stay(block, small, extras_in(given, small))

    def _stay(self, block: Block, layout: RecordLayout, extras: Extras) -> None:
        """Give ``block`` small extras. Under a plan they go to the device at once."""
        with torch.inference_mode(False):
            host = torch.empty(layout.nbytes, dtype=torch.uint8)
        if block.staying is not None:
            block.staying.refill(host, extras)
            if block.staying.buffer is not None:
                write([(block.staying.buffer, host)], self._copies)
            return
        self._asked = None
        block.staying = HostRecord(block.module, layout, host, extras)
        if self.plan is not None:
            put(block.staying, block.is_resident, self._copies)

    def _find_replaced(self) -> RuntimeError | None:
        if self._conveyor is not None:
            self._conveyor.release()
        found = ((block.replaced, index) for index, block in enumerate(self.blocks))
        return next((tensors_replaced(layer, index) for layer, index in found if layer is not None), None)

    def _start(self, plan: ResidencyPlan, copies: Copies, *, whole_blocks: bool) -> None:
        if (self._copies, self._asked, self.whole_blocks) == (copies, plan, whole_blocks):
            return
        self._asked = None  # a plan that is half applied must not count as applied
        try:
            self._use(copies, whole_blocks=whole_blocks)
            self._asked = self._apply_what_fits(plan)
        except BaseException:
            self.stop()
            raise
        if self._asked is not plan:
            text = "Streaming: the device has room for %d of %d %s; the others are streamed"
            logger.warning(text, len(self._asked.resident), len(plan.resident), self._what)

    def _use(self, copies: Copies, *, whole_blocks: bool) -> None:
        """Copy with ``copies``, in tiles of layers or whole blocks. Residents stay unless device or tiles change."""
        if self._copies is copies and self.whole_blocks == whole_blocks:
            return
        if self.whole_blocks != whole_blocks or self._copies.device != copies.device:
            self.stop()
        self._close()
        self._ring = None
        self._copies = copies
        if self.whole_blocks != whole_blocks:
            self.whole_blocks = whole_blocks
            for block in self.blocks:
                block.cut(whole=whole_blocks)
            self._orders = self._new_orders()

    def _new_orders(self) -> CallOrders:
        return CallOrders(self._structures, [len(block.tiles) for block in self.blocks])

    def _apply_what_fits(self, plan: ResidencyPlan) -> ResidencyPlan:
        """Put ``plan`` into effect, or the largest smaller one that fits. Returns the plan that is in effect."""
        sizes = self.sizes(whole_blocks=self.whole_blocks)
        for candidate in (plan, *smaller_plans(plan, self.plan, sizes)):
            try:
                self._apply(candidate)
                return candidate
            except BaseException as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold device memory
        raise failure

    def _apply(self, plan: ResidencyPlan) -> None:
        self._close()
        self.plan = plan
        for index, block in enumerate(self.blocks):
            if block.is_resident != (index in plan.resident):
                block.drop()
        if plan.streamed:
            self._stream(plan)
        else:
            self._ring = None
            needs_hooks = self.whole_blocks and self._may_be_compiled
            self._hooks = hooks_of_residents(self.blocks, plan.resident) if needs_hooks else []
        for index in plan.resident:
            block = self.blocks[index]
            block.is_resident = True  # before the copy: if memory runs out, the next candidate drops this block
            put_missing(block, self._copies)

    def _stream(self, plan: ResidencyPlan) -> None:
        if self._ring is None or self._ring.memory.nbytes != plan.staging_bytes:
            self._ring = None
            self._ring = ring_memory(plan.staging_bytes, self._copies)
        for index in plan.streamed:
            put_missing(self.blocks[index], self._copies)
        self._conveyor = Conveyor(
            self.blocks, plan, self._ring, self._copies, self._orders, whole_blocks=self.whole_blocks
        )
        self._conveyor.start()

    def _close(self) -> None:
        """Stop streaming. The ring's memory is kept for the next conveyor."""
        while self._hooks:
            self._hooks.pop().remove()
        conveyor, self._conveyor = self._conveyor, None
        if conveyor is not None:
            conveyor.close()


_NOWHERE = InlineCopies(torch.device("cpu"))
"""Stands for the copies while nothing is on a device."""
