"""In which order tiles are fetched: learned from whole calls of blocks, whatever else is called."""

import pytest

from flux_nf4.offload.call_order import CallOrders

CALLS = (2, 0, 3, 1)
OTHER = (0, 1, 2, 3)
REGISTERED = (0, 1, 2, 3)


@pytest.fixture
def orders():
    """Three blocks of one structure with four tiles, one of another structure with two."""
    return CallOrders((0, 0, 0, 1), (4, 4, 4, 2))


def see(orders, index, tiles):
    return [orders.saw(index, local) for local in tiles]


def test_the_order_of_a_whole_block_is_that_of_all_blocks_of_its_structure(orders):
    assert orders.of(2) == REGISTERED
    assert see(orders, 0, CALLS) == [False, False, False, True]
    assert orders.of(2) == CALLS
    assert orders.of(3) == (0, 1)


def test_a_block_that_calls_its_tiles_as_registered_changes_nothing(orders):
    assert not any(see(orders, 0, REGISTERED))
    assert not any(see(orders, 1, CALLS)), "one block that differs does not change what is learned"
    assert orders.of(0) == REGISTERED


@pytest.mark.parametrize(
    "before",
    [(2,), (3,), (2, 2), (2, 0), (2, 0, 3), (0, 1, 3), (2, 0, 3, 3)],
    ids=lambda tiles: "".join(map(str, tiles)),
)
def test_calls_out_of_turn_and_a_block_that_was_cut_short_teach_nothing(orders, before):
    see(orders, 0, before)
    for _ in range(2):
        for index in (0, 1, 2):
            see(orders, index, CALLS)
    assert orders.of(0) == CALLS


def test_calls_of_another_block_in_between_do_not_matter(orders):
    for local in CALLS:
        orders.saw(0, local)
        orders.saw(1, 3)
    assert orders.of(0) == CALLS


def test_a_block_that_leaves_a_tile_out_or_calls_one_twice_teaches_nothing(orders):
    for _ in range(5):
        see(orders, 0, (2, 0, 3))
    for _ in range(5):
        see(orders, 1, (1, 1, 1, 1, 3))
    assert orders.of(0) == REGISTERED
    see(orders, 2, CALLS)
    assert orders.of(0) == CALLS


def test_a_model_that_changes_its_order_is_followed_at_the_second_block(orders):
    see(orders, 0, CALLS)
    assert not any(see(orders, 0, OTHER))
    assert see(orders, 1, OTHER)[-1]
    assert orders.of(2) == OTHER
    see(orders, 0, CALLS)
    assert orders.of(2) == OTHER
    see(orders, 1, CALLS)
    assert orders.of(2) == CALLS


def test_one_block_that_differs_in_each_forward_changes_nothing(orders):
    see(orders, 0, CALLS)
    for _ in range(4):
        see(orders, 1, OTHER)
        see(orders, 2, CALLS)
    assert orders.of(0) == CALLS
