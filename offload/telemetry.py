"""What a forward cost, measured on the device and read once it has passed there: the host never waits for a figure.

Bytes and refetches are counted in every forward. Times come from every eighth: two timed events around each wait.
"""

from dataclasses import dataclass, field
from typing import Any

from .copies import Copies

_SAMPLED_EVERY = 8


@dataclass(frozen=True)
class ForwardCost:
    """One forward over the streamed blocks, from its first tile to the first of the next.

    ``pinned_bytes``: how many of ``copied_bytes`` came from pinned memory. ``refetched`` counts tiles that were not
    there when they were called for (in a steady forward none). ``total_ms`` and ``stall_ms`` (compute waiting for
    copies) are None where they were not measured.
    """

    copied_bytes: int
    pinned_bytes: int
    refetched: int
    total_ms: float | None
    stall_ms: float | None


@dataclass
class _Running:
    """A forward whose figures are not complete."""

    begun: Any = None
    ended: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    copied_bytes: int = 0
    pinned_bytes: int = 0
    refetched: int = 0


@dataclass(frozen=True)
class Link:
    """A copy of ``nbytes`` between two timed events, made again in each forward: how fast the bus is."""

    nbytes: int
    begun: Any
    ended: Any


class Telemetry:
    """Figures of the forwards over one ring. ``forwards`` counts them since it was made."""

    def __init__(self, copies: Copies) -> None:
        self.forwards = 0
        self.refetched = 0
        self._copies = copies
        self._last_position = -1
        self._now = _Running()
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
        """1e9 bytes a second from host to device, as a recent copy to the ring showed; None while none is done."""
        if self._link is not None:
            elapsed_ms = self._copies.elapsed_ms(self._link.begun, self._link.ended)
            self._gbps = self._link.nbytes / elapsed_ms / 1e6 if elapsed_ms else self._gbps
        return self._gbps

    def tile(self, position: int) -> None:
        """The tile at ``position`` in the cycle is called for: a new forward, if it is not after the last one."""
        if position <= self._last_position:
            self._end_forward()
            if self.forwards % _SAMPLED_EVERY == 1:
                self._now.begun = self._record()
        self._last_position = position

    def rest(self) -> None:
        """The last forward for now has been launched: it ends here, not where the next one begins."""
        if self._last_position >= 0:
            self._end_forward()
            self._last_position = -1

    def copied(self, nbytes: int, pinned_bytes: int, link: Link | None = None) -> None:
        """A tile's copy has been launched; ``link``: it is timed. Before it is, its events must not be asked."""
        self._link = link or self._link
        self._now.copied_bytes += nbytes
        self._now.pinned_bytes += pinned_bytes

    def missed(self) -> None:
        self._now.refetched += 1
        self.refetched += 1

    def before_wait(self) -> Any:
        """Where compute comes to a wait: what `after_wait` wants, or None in a forward that is not timed."""
        if self._now.begun is None:
            return None
        return self._record()

    def after_wait(self, before: Any) -> None:
        self._now.waits.append((before, self._record()))

    def _end_forward(self) -> None:
        done, self._now = self._now, _Running()
        self.forwards += 1
        if done.begun is not None:
            done.ended = self._record()
        self._passing.append(done)
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
            self._last = ForwardCost(done.copied_bytes, done.pinned_bytes, done.refetched, total_ms, stall_ms)
            if total_ms is not None:
                self._last_timed = self._last


def summarise(telemetry: Telemetry | None, is_pinned: bool) -> str | None:
    """One line on the latest timed forward, with advice where copies held it up; None if there is none.

    Args:
        telemetry: The figures.
        is_pinned: Whether all host memory is pinned.
    """
    cost = telemetry.last_timed if telemetry is not None else None
    if telemetry is None or cost is None or not cost.total_ms or cost.stall_ms is None:
        return None
    gbps = telemetry.link_gbps or 0.0
    share = cost.stall_ms / cost.total_ms
    line = (
        f"{cost.total_ms:.1f} ms a forward, of which compute waited {cost.stall_ms:.1f} ms ({100 * share:.0f} %) "
        f"for {cost.copied_bytes / 1e9:.2f} GB over a bus of {gbps:.1f} GB/s"
    )
    if cost.refetched:
        line += f"; {cost.refetched} tiles were not there in time, as blocks ran in another order"
    if share < _STALL_WORTH_ADVICE:
        return line
    if not is_pinned:
        return f"{line}. Not all host memory is pinned (see above): that slows copies down"
    if gbps < _SLOW_LINK_GBPS:
        return f"{line}. That is slow (PCIe 3 x16 gives 12 GB/s): check that the card sits in a full-width slot"
    return f"{line}. Keep more blocks in VRAM: each GiB of them saves about {2**30 / gbps / 1e6:.0f} ms"


_STALL_WORTH_ADVICE, _SLOW_LINK_GBPS = 0.1, 10.0
