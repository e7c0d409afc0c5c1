"""Which blocks stay on the device, which are streamed, and what that costs. Integers only.

A forward runs the blocks in order. The streamed ones form a cycle: after the last of a forward comes the first of
the next. Residents are spread so that streamed bytes come at an even rate: every byte of them takes the same time
on the bus, and every block computes about as long, whatever its size.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

STAGING_BYTES = 208 << 20
"""Default size of the staging ring: about five of Flux NF4's largest tiles. Measured (README): less stalls where the
bus is only just fast enough, more gains nothing."""

_RATES = 256


@dataclass(frozen=True)
class BlockSize:
    """What a block weighs, in bytes.

    ``kind`` groups blocks of equal structure ("double", "single"). ``tiles`` are the parts that are streamed, in no
    order; ``small`` is the rest (biases, norms), which is always on the device.
    """

    kind: str
    tiles: tuple[int, ...]
    small: int

    @functools.cached_property
    def streamed(self) -> int:
        return sum(self.tiles)

    @functools.cached_property
    def largest_tile(self) -> int:
        return max(self.tiles, default=0)

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
        """What the blocks need on the device: residents, the small parts of streamed blocks, staging."""
        return self.resident_bytes + self.small_bytes + self.staging_bytes


def plan_for(blocks: Sequence[BlockSize], resident: Iterable[int], staging_bytes: int = STAGING_BYTES) -> ResidencyPlan:
    """The plan that keeps exactly these blocks.

    The staging ring is ``staging_bytes``, or what the streamed blocks fill where that is less, or twice the largest
    tile where that is more.
    """
    stay = set(resident)
    streamed = [index for index in range(len(blocks)) if index not in stay]
    largest = max((blocks[index].largest_tile for index in streamed), default=0)
    bytes_per_forward = sum(blocks[index].streamed for index in streamed)
    return ResidencyPlan(
        resident=tuple(sorted(stay)),
        streamed=tuple(streamed),
        resident_bytes=sum(blocks[index].nbytes for index in stay),
        small_bytes=sum(blocks[index].small for index in streamed),
        staging_bytes=max(2 * largest, min(staging_bytes, bytes_per_forward)),
        bytes_per_forward=bytes_per_forward,
    )


def least_device_bytes(blocks: Sequence[BlockSize]) -> int:
    """What the blocks need on the device at the very least: all streamed, through the smallest ring."""
    return min(plan_for(blocks, (), 0).device_bytes, plan_for(blocks, range(len(blocks)), 0).device_bytes)


@functools.lru_cache(maxsize=64)
def plan_by_budget(
    blocks: tuple[BlockSize, ...],
    budget_bytes: float,
    staging_bytes: int = STAGING_BYTES,
    counts: tuple[tuple[str, int], ...] = (),
) -> ResidencyPlan:
    """Spend at most ``budget_bytes`` of the device on the blocks, so that the least possible goes over the bus.

    Args:
        blocks: In execution order.
        budget_bytes: May be infinite.
        staging_bytes: Of the ring; where the budget is too small for it, the ring is as small as it can be.
        counts: Kinds, and how many blocks of each stay: no more, and fewer only where they do not fit. What they
            leave of the budget goes to the other kinds.

    Raises:
        ValueError: even with every block streamed it would take more; the message says how much.
    """
    for plans in (_plans_beside, _plans_of_fewer, _least_plan):
        fitting = [plan for plan in plans(blocks, counts, staging_bytes) if plan.device_bytes <= budget_bytes]
        if fitting:
            return min(fitting, key=lambda plan: (plan.bytes_per_forward, plan.device_bytes))
    raise ValueError(
        f"a budget of {budget_bytes / 2**20:.0f} MiB is too small for the blocks: streaming all of them takes "
        f"{least_device_bytes(blocks) / 2**20:.0f} MiB"
    )


_Counts = tuple[tuple[str, int], ...]


@functools.lru_cache(maxsize=64)  # a budget is dragged through many values, and these are the same for all of them
def _plans_beside(blocks: tuple[BlockSize, ...], counts: _Counts, staging_bytes: int) -> tuple[ResidencyPlan, ...]:
    """Those that keep all that ``counts`` says, and more and more of the other kinds."""
    stay = _by_counts(blocks, dict(counts))
    counted = {kind for kind, _ in counts}
    sets = [stay] if all(block.kind in counted for block in blocks) else _resident_sets(blocks)
    others = dict.fromkeys(tuple(index for index in one if blocks[index].kind not in counted) for one in sets)
    return tuple(_all_if_no_more(plan_for(blocks, {*stay, *one}, staging_bytes), blocks) for one in others)


@functools.lru_cache(maxsize=8)
def _resident_sets(blocks: tuple[BlockSize, ...]) -> tuple[tuple[int, ...], ...]:
    """What stays at each rate of the bus, without repetitions."""
    return tuple(dict.fromkeys(tuple(_residents_at(blocks, rate)) for rate in range(_RATES + 1)))


@functools.lru_cache(maxsize=64)
def _plans_of_fewer(blocks: tuple[BlockSize, ...], counts: _Counts, staging_bytes: int) -> tuple[ResidencyPlan, ...]:
    """Those that keep only a share of ``counts``."""
    sets = {tuple((kind, count * share // _RATES) for kind, count in counts): None for share in range(_RATES)}
    return tuple(plan_for(blocks, _by_counts(blocks, dict(fewer)), staging_bytes) for fewer in sets)


def _least_plan(blocks: tuple[BlockSize, ...], *_: object) -> tuple[ResidencyPlan, ...]:
    return (plan_for(blocks, (), 0),)


def predict_stall_ms(plan: ResidencyPlan, blocks: Sequence[BlockSize], gbps: float, compute_ms: float) -> float:
    """How long compute waits for copies in a steady forward, in ms.

    Args:
        plan: The plan.
        blocks: What it was made for.
        gbps: Bandwidth of the bus, 1e9 bytes a second.
        compute_ms: Time that one block computes.
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
    """All blocks resident, where that takes no more than the plan."""
    return plan if plan.bytes_per_forward > plan.staging_bytes else plan_for(blocks, range(len(blocks)))


def _by_counts(blocks: Sequence[BlockSize], counts: Mapping[str, int]) -> list[int]:
    return [index for kind, count in counts.items() for index in spread(_indices(blocks, kind), count)]


def _indices(blocks: Sequence[BlockSize], kind: str) -> list[int]:
    return [index for index, block in enumerate(blocks) if block.kind == kind]


def spread(indices: Sequence[int], count: int) -> list[int]:
    """``count`` of ``indices`` (all, if more) at even distances."""
    count = min(max(count, 0), len(indices))
    return [indices[(2 * i + 1) * len(indices) // (2 * count)] for i in range(count)]


def _residents_at(blocks: Sequence[BlockSize], rate: int) -> list[int]:
    """The blocks that stay when the bus gets ``rate / _RATES`` of the largest block's bytes a block's compute."""
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
