"""Places of tiles in the staging ring: integers only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_nf4.offload.ring import lay_out

tiles = st.lists(st.integers(1, 100), min_size=1, max_size=40)


def overlap(sizes, ring, one, other):
    a, b = ring.offsets[one], ring.offsets[other]
    return a < b + sizes[other] and b < a + sizes[one]


@given(tiles, st.integers(100, 400))
def test_what_is_fetched_ahead_never_overwrites_what_is_still_needed(sizes, nbytes):
    ring = lay_out(tuple(sizes), nbytes)
    for index in range(len(sizes)):
        assert 0 <= ring.offsets[index] <= nbytes - sizes[index]
        for needed, run in (([], ring.ahead[index]), ([index], ring.beside[index])):
            together = [*needed, *run]
            assert [(index + 1 + i) % len(sizes) for i in range(len(run))] == list(run)
            assert not any(overlap(sizes, ring, a, b) for a in together for b in together if a != b)


@given(tiles, st.integers(100, 400))
def test_what_is_evicted_is_what_overlaps(sizes, nbytes):
    ring = lay_out(tuple(sizes), nbytes)
    for index in range(len(sizes)):
        others = [other for other in range(len(sizes)) if other != index and overlap(sizes, ring, index, other)]
        assert ring.evicted[index] == set(others)


@given(tiles, st.integers(100, 400))
def test_as_much_as_fits_is_fetched_ahead(sizes, nbytes):
    ring = lay_out(tuple(sizes), nbytes)
    for index, run in enumerate(ring.ahead):
        following = (index + len(run) + 1) % len(sizes)
        if len(run) < len(sizes) - 1:
            assert any(overlap(sizes, ring, following, other) for other in run)


def test_a_tile_larger_than_the_ring_is_refused():
    with pytest.raises(ValueError, match="101 bytes does not fit into a staging ring of 100"):
        lay_out((5, 101), 100)
