"""Which blocks stay on the device, which are streamed, and what that costs. Integers only.

A forward runs the blocks in order. The streamed ones form a cycle: after the last of a forward comes the first of the
next. Residents are spread so that the bus is used evenly: every streamed byte takes the same time on the bus, and all
blocks compute for about the same time, whatever their size.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..memory import GIB, MIB

STAGING_BYTES = 208 * MIB
"""Default size of the staging ring: about five of Flux NF4's largest tiles. Measured (docs/measurements.md): with a
smaller ring compute stalls if the bus is only just fast enough; a larger one gains nothing."""

_RATES = 256


@dataclass(frozen=True)
class Residency:
    """How much of a model the user wants on the device. The free memory is the limit in any case.

    Attributes:
        counts: Kinds, and how many blocks of each stay. Kinds without a count share the rest of the budget.
        budget_bytes: For the whole model: residents, staging, and the tensors in no block. None: all free memory.
    """

    counts: tuple[tuple[str, int], ...] = ()
    budget_bytes: int | None = None


class BudgetTooSmallError(ValueError):
    """The budget is smaller than ``least_bytes``, which the model takes on the device with every block streamed."""

    def __init__(self, budget_bytes: float, least_bytes: int) -> None:
        takes = math.ceil(least_bytes / GIB * 100) / 100
        super().__init__(
            f"a VRAM budget of {budget_bytes / GIB:.2f} GiB is too small: with every block streamed this model takes "
            f"{takes:.2f} GiB, and a picture of 1024x1024 about 0.5 GiB more while it is made. Set the budget to "
            f"{takes:.2f} or more, or to 0 (automatic)."
        )
        self.least_bytes = least_bytes


@dataclass(frozen=True)
class BlockSize:
    """The size of a block in bytes.

    ``kind`` is the group of blocks that it belongs to. ``tiles`` are its parts that can be streamed, in any order;
    ``small`` is the rest (biases, norms), which is always on the device.
    """

    kind: str
    tiles: tuple[int, ...]
    small: int

    @functools.cached_property
    def streamed(self) -> int:
        return sum(self.tiles)

    @functools.cached_property
    def two_tiles(self) -> int:
        """Bytes of a ring in which one tile arrives while another computes.

        No layer of a block is followed by itself, so these are the two largest. A block of one tile is followed by
        another block of one.
        """
        largest = sorted(self.tiles)[-2:]
        return sum(largest) if len(largest) == 2 else 2 * sum(largest)

    @property
    def nbytes(self) -> int:
        return self.streamed + self.small


@dataclass(frozen=True)
class ResidencyPlan:
    """Indices of resident and streamed blocks in execution order, and the bytes that follow from them."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    resident_bytes: int
    small_bytes: int
    staging_bytes: int
    bytes_per_forward: int

    @property
    def device_bytes(self) -> int:
        """Bytes that the blocks take on the device: residents, the small parts of streamed blocks, staging."""
        return self.resident_bytes + self.small_bytes + self.staging_bytes


def plan_for(blocks: Sequence[BlockSize], resident: Iterable[int], staging_bytes: int = STAGING_BYTES) -> ResidencyPlan:
    """The plan that keeps exactly these blocks.

    The staging ring has ``staging_bytes``. It holds at least the two largest tiles of a block (`BlockSize.two_tiles`),
    so that one can arrive while the other computes, and never more than all streamed blocks together. Where blocks
    of two kinds meet, or a tile does not fit before the ring's end, one may have to wait for the one before it.
    """
    stay = set(resident)
    streamed = [index for index in range(len(blocks)) if index not in stay]
    two_tiles = max((blocks[index].two_tiles for index in streamed), default=0)
    bytes_per_forward = sum(blocks[index].streamed for index in streamed)
    return ResidencyPlan(
        resident=tuple(sorted(stay)),
        streamed=tuple(streamed),
        resident_bytes=sum(blocks[index].nbytes for index in stay),
        small_bytes=sum(blocks[index].small for index in streamed),
        staging_bytes=min(bytes_per_forward, max(two_tiles, staging_bytes)),
        bytes_per_forward=bytes_per_forward,
    )


def least_device_bytes(blocks: Sequence[BlockSize]) -> int:
    """The fewest bytes that the blocks can take on the device: all resident, or all streamed by the smallest ring."""
    return min(plan_for(blocks, (), 0).device_bytes, plan_for(blocks, range(len(blocks)), 0).device_bytes)


@functools.lru_cache(maxsize=64)
def plan_by_budget(
    blocks: tuple[BlockSize, ...],
    budget_bytes: float,
    staging_bytes: int = STAGING_BYTES,
    counts: tuple[tuple[str, int], ...] = (),
    other_bytes: int = 0,
) -> ResidencyPlan:
    """The plan that streams the fewest bytes while the model takes at most ``budget_bytes`` of the device.

    Args:
        blocks: In execution order.
        budget_bytes: May be infinite.
        staging_bytes: Size of the ring. If the budget is too small for it, the ring is as small as it can be.
        counts: Kinds, and how many blocks of each stay. Fewer stay only if they do not fit. The rest of the budget
            goes to the other kinds.
        other_bytes: Bytes that the model has on the device beside its blocks.

    Raises:
        BudgetTooSmallError: the model takes more even with every block streamed.
    """
    for_blocks = budget_bytes - other_bytes
    for plans in (_plans_beside, _plans_of_fewer, _least_plan):
        fitting = [plan for plan in plans(blocks, counts, staging_bytes) if plan.device_bytes <= for_blocks]
        if fitting:
            return min(fitting, key=lambda plan: (plan.bytes_per_forward, plan.device_bytes))
    raise BudgetTooSmallError(budget_bytes, other_bytes + least_device_bytes(blocks))


