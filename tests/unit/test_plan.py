"""Residency plans: integers only."""

import pytest
from counted import plan_by_counts
from hypothesis import given
from hypothesis import strategies as st

from flux_nf4.offload.plan import (
    STAGING_BYTES,
    BlockSize,
    least_device_bytes,
    plan_by_budget,
    plan_for,
    predict_stall_ms,
)
from flux_nf4.offload.ring import lay_out

DOUBLE = BlockSize("double", (15_900_000,) * 2 + (5_300_000,) * 2 + (21_200_000,) * 4 + (31_850_000,) * 2, 192_512)
SINGLE = BlockSize("single", (15_900_000, 37_160_000, 26_540_000), 62_000)
FLUX = (DOUBLE,) * 19 + (SINGLE,) * 38

models = st.tuples(st.integers(0, 19), st.integers(0, 38)).map(lambda n: (DOUBLE,) * n[0] + (SINGLE,) * n[1])
counts = st.fixed_dictionaries({"double": st.integers(-1, 30), "single": st.integers(-1, 50)})
budgets = st.integers(0, 8 * 2**30)


def check(plan, blocks):
    assert sorted(plan.resident + plan.streamed) == list(range(len(blocks)))
    assert list(plan.resident) == sorted(plan.resident)
    assert list(plan.streamed) == sorted(plan.streamed)
    assert plan.resident_bytes == sum(blocks[i].nbytes for i in plan.resident)
    assert plan.bytes_per_forward == sum(blocks[i].streamed for i in plan.streamed)
    assert plan.device_bytes == plan.resident_bytes + plan.staging_bytes + sum(blocks[i].small for i in plan.streamed)
    if plan.streamed:
        assert plan.staging_bytes >= max(tile for index in plan.streamed for tile in blocks[index].tiles)
    else:
        assert plan.staging_bytes == 0


@given(models, counts)
def test_counts_give_every_block_once_and_as_many_residents_as_asked(blocks, resident):
    plan = plan_by_counts(blocks, resident)
    check(plan, blocks)
    if plan.streamed:
        for kind, count in resident.items():
            depth = sum(block.kind == kind for block in blocks)
            assert sum(blocks[i].kind == kind for i in plan.resident) == min(max(count, 0), depth)


@given(models, budgets)
def test_a_budget_is_never_exceeded(blocks, budget):
    try:
        plan = plan_by_budget(blocks, budget)
    except ValueError:
        assert budget < least_device_bytes(blocks)
    else:
        check(plan, blocks)
        assert plan.device_bytes <= budget


@given(budgets, budgets)
def test_a_larger_budget_never_streams_more(one, other):
    small, large = sorted((one, other))
    least = plan_by_counts(FLUX, {}).device_bytes
    streamed = [plan_by_budget(FLUX, max(budget, least)).bytes_per_forward for budget in (small, large)]
    assert streamed[0] >= streamed[1]


def test_a_budget_is_used_up_to_one_block():
    for budget in range(2**30, 7 * 2**30, 2**28):
        plan = plan_by_budget(FLUX, budget)
        if plan.streamed:
            assert budget - plan.device_bytes < 2 * DOUBLE.nbytes


def test_a_budget_that_is_too_small_names_the_smallest():
    least = least_device_bytes(FLUX)
    with pytest.raises(ValueError, match=r"this model takes 0\.07 GiB"):
        plan_by_budget(FLUX, least - 1)
    assert plan_by_budget(FLUX, least).device_bytes == least
    assert least < plan_by_counts(FLUX, {}).device_bytes


@given(budgets, st.integers(0, 20), st.integers(0, 40))
def test_counts_are_kept_where_the_budget_allows_and_shrink_where_it_does_not(budget, double, single):
    asked = plan_by_counts(FLUX, {"double": double, "single": single})
    plan = plan_by_budget(FLUX, max(budget, least_device_bytes(FLUX)), counts=(("double", double), ("single", single)))
    check(plan, FLUX)
    if asked.device_bytes <= budget:
        assert plan == asked
    else:
        assert plan.bytes_per_forward >= asked.bytes_per_forward
        for kind in ("double", "single"):
            staying = [sum(FLUX[i].kind == kind for i in p.resident) for p in (plan, asked)]
            assert staying[0] <= staying[1]


