"""Residency plans: integers only."""

from hypothesis import given
from hypothesis import strategies as st

from flux_nf4.offload.plan import BlockSize, plan_by_counts

DOUBLE, SINGLE = BlockSize("double", 191_300_000), BlockSize("single", 79_700_000)

models = st.tuples(st.integers(0, 19), st.integers(0, 38)).map(lambda n: (DOUBLE,) * n[0] + (SINGLE,) * n[1])
counts = st.fixed_dictionaries({"double": st.integers(-1, 30), "single": st.integers(-1, 50)})


@given(models, counts)
def test_every_block_is_resident_or_streamed_in_order(blocks, resident):
    plan = plan_by_counts(blocks, resident)
    assert sorted(plan.resident + plan.streamed) == list(range(len(blocks)))
    assert list(plan.resident) == sorted(plan.resident)
    assert list(plan.streamed) == sorted(plan.streamed)


@given(models, counts)
def test_as_many_blocks_of_each_kind_stay_as_asked(blocks, resident):
    plan = plan_by_counts(blocks, resident)
    if plan.streamed:
        for kind, count in resident.items():
            depth = sum(block.kind == kind for block in blocks)
            assert sum(blocks[i].kind == kind for i in plan.resident) == min(max(count, 0), depth)


@given(models, counts)
def test_bytes_add_up(blocks, resident):
    plan = plan_by_counts(blocks, resident)
    assert plan.resident_bytes + plan.bytes_per_forward == sum(block.nbytes for block in blocks)
    assert plan.slot_bytes == max((blocks[i].nbytes for i in plan.streamed), default=0)
    assert plan.device_bytes == plan.resident_bytes + plan.slots * plan.slot_bytes


def test_blocks_that_would_sit_in_their_slots_for_ever_are_resident():
    assert plan_by_counts((DOUBLE, SINGLE), {}).streamed == ()
    assert plan_by_counts((DOUBLE, SINGLE, SINGLE), {}).streamed == (0, 1, 2)


def test_residents_are_spread_evenly():
    plan = plan_by_counts((SINGLE,) * 9, {"single": 3})
    assert plan.resident == (1, 4, 7)