def keeps_all(plan: ResidencyPlan, more_bytes: int, for_blocks: float) -> bool:
    """Whether ``plan`` keeps every block and leaves ``more_bytes`` of ``for_blocks``, the bytes that blocks may take.

    Layers that are computed ahead (`Ahead`) then stay on the device, too: ``more_bytes`` is what that takes.
    """
    return not plan.streamed and plan.device_bytes + more_bytes <= for_blocks


_Counts = tuple[tuple[str, int], ...]


@functools.lru_cache(maxsize=64)  # a user drags the budget through many values, and all of them use these plans
def _plans_beside(blocks: tuple[BlockSize, ...], counts: _Counts, staging_bytes: int) -> tuple[ResidencyPlan, ...]:
    """Plans that keep every block in ``counts`` and a growing number of the other kinds."""
    stay = _by_counts(blocks, dict(counts))
    counted = {kind for kind, _ in counts}
    sets = [stay] if all(block.kind in counted for block in blocks) else _resident_sets(blocks)
    others = dict.fromkeys(tuple(index for index in one if blocks[index].kind not in counted) for one in sets)
    return tuple(_all_if_no_more(plan_for(blocks, {*stay, *one}, staging_bytes), blocks) for one in others)


@functools.lru_cache(maxsize=8)
def _resident_sets(blocks: tuple[BlockSize, ...]) -> tuple[tuple[int, ...], ...]:
    """The sets of residents at all rates of the bus, each once."""
    return tuple(dict.fromkeys(tuple(_residents_at(blocks, rate)) for rate in range(_RATES + 1)))


@functools.lru_cache(maxsize=64)
def _plans_of_fewer(blocks: tuple[BlockSize, ...], counts: _Counts, staging_bytes: int) -> tuple[ResidencyPlan, ...]:
    """Plans that keep only a share of ``counts``."""
    sets = {tuple((kind, count * share // _RATES) for kind, count in counts): None for share in range(_RATES)}
    return tuple(plan_for(blocks, _by_counts(blocks, dict(fewer)), staging_bytes) for fewer in sets)


def _least_plan(blocks: tuple[BlockSize, ...], *_: object) -> tuple[ResidencyPlan, ...]:
    return (plan_for(blocks, (), 0),)


def predict_stall_ms(plan: ResidencyPlan, blocks: Sequence[BlockSize], gbps: float, compute_ms: float) -> float:
    """How long compute waits for copies in a steady forward, in ms.

    Args:
        plan: The plan.
        blocks: The blocks that it was made for.
        gbps: Bandwidth of the bus, 1e9 bytes a second.
        compute_ms: Compute time of one block.
    """
    streamed = set(plan.streamed)
    bytes_a_block = gbps * 1e6 * compute_ms
    staged, missing = 0.0, 0.0
    for _ in range(2):  # the first round fills the pipeline
        missing = 0.0
        for index, block in enumerate(blocks):
            tiles = block.tiles if index in streamed else (0,)
            arriving = bytes_a_block / len(tiles)
            for tile in tiles:
                staged -= tile
                if staged < 0.0:
                    missing -= staged
                    staged = 0.0
                staged = min(plan.staging_bytes, staged + arriving)
    return missing / (gbps * 1e6)


def _all_if_no_more(plan: ResidencyPlan, blocks: Sequence[BlockSize]) -> ResidencyPlan:
    """The plan with all blocks resident if it takes no more than ``plan``; else ``plan``."""
    return plan if plan.bytes_per_forward > plan.staging_bytes else plan_for(blocks, range(len(blocks)))


def _by_counts(blocks: Sequence[BlockSize], counts: Mapping[str, int]) -> list[int]:
    return [index for kind, count in counts.items() for index in spread(_indices(blocks, kind), count)]


def _indices(blocks: Sequence[BlockSize], kind: str) -> list[int]:
    return [index for index, block in enumerate(blocks) if block.kind == kind]


def spread(indices: Sequence[int], count: int) -> list[int]:
    """``count`` of ``indices`` at even distances; all of them if ``count`` is larger."""
    count = min(max(count, 0), len(indices))
    return [indices[(2 * i + 1) * len(indices) // (2 * count)] for i in range(count)]


def smaller_plans(
    plan: ResidencyPlan, before: ResidencyPlan | None, blocks: Sequence[BlockSize]
) -> Iterable[ResidencyPlan]:
    """The plans to try, one after the other, if the device has no room for ``plan``: the one ``before`` first."""
    if before is not None and before.device_bytes < plan.device_bytes:
        yield before
    count = len(plan.resident)
    for fewer in sorted({3 * count // 4, count // 2, count // 4, 0} - {count}, reverse=True):
        yield plan_for(blocks, spread(plan.resident, fewer), plan.staging_bytes)


def _residents_at(blocks: Sequence[BlockSize], rate: int) -> list[int]:
    """The blocks that stay if the bus copies ``rate / _RATES`` of the largest block while one block computes."""
    largest = max((block.streamed for block in blocks), default=0)
    credit, stay = 0, []
    for index, block in enumerate(blocks):
        credit += largest * rate
        if credit >= block.streamed * _RATES:
            credit -= block.streamed * _RATES
        else:
            stay.append(index)
        credit = min(credit, largest * _RATES)
    return stay
