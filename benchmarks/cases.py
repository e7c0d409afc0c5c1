"""What is measured: a picture and how it is made, and what the machine is made to look like."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One measurement of every contender.

    ``steps`` 0 means single calls of the transformer; else whole samplings with euler. ``cap_gib`` makes the device as
    small as such a card, ``bus_gbps`` its bus as slow; 0 leaves them as they are.
    """

    name: str
    pixels: int = 1024
    batch: int = 1
    steps: int = 0
    cfg: float = 1.0
    loras: int = 0
    rank: int = 0
    cap_gib: float = 0.0
    bus_gbps: float = 0.0
    text_tokens: int = 512


CASES = (
    *(Case(str(pixels), pixels) for pixels in (1024, 512, 768, 1536)),
    Case("1024-batch2", batch=2),
    Case("1024-lora16", loras=1, rank=16),
    Case("1024-4xlora32", loras=4, rank=32),
    *(Case(f"{pixels}-bus{gbps}", pixels, bus_gbps=gbps) for pixels in (1024, 512) for gbps in (12, 25)),
    *(Case(f"{pixels}-cap{gib}", pixels, cap_gib=gib) for pixels in (1024, 512) for gib in (4, 6, 8, 12)),
    *(Case(f"1024-lora16-cap{gib}", loras=1, rank=16, cap_gib=gib) for gib in (4, 6, 8)),
    Case("1024-4steps", steps=4),
    Case("1024-20steps", steps=20),
    Case("1024-4steps-cfg", steps=4, cfg=4.0),
    Case("512-4steps", 512, steps=4),
)

TINY_CASES = (
    Case("tiny", 64, text_tokens=8),
    Case("tiny-lora", 64, loras=2, rank=4, text_tokens=8),
    Case("tiny-steps-cfg", 64, batch=2, steps=2, cfg=3.0, text_tokens=8),
)
"""The same paths, small enough for a CPU."""


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the shell patterns, in their own order; all of them if there is no pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{pattern}: there is no such name; there are {', '.join(names)}")
    return [name for name in names if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