@given(budgets, st.integers(0, 19))
def test_what_the_count_of_one_kind_leaves_goes_to_the_other(budget, double):
    alone = plan_by_counts(FLUX, {"double": double})
    plan = plan_by_budget(FLUX, max(budget, alone.device_bytes), counts=(("double", double),))
    check(plan, FLUX)
    assert set(alone.resident) <= set(plan.resident)
    if plan.streamed:
        assert sum(FLUX[i].kind == "double" for i in plan.resident) == double
        assert plan.device_bytes > min(budget, alone.device_bytes + 5 * SINGLE.nbytes) - 6 * SINGLE.nbytes


def test_blocks_that_would_sit_in_the_ring_for_ever_are_resident():
    assert plan_by_counts((SINGLE, SINGLE), {}).streamed == ()
    assert plan_by_counts((SINGLE,) * 3, {}, staging_bytes=0).streamed == (0, 1, 2)


def test_residents_are_spread_evenly():
    assert plan_by_counts((SINGLE,) * 9, {"single": 3}).resident == (1, 4, 7)


def test_a_budget_spreads_streamed_bytes_evenly():
    """Over any stretch of blocks about the same bytes a block come over the bus; first-N would give 0 or all."""
    plan = plan_by_budget(FLUX, 3 * 2**30)
    streamed = [FLUX[i].streamed if i in plan.streamed else 0 for i in range(len(FLUX))]
    mean = sum(streamed) / len(streamed)
    for start in range(len(FLUX) - 10):
        assert abs(sum(streamed[start : start + 10]) - 10 * mean) < 2 * DOUBLE.streamed


def test_stall_is_what_the_bus_takes_beyond_compute():
    everything = plan_by_counts(FLUX, {})
    bus_ms = everything.bytes_per_forward / 25e6
    assert predict_stall_ms(everything, FLUX, gbps=25, compute_ms=0.0) == pytest.approx(bus_ms, rel=0.01)
    assert predict_stall_ms(everything, FLUX, gbps=25, compute_ms=1e4) == 0
    assert predict_stall_ms(plan_by_counts(FLUX, {"double": 19, "single": 38}), FLUX, 25, 1.0) == 0
    some = [predict_stall_ms(plan_by_budget(FLUX, gib * 2**30), FLUX, 25, 1.2) for gib in (1, 2, 3, 4, 5)]
    assert some == sorted(some, reverse=True)


def test_the_default_ring_holds_several_of_the_largest_tiles():
    assert 4 * max(SINGLE.tiles) < STAGING_BYTES


def test_the_ring_holds_any_two_tiles_that_follow_one_another():
    """A Linear of FLUX.2 has 190 MB: with the one after it that is more than the ring that is enough for Flux.1."""
    first, second, third = 190_000_000, 85_000_000, 1 << 20
    blocks = [BlockSize("single", (third, first, second), 4096)] * 8
    for staging in (STAGING_BYTES, 1):
        assert plan_for(blocks, (), staging_bytes=staging).staging_bytes == first + second
    assert plan_for(blocks, range(8)).staging_bytes == 0
    alone = BlockSize("whole", (first,), 4096)
    assert plan_for([alone] * 8, (), staging_bytes=1).staging_bytes == 2 * first, "the same tile of the next block"
    assert plan_for([*blocks, alone, alone], range(8), staging_bytes=1).staging_bytes == 2 * first
    assert plan_for([*blocks, alone], (8,), staging_bytes=1).staging_bytes == first + second


def test_the_ring_is_never_larger_than_all_that_is_streamed():
    alone = BlockSize("whole", (1000,), 8)
    for staging in (0, 1000, STAGING_BYTES):
        assert plan_for([alone, SINGLE], (1,), staging_bytes=staging).staging_bytes == 1000
        assert (
            plan_for([alone, SINGLE], (1,), staging).device_bytes < plan_for([alone, SINGLE], (0, 1)).device_bytes + 8
        )


@pytest.mark.parametrize("hidden", [6144, 4096], ids=["dev", "klein 9B"])
def test_while_a_layer_of_flux2_computes_the_next_one_has_room(hidden):
    """In a ring of `two_tiles`: of the double blocks' layers, and at the ends of each kind, too."""
    unit = hidden * hidden * 9 // 16
    double = tuple(unit * part for part in (3, 3, 1, 6, 3, 1, 6, 3))
    single = (9 * unit, 4 * unit)
    blocks = [BlockSize("double", double, 0)] * 3 + [BlockSize("single", single, 0)] * 5
    ring_bytes = plan_for(blocks, (), staging_bytes=1).staging_bytes
    assert ring_bytes == 13 * unit
    assert all(lay_out(tuple(tile for block in blocks for tile in block.tiles), ring_bytes).beside)
