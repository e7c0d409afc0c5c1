"""Fetch, wait, release: how the streamed blocks pass through the staging ring.

While one tile computes, the next ones arrive. The caller may skip, repeat or reorder blocks, stop in the middle and
start again. Three rules keep the results right:

- The ring knows which tile's bytes it holds. If a tile is called and is not there, it is fetched then.
- The tile that is called determines which tiles come next. Nothing is counted.
- If an unfinished forward left a tile in use, the next call releases it.

The host never waits, except in `bounce`, and in the first forward for memory that is still being pinned
(`pinning_ahead`). On the device, compute waits for the copy of a tile ("ready"), and each copy waits for all compute
launched before it ("free"), because that compute may read the bytes that the copy overwrites.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .block import Block
from .call_order import CallOrders
from .copies import Copies
from .pinning_ahead import until_registered
from .plan import ResidencyPlan
from .ring import lay_out
from .staging import Presence, RingMemory, Staged
from .telemetry import Telemetry

Key = tuple[int, int]
"""A tile: the index of its block, and its index among the block's tiles in registration order."""


class Conveyor:
    """Streams the blocks that ``plan`` does not keep resident, from `start` to `close`.

    Args:
        blocks: All blocks of the model. The small parts of the streamed ones must be on the device.
        plan: Which blocks are streamed.
        ring: Memory of ``plan.staging_bytes`` on the device of ``copies``.
        copies: How bytes get to the device.
        orders: The orders of calls seen so far. They outlive the conveyor, so that the next one knows them.
        whole_blocks: Each block is one tile and may be compiled.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        plan: ResidencyPlan,
        ring: RingMemory,
        copies: Copies,
        orders: CallOrders,
        *,
        whole_blocks: bool,
    ) -> None:
        self.telemetry = Telemetry(copies, len(plan.streamed))
        self._blocks = blocks
        self._plan = plan
        self._memory = ring
        self._copies = copies
        self._orders = orders
        self._whole_blocks = whole_blocks
        self._free = copies.event()
        self._lost_ring = False
        self._active: int | None = None
        """Position of the tile in use."""
        self._there: set[int] = set()
        """Positions of the tiles whose bytes are in the ring, or on their way, and not used up."""
        self._hooks: list[RemovableHandle] = []
        self._presences = {
            (index, local): Presence() for index in plan.streamed for local in range(len(blocks[index].tiles))
        }
        ring.give_to(self._lose_ring)
        self._lay_out()

    def start(self) -> None:
        """Hook the streamed blocks and fetch the first tiles."""
        for key, presence in self._presences.items():
            self._hook(key)
            self._hook_inside(key, presence)
        if self._whole_blocks:
            self._hooks += hooks_of_residents(self._blocks, self._plan.resident)
        if self._staged:
            self.fetch((0, *self._ring.beside[0]))

    def close(self) -> None:
        """Remove the hooks and bind the tile in use to host memory. Idempotent. The ring's memory stays allocated."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.release()

    def fetch(self, positions: Sequence[int]) -> None:
        """Copy the tiles at ``positions`` to the ring, except those that are there or on their way."""
        there = self._there
        for position in positions:
            if position not in there:
                evicted = self._ring.evicted[position]
                if not there.isdisjoint(evicted):
                    there -= evicted
                staged = self._staged[position]
                _named("fetch", staged, self._copy)
                self.telemetry.copied(staged.nbytes, staged.link)
                there.add(position)

    def _copy(self, staged: Staged) -> None:
        until_registered(source for _, source in staged.pairs)
        copies, begun = self._copies, None if staged.link is None else staged.link.begun
        copies.copy(staged.pairs, after=self._free, done=staged.ready, begun=begun)

    def wait(self, position: int) -> None:
        """Have compute wait for the copy of the tile at ``position``."""
        before = self.telemetry.before_wait()
        try:
            self._copies.compute_waits(self._staged[position].ready)
        except BaseException:
            self._there.discard(position)  # its copy has failed
            raise
        if before is not None:
            self.telemetry.after_wait(before)

    def release(self) -> None:
        """Unbind the tile in use, if there is one. Copies may overwrite its bytes once the compute so far is done."""
        if self._active is not None:
            self._staged[self._active].unbind()
            self._there.discard(self._active)
            self._active = None
            self._released()

    def _released(self) -> None:
        """Have the next copies wait for all compute launched so far."""
        self._copies.record(self._free)

    def _before(self, key: Key) -> None:
        """Before the forward of tile ``key``: bind it to its bytes in the ring."""
        if self._lost_ring:
            self._take_ring()
        self.release()
        self.telemetry.tile(key)
        position = self._positions[key]
        staged = self._staged[position]
        if not staged.is_home:
            raise tensors_replaced(self._blocks[key[0]].tiles[key[1]].tile.module, key[0])
        if position not in self._there:
            self.telemetry.missed()
            self.fetch((position, *self._ring.beside[position]))
        self.wait(position)
        _named("bind", staged, Staged.bind)
        self._active = position

    def _after(self, key: Key) -> None:
        """After the forward of tile ``key``: make room, and fetch the next tiles."""
        if self._lost_ring:
            self._take_ring()
        self.release()
        if self._orders.saw(*key):
            self._lay_out()
        self.fetch(self._ring.ahead[self._positions[key]])

    def _lay_out(self) -> None:
        """Give every streamed tile its place in the ring, in the order of calls. The ring holds no tile after this.

        No tile may be in use.
        """
        memory, copies = self._memory.memory, self._copies
        order = [(index, local) for index in self._plan.streamed for local in self._orders.of(index)]
        parts = [self._blocks[index].parts(local) for index, local in order]
        sizes = tuple(sum(tile.tile.nbytes for tile in of_tile) for of_tile in parts)
        ring = lay_out(sizes, memory.nbytes)
        staged = [
            Staged(self._name_of(key), of_tile, memory[start:], copies, self._presences[key])
            for key, of_tile, start in zip(order, parts, ring.offsets, strict=True)
        ]
        if staged:
            staged[0].time_copies(copies)
        self._released()  # compute may still read what the ring held before
        # All at once: with an error before this, the tiles stay where they were.
        self._ring, self._staged = ring, staged
        self._positions = {key: position for position, key in enumerate(order)}
        self._there.clear()

    def _name_of(self, key: Key) -> str:
        index, local = key
        block = self._blocks[index]
        return f"{block.kind} {index} {block.tiles[local].tile.module}"

    def _hook(self, key: Key) -> None:
        """Have each call of tile ``key`` run `_before` and `_after`."""
        # Weak: otherwise the block would hold the conveyor, and the arena would live until the garbage collector runs.
        conveyor = weakref.proxy(self)
        # torch.compile traces a block with its hooks, so these keep themselves out of the compiled code.
        outside: Any = torch.compiler.disable if self._whole_blocks else lambda function: function

        def before(*_: object) -> None:
            conveyor._before(key)

        def after(*_: object) -> None:
            conveyor._after(key)

        module = self._blocks[key[0]].tiles[key[1]].module
        self._hooks.append(module.register_forward_pre_hook(outside(before)))
        self._hooks.append(module.register_forward_hook(outside(after)))

    def _hook_inside(self, key: Key, presence: Presence) -> None:
        """Have layers inside tile ``key`` fetch the tile if they are called while it is not in use.

        That happens if another package calls them from a module of its own or through ``block.forward``, which runs no
        hook of the block, or after the block has called another block.
        """
        conveyor = weakref.proxy(self)
        self._hooks += _hooks_inside(self._blocks[key[0]], key[1], presence, lambda: conveyor._before(key))

    def _lose_ring(self) -> None:
        """Another conveyor takes the ring and overwrites it."""
        self._lost_ring = True
        self.release()
        self._there.clear()

    def _take_ring(self) -> None:
        """Take the ring back."""
        self._lost_ring = False
        self._memory.give_to(self._lose_ring)
        self._released()


