"""Where each tile goes in the staging ring. Integers only.

Tiles follow each other through a ring of bytes in the order in which a forward uses them, the first of the next
forward after the last of this one. Each tile has one fixed place, so what may be fetched early is known beforehand:
the tiles that follow the present one, up to the first whose place is still taken by one of them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class Ring:
    """For each tile, in the order of use: its first byte, and indices of others in the ring.

    ``ahead[i]``: the tiles to fetch once tile i is done with, in the order of use.
    ``beside[i]``: those of them that can be there while tile i still is.
    ``evicted[i]``: the tiles whose bytes are gone when tile i is fetched.
    """

    offsets: tuple[int, ...]
    ahead: tuple[tuple[int, ...], ...]
    beside: tuple[tuple[int, ...], ...]
    evicted: tuple[frozenset[int], ...]


@functools.lru_cache(maxsize=16)
def lay_out(tiles: tuple[int, ...], ring_bytes: int) -> Ring:
    """Place tiles of these sizes (bytes, each at most ``ring_bytes``) in a ring. Kept for the next time.

    Raises:
        ValueError: a tile is larger than the ring.
    """
    if tiles and max(tiles) > ring_bytes:
        raise ValueError(f"a tile of {max(tiles):,} bytes does not fit into a staging ring of {ring_bytes:,} bytes")
    spans = _spans(tiles, ring_bytes)
    indices = range(len(tiles))
    return Ring(
        offsets=tuple(start for start, _ in spans),
        ahead=tuple(tuple(_run(spans, index, [])) for index in indices),
        beside=tuple(tuple(_run(spans, index, [index])) for index in indices),
        evicted=tuple(
            frozenset(other for other in indices if other != index and _overlap(spans[other], spans[index]))
            for index in indices
        ),
    )


def _spans(tiles: Sequence[int], ring_bytes: int) -> list[Span]:
    """Places from the start of the ring to its end and over again, begun where they leave most room ahead.

    The first tile should lie where the last one ends: if it lay under it, nothing could be fetched before a forward
    is over. Where the places end depends on where they begin, so a few beginnings are tried.
    """
    best: list[Span] = []
    start, most = 0, -1
    for _ in range(_TRIES if tiles else 0):
        spans, cursor = [], start
        for nbytes in tiles:
            cursor = cursor if cursor + nbytes <= ring_bytes else 0
            spans.append((cursor, cursor + nbytes))
            cursor += nbytes
        room = sum(tiles[other] for index in range(-_AROUND, 0) for other in _run(spans, index % len(spans), []))
        if room > most:
            best, most = spans, room
        start = cursor if cursor + tiles[0] <= ring_bytes else 0
    return best


_TRIES, _AROUND = 16, 8


def _run(spans: Sequence[Span], index: int, taken: list[int]) -> list[int]:
    """The tiles after ``index``, in the cycle, that fit beside each other and beside ``taken``."""
    run: list[int] = []
    for step in range(1, len(spans)):
        following = (index + step) % len(spans)
        if any(_overlap(spans[following], spans[other]) for other in (*taken, *run)):
            break
        run.append(following)
    return run


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
