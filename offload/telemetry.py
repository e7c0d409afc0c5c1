"""What a forward costs, measured on the device. Figures are read once the device has them: the host never waits.

Bytes and refetches are counted in every forward. The second forward is timed, and then every eighth, with two timed
events around each wait.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..memory import GIB
from .copies import Copies

_SAMPLED_EVERY = 8


@dataclass(frozen=True)
class ForwardCost:
    """One forward over the streamed blocks, from its first tile to the first of the next.

    ``refetched`` counts tiles that were not there when they were called for (in a steady forward none). ``total_ms``
    and ``stall_ms`` (compute waiting for copies) are None where they were not measured. ``picture`` is the width and
    height in pixels that it was for; None where nobody said.
    """

    copied_bytes: int
    refetched: int
    total_ms: float | None
    stall_ms: float | None
    picture: tuple[int, int] | None = None


@dataclass
class _Running:
    """A forward that is running, or whose figures the device does not have yet."""

    begun: Any = None
    ended: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    copied_bytes: int = 0
    refetched: int = 0
    picture: tuple[int, int] | None = None

    def add(self, later: "_Running") -> None:
        """Make ``later`` a part of this forward."""
        self.copied_bytes += later.copied_bytes
        self.refetched += later.refetched
        if self.begun is not None:
            self.waits += later.waits


@dataclass(frozen=True)
class Link:
    """A copy of ``nbytes`` between two timed events, made again in each forward: how fast the bus is."""

    nbytes: int
    begun: Any
    ended: Any


class Telemetry:
    """Figures of the forwards over the tiles of ``blocks`` streamed blocks. ``forwards`` counts them. ``picture`` is
    what forwards that begin from now on are for (`ForwardCost`).

    A forward goes through the blocks in order, so the next one begins where an earlier block is called than before
    (with a single block: where a tile is called again). One call is not enough, since some patches call a layer of
    another block out of turn. After a call of an earlier block, the next call decides: if it is new to this forward and
    not earlier, the forward goes on. A call of a later block counts once another follows that is not earlier.
    """

    def __init__(self, copies: Copies, blocks: int) -> None:
        self.forwards = 0
        self.picture: tuple[int, int] | None = None
        self._copies = copies
        self._blocks = blocks
        self._furthest = self._reached = -1
        self._called: set[tuple[int, int]] = set()
        self._now = _Running()
        self._turned: tuple[_Running, tuple[int, int]] | None = None
        self._gets = self._now
        self._passing: list[_Running] = []
        self._last: ForwardCost | None = None
        self._last_timed: ForwardCost | None = None
        self._shown: ForwardCost | None = None
        self._link: Link | None = None
        self._gbps: float | None = None

    @property
    def last(self) -> ForwardCost | None:
        """The latest forward that has passed."""
        self._collect()
        return self._last

    @property
    def last_timed(self) -> ForwardCost | None:
        """The latest forward that has passed and was timed."""
        self._collect()
        return self._last_timed

    def has_news(self) -> bool:
        """Whether a timed forward has passed since the last call."""
        before, self._shown = self._shown, self.last_timed
        return self._shown is not before

    @property
    def link_gbps(self) -> float | None:
        """1e9 bytes a second from host to device, from a recent copy to the ring; None before the first one is done."""
        if self._link is not None:
            elapsed_ms = self._copies.elapsed_ms(self._link.begun, self._link.ended)
            self._gbps = self._link.nbytes / elapsed_ms / 1e6 if elapsed_ms else self._gbps
        return self._gbps

    def tile(self, key: tuple[int, int]) -> None:
        """A tile is called for: ``key`` is its block and its own number in the block. Blocks are in execution order."""
        if self._turned is not None:
            self._decide(key)
            return
        block = key[0]
        if block < self._furthest or (key in self._called and (block < self._reached or self._blocks == 1)):
            self._turn(key)
            return
        if not self._called:
            self._now.picture = self.picture
        if block >= self._reached:
            self._furthest = self._reached
        self._reached = block
        self._called.add(key)

    def rest(self) -> None:
        """No forward follows for now: the last one ends here, not where the next one begins."""
        if self._turned is not None and self._blocks > 1:
            self._now.add(self._turned[0])
        elif self._turned is not None:
            self._begin(self._turned)
        if self._called:
            self._end_forward(self._record() if self._now.begun is not None else None)
        self._turned = None
        self._now = self._gets = _Running()
        self._furthest = self._reached = -1
        self._called.clear()

    def copied(self, nbytes: int, link: Link | None = None) -> None:
        """A tile's copy has been launched. If it is timed, ``link`` has its events."""
        self._link = link or self._link
        self._gets.copied_bytes += nbytes

    def missed(self) -> None:
        """A tile that is called for is not there."""
        self._gets.refetched += 1

    def before_wait(self) -> Any:
        """Compute comes to a wait. Returns what `after_wait` needs; None in a forward that is not timed."""
        if self._gets.begun is None:
            return None
        return self._record()

    def after_wait(self, before: Any) -> None:
        """Compute goes on."""
        self._gets.waits.append((before, self._record()))

    def _turn(self, key: tuple[int, int]) -> None:
        """The next forward may begin with ``key``."""
        is_timed = self._now.begun is not None or self._next_is_timed()
        self._gets = _Running(begun=self._record() if is_timed else None, picture=self.picture)
        self._turned = self._gets, key

    def _decide(self, key: tuple[int, int]) -> None:
        """``key`` follows a call that may have begun a forward."""
        assert self._turned is not None
        turned, self._turned = self._turned, None
        if key[0] < self._furthest or key in self._called:
            self._begin(turned)
        else:
            self._now.add(turned[0])
            self._gets = self._now
        self.tile(key)

    def _begin(self, turned: tuple[_Running, tuple[int, int]]) -> None:
        running, key = turned
        is_timed, begun = self._next_is_timed(), running.begun
        self._end_forward(begun)
        if not is_timed:
            running.begun = None
            running.waits.clear()
        self._now = self._gets = running
        self._furthest, self._reached = -1, key[0]
        self._called = {key}

    def _next_is_timed(self) -> bool:
        return self.forwards % _SAMPLED_EVERY == 0

    def _end_forward(self, ended: Any) -> None:
        """``ended``: where, if this forward is timed."""
        if self._now.begun is not None:
            self._now.ended = ended
        self.forwards += 1
        self._passing.append(self._now)
        self._collect()

    def _record(self) -> Any:
        event = self._copies.event(timed=True)
        self._copies.record(event)
        return event

    def _collect(self) -> None:
        while self._passing:
            done = self._passing[0]
            total_ms = stall_ms = None
            if done.begun is not None:
                total_ms = self._copies.elapsed_ms(done.begun, done.ended)
                if total_ms is None:
                    return
                stall_ms = sum(self._copies.elapsed_ms(before, after) or 0.0 for before, after in done.waits)
            del self._passing[0]
            self._last = ForwardCost(done.copied_bytes, done.refetched, total_ms, stall_ms, done.picture)
            if total_ms is not None:
                self._last_timed = self._last