def hooks_of_residents(blocks: Sequence[Block], resident: Sequence[int]) -> list[RemovableHandle]:
    """Give the layers of resident blocks hooks like those of streamed blocks, for compiled code.

    Blocks of equal structure share compiled code, and the hooks are part of it. torch.compile does not notice a hook
    that is added later: code compiled without hooks would read a streamed block's weights in host memory.
    """
    tiles = [(blocks[index], local) for index in resident for local in range(len(blocks[index].tiles))]
    every = [_hooks_inside(block, local, Presence(here=True), lambda: None) for block, local in tiles]
    return list(itertools.chain.from_iterable(every))


def _hooks_inside(block: Block, local: int, presence: Presence, fetch: Callable[[], None]) -> list[RemovableHandle]:
    outside: Any = torch.compiler.disable(fetch)

    def unless_present(*_: object) -> None:
        if not presence.here:  # compiled code keeps only this check, as a guard
            outside()

    layers = block.modules_of(local) - {block.tiles[local].module}
    return [layer.register_forward_pre_hook(unless_present) for layer in layers]


def tensors_replaced(layer: str, index: int) -> RuntimeError:
    """The error for a block ``index`` that has lost its own tensors in ``layer`` (a path in the block)."""
    return RuntimeError(
        f"the tensors of {layer or 'a layer'} in streamed block {index} were replaced from outside. Change weights "
        "with a patch (LoRA and the like), or load the model again."
    )


def _named(verb: str, staged: Staged, do: Callable[[Staged], None]) -> None:
    """Call ``do`` with ``staged``, under a name in a profiler's trace. It costs next to nothing while none runs."""
    if not torch.autograd.profiler._is_profiler_enabled:
        do(staged)
        return
    with torch.profiler.record_function(f"{verb} {staged.name}"):
        do(staged)
