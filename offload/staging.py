"""The memory of the staging ring, and the tiles that come and go in it."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .copies import Copies
from .record import BoundTile, views_of
from .telemetry import Link


class Presence:
    """Whether a tile is in use: bound to its bytes in the ring."""

    def __init__(self, *, here: bool = False) -> None:
        self.here = here


class Staged:
    """A streamed tile with its place in the ring.

    ``pairs`` are its places in the ring and their bytes in host memory; ``ready`` passes when they are copied.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[BoundTile],
        place: torch.Tensor,
        copies: Copies,
        presence: Presence,
    ) -> None:
        self.name = name
        self.ready = copies.event()
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        swaps: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []
        for tile in parts:
            mine, place = place[: tile.source.nbytes], place[tile.tile.nbytes :]
            self.pairs.append((mine, tile.source))
            swaps += tile.swaps(views_of(tile.tile, mine))
        self._swaps = tuple(swaps)
        self.nbytes = sum(tile.source.nbytes for tile in parts)
        self._presence = presence
        self.link: Link | None = None

    def time_copies(self, copies: Copies) -> None:
        """Time the copy of each fetch. `link` has the events; they are recorded by the first fetch."""
        self.link = Link(self.nbytes, copies.event(timed=True), copies.event(timed=True))
        self.ready = self.link.ended

    def bind(self) -> None:
        """Have the modules use the bytes in the ring."""
        for tensors, name, _, view in self._swaps:
            tensors[name] = view
        self._presence.here = True

    def unbind(self) -> None:
        """Have the modules use host memory again."""
        self._presence.here = False
        for tensors, name, home, _ in self._swaps:
            tensors[name] = home

    @property
    def is_home(self) -> bool:
        """Whether the modules have the tensors in host memory, and not others that somebody put in their place."""
        for tensors, name, home, _ in self._swaps:  # noqa: SIM110  a generator takes twice as long
            if tensors.get(name) is not home:
                return False
        return True


class RingMemory:
    """Staging bytes on a device. Conveyors with rings of equal size share them: the one that runs has them."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._lose: weakref.WeakMethod[Callable[[], None]] | None = None

    def give_to(self, lose: Callable[[], None]) -> None:
        """Take the ring from whoever has it. ``lose``, a bound method, is called when somebody else takes it."""
        before = self._lose() if self._lose is not None else None
        if before is not None and before != lose:
            before()
        self._lose = weakref.WeakMethod(lose)


_rings: weakref.WeakKeyDictionary[Copies, weakref.WeakValueDictionary[int, RingMemory]] = weakref.WeakKeyDictionary()


def ring_memory(nbytes: int, copies: Copies) -> RingMemory:
    """A ring of ``nbytes`` on the device of ``copies``: the one that is there, or a new one."""
    rings = _rings.setdefault(copies, weakref.WeakValueDictionary())
    ring = rings.get(nbytes)
    if ring is None:
        ring = rings[nbytes] = RingMemory(copies.empty(nbytes))
    return ring
