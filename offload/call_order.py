"""The order in which blocks call their layers, learned by watching whole calls of them. Integers only.

Modules are registered in one order and called in another. Tiles must be fetched in the order of the calls, or nearly
every one of them is evicted before its use and copied twice.
"""

from collections import deque
from collections.abc import Sequence


class CallOrders:
    """The order of calls of each structure: blocks of one structure are taken to call their layers alike.

    ``structures`` has a number for each block, equal for blocks of equal structure; ``tiles`` is how many tiles each
    block has. Until something is learned, tiles are in the order of registration.

    An order is learned only from as many calls in a row of one block as it has tiles, of each tile once. So a layer
    that is called out of turn, left out or called twice teaches nothing, and neither does a block that was cut short.
    The first whole block of a structure sets the order. It changes when two whole blocks in a row show the same other
    one, so that a single block which differs does not change it back and forth.
    """

    def __init__(self, structures: Sequence[int], tiles: Sequence[int]) -> None:
        self._structures = tuple(structures)
        self._registered = [tuple(range(count)) for count in tiles]
        self._calls = [deque[int](maxlen=count) for count in tiles]
        self._learned: dict[int, tuple[int, ...]] = {}
        self._others: dict[int, tuple[int, ...]] = {}

    def of(self, index: int) -> tuple[int, ...]:
        """The tiles of block ``index`` in the order to fetch them in."""
        return self._learned.get(self._structures[index], self._registered[index])

    def saw(self, index: int, local: int) -> bool:
        """Note that block ``index`` has called its tile ``local``. Returns whether this changes an order."""
        calls = self._calls[index]
        calls.append(local)
        if len(calls) != calls.maxlen:
            return False
        seen, structure = tuple(calls), self._structures[index]
        if seen == self._learned.get(structure):
            calls.clear()
            self._others.pop(structure, None)
            return False
        if len(set(seen)) < len(seen):
            return False
        calls.clear()
        return self._learn(structure, seen, self.of(index))

    def _learn(self, structure: int, seen: tuple[int, ...], before: tuple[int, ...]) -> bool:
        if structure in self._learned and self._others.get(structure) != seen:
            self._others[structure] = seen
            return False
        self._others.pop(structure, None)
        self._learned[structure] = seen
        return seen != before
