"""The staging ring's memory, and the tiles that come and go in it."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from .block import HostRecord, MappedRecord
from .copies import Copies
from .record import BoundTile, Views, views_of
from .telemetry import Link


@dataclass(frozen=True)
class Part:
    """One record's share of a staged tile, and where that is in the ring."""

    tile: BoundTile
    source: torch.Tensor
    place: torch.Tensor
    views: Views
    is_pinned: bool
    ready: Any
    """Passes when its copy is done."""


class Staged:
    """A streamed tile: its place in the ring, and whether its bytes are there, from its fetch to its use."""

    def __init__(
        self,
        name: str,
        parts: Sequence[tuple[BoundTile, HostRecord | MappedRecord]],
        place: torch.Tensor,
        copies: Copies,
    ) -> None:
        self.name = name
        self.parts: tuple[Part, ...] = ()
        for tile, record in parts:
            mine, place = place[: tile.source.nbytes], place[tile.tile.nbytes :]
            self.parts += (Part(tile, tile.source, mine, views_of(tile.tile, mine), record.is_pinned, copies.event()),)
        self.nbytes = sum(part.place.nbytes for part in self.parts)
        self.pinned_bytes = sum(part.place.nbytes for part in self.parts if part.is_pinned)
        self._swaps = tuple(swap for part in self.parts for swap in part.tile.swaps(part.views))
        self.link: Link | None = None
        self.present = False

    def time_copies(self, copies: Copies) -> None:
        """Have each fetch tell how long its copy took: ``link``, once there was one."""
        self.link = Link(self.nbytes, copies.event(timed=True), copies.event(timed=True))
        self.parts = (*self.parts[:-1], replace(self.parts[-1], ready=self.link.ended))

    def bind(self) -> None:
        for tensors, name, _, view in self._swaps:
            tensors[name] = view

    def unbind(self) -> None:
        for tensors, name, home, _ in self._swaps:
            tensors[name] = home

    @property
    def is_home(self) -> bool:
        """Whether nobody has put other tensors in the place of those in host memory."""
        for tensors, name, home, _ in self._swaps:  # noqa: SIM110  a generator takes twice as long
            if tensors.get(name) is not home:
                return False
        return True


class UsesRing(Protocol):
    """Whoever has tiles in a ring, which others may take."""

    def lose_ring(self) -> None: ...


class RingMemory:
    """Staging bytes on a device. Streamers with rings of one size share them: the one that runs has them."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._user: weakref.ref[UsesRing] | None = None

    def give_to(self, streamer: UsesRing) -> None:
        before = self._user() if self._user is not None else None
        if before is not None and before is not streamer:
            before.lose_ring()
        self._user = weakref.ref(streamer)


_rings: weakref.WeakKeyDictionary[Copies, weakref.WeakValueDictionary[int, RingMemory]] = weakref.WeakKeyDictionary()


def ring_memory(nbytes: int, copies: Copies) -> RingMemory:
    rings = _rings.setdefault(copies, weakref.WeakValueDictionary())
    ring = rings.get(nbytes)
    if ring is None:
        ring = rings[nbytes] = RingMemory(copies.empty(nbytes))
    return ring