def summarise(telemetry: Telemetry, is_pinned: bool) -> str | None:
    """One line on the latest timed forward, with advice where copies held it up; None if there is none.

    Args:
        telemetry: The figures.
        is_pinned: Whether all host memory is pinned.
    """
    cost = telemetry.last_timed
    if cost is None or not cost.total_ms or cost.stall_ms is None:
        return None
    gbps = telemetry.link_gbps or 0.0
    line = (
        f"{cost.total_ms:.1f} ms a forward, of which compute waited {cost.stall_ms:.1f} ms "
        f"({100 * cost.stall_ms / cost.total_ms:.0f} %) for {cost.copied_bytes / 1e9:.2f} GB over a bus of "
        f"{gbps:.1f} GB/s"
    )
    if cost.refetched:
        line += f"; {cost.refetched} tiles were fetched late, because blocks ran in another order"
    match limit_of(cost.stall_ms, cost.total_ms, gbps, is_pinned=is_pinned):
        case "keeps_up":
            return line
        case "not_pinned":
            return f"{line}. Not all host memory is pinned (see above): that slows copies down"
        case "slow_link":
            return f"{line}. That is slow (PCIe 3 x16 gives 12 GB/s): check that the card sits in a full-width slot"
        case "bus_is_limit":
            return f"{line}. Keep more blocks in VRAM: each GiB of them saves about {GIB / gbps / 1e6:.0f} ms"


Limit = Literal["keeps_up", "not_pinned", "slow_link", "bus_is_limit"]
"""What forwards wait for: nothing, copies of unpinned memory, a bus slower than a full slot, or a full-speed bus."""

_STALL_WORTH_ADVICE = 0.1
_SLOW_LINK_GBPS = 10.0


def limit_of(stall_ms: float, total_ms: float, gbps: float, *, is_pinned: bool) -> Limit:
    """The limit of a forward of ``total_ms``, in which compute waits ``stall_ms`` for copies.

    ``gbps`` is the bandwidth of the bus in 1e9 bytes a second; ``is_pinned``: all host memory is.
    """
    if stall_ms < _STALL_WORTH_ADVICE * total_ms:
        return "keeps_up"
    if not is_pinned:
        return "not_pinned"
    return "slow_link" if gbps < _SLOW_LINK_GBPS else "bus_is_limit"
