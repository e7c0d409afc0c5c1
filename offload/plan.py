"""Which blocks stay on the device, which are streamed, and in what order. Integers only.

A forward runs the blocks in order. Resident blocks are spread evenly between streamed ones, so that the copy of
the next streamed block has the compute of residents to hide behind. The streamed blocks form a cycle: after the
last one of a forward comes the first one of the next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STAGING_SLOTS = 2


@dataclass(frozen=True)
class BlockSize:
    """A block's kind ("double", "single") and the size of its record in bytes."""

    kind: str
    nbytes: int


@dataclass(frozen=True)
class ResidencyPlan:
    """Indices of resident and streamed blocks, each in execution order; bytes of each staging slot."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    slot_bytes: int
    resident_bytes: int
    bytes_per_forward: int

    @property
    def slots(self) -> int:
        return STAGING_SLOTS if self.streamed else 0

    @property
    def staging_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def device_bytes(self) -> int:
        """What the blocks need on the device: residents and staging."""
        return self.resident_bytes + self.staging_bytes


def plan_by_counts(blocks: Sequence[BlockSize], resident: Mapping[str, int]) -> ResidencyPlan:
    """Keep ``resident[kind]`` blocks of each kind on the device.

    Counts above a kind's depth mean all of it, kinds not named mean none. If the streamed blocks would fill no
    more than the staging slots, they would sit there for ever: then every block is resident instead.
    """
    stay = {index for kind, count in resident.items() for index in _spread(_indices(blocks, kind), count)}
    if len(blocks) - len(stay) <= STAGING_SLOTS:
        stay = set(range(len(blocks)))
    streamed = tuple(index for index in range(len(blocks)) if index not in stay)
    return ResidencyPlan(
        resident=tuple(sorted(stay)),
        streamed=streamed,
        slot_bytes=max((blocks[index].nbytes for index in streamed), default=0),
        resident_bytes=sum(blocks[index].nbytes for index in stay),
        bytes_per_forward=sum(blocks[index].nbytes for index in streamed),
    )


def _indices(blocks: Sequence[BlockSize], kind: str) -> list[int]:
    return [index for index, block in enumerate(blocks) if block.kind == kind]


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """``count`` of ``indices`` at even distances."""
    count = min(max(count, 0), len(indices))
    return [indices[(2 * i + 1) * len(indices) // (2 * count)] for i in range(count)]
