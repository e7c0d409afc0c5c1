"""Host memory that is pinned part by part, as far as driver and limit allow, and tells how far that was."""

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..memory import GIB
from . import pinning, pinning_ahead
from .pinning import Piece, Registrar, pinned_by_all, refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shortfall:
    """Why not everything is pinned, as a clause, and what to do about it, in sentences ("" if nothing can be done)."""

    reason: str
    advice: str


THE_LIMIT = Shortfall("that is the limit", "")

_REFUSAL_ADVICE = "Close other programs, or add RAM."
if sys.platform == "linux":
    _REFUSAL_ADVICE += " In a container, raise its limits on memory and locked memory (ulimit -l)."


class PinnableMemory:
    """Host memory in parts, one for each block, which are pinned one after the other. Empty parts are never pinned.

    ``pieces`` has the pieces of each part; parts may share a piece. ``what`` is the memory's name in the log.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[Piece]],
        registrar_for: Callable[[torch.device], Registrar | None],
        what: str,
    ) -> None:
        self.pieces = tuple(map(tuple, pieces))
        self._every = self._in_order(())
        self.nbytes = sum(piece.nbytes for piece in self._every)
        self._registrar_for = registrar_for
        self._what = what
        self._said = ""
        self._users = 0
        self._used_by: set[torch.device] = set()

    def keep_pinned_for(self, user: object) -> None:
        """Unpin when the last ``user`` has gone. Others may still hold the memory, but do not need it pinned."""
        self._users += 1
        weakref.finalize(user, self._let_go).atexit = False

    def _let_go(self) -> None:
        self._users -= 1
        if not self._users:  # the garbage collector may call this anywhere: to wait for the thread could be for ever
            pinning_ahead.when_over(lambda _: self._release())

    def unpin(self) -> None:
        """Unregister what `pin` has registered, once no copy from it is under way. Idempotent."""
        pinning_ahead.wait()
        pinning_ahead.when_over(lambda _: self._release())

    def _release(self) -> None:
        self._used_by.clear()
        for pins in {piece.pins for piece in self._every}:
            pins.release()

    @property
    def pinned_bytes(self) -> int:
        return sum(piece.nbytes for piece in self._every if piece.is_pinned)

    @property
    def all_pinned(self) -> bool:
        return all(piece.is_pinned for piece in self._every)

    def is_pinned_for(self, device: torch.device) -> bool:
        """Whether `pin` has nothing left to do for ``device``, as at the beginning of most samplings."""
        return device in self._used_by and self.all_pinned

    def pin(
        self,
        limit_bytes: int,
        device: torch.device,
        limited_by: Shortfall = THE_LIMIT,
        first: Iterable[int] = (),
    ) -> None:
        """Pin the parts for copies to ``device``, beginning with ``first``, until all are pinned or one cannot be.

        Another call goes on from there. One log line says how much is pinned and why not everything, when that changes:
        at once, or if a thread is still pinning (`pinning_ahead`), when it is done.

        Args:
            limit_bytes: How much memory this package may have pinned altogether.
            device: The device that is copied to.
            limited_by: What to say if ``limit_bytes`` is too little.
            first: Indices of parts.
        """
        try:
            shortfall = self._pin_more(self._in_order(first), limit_bytes, device, limited_by)
        finally:
            pinning.pins_changed()
        pinning_ahead.when_over(lambda problem: self._say(shortfall or self._shortfall_of(problem)))

    def _shortfall_of(self, problem: str) -> Shortfall | None:
        """What the ``problem`` of the thread that has pinned ahead ("" for none) means for this memory."""
        return Shortfall(problem, _REFUSAL_ADVICE) if problem and not self.all_pinned else None

    def _in_order(self, first: Iterable[int]) -> tuple[Piece, ...]:
        order = dict.fromkeys((*first, *range(len(self.pieces))))
        return tuple(dict.fromkeys(piece for index in order for piece in self.pieces[index]))

    def _pin_more(
        self, pieces: Sequence[Piece], limit_bytes: int, device: torch.device, limited_by: Shortfall
    ) -> Shortfall | None:
        registrar = self._registrar_for(device)
        if registrar is None:
            return Shortfall(f"{device.type} has no way to pin memory that is there already", "")
        for pins in {piece.pins for piece in pieces}:
            pins.registrars.setdefault(device, registrar)
        self._used_by.add(device)
        for piece in pieces:
            if piece.is_pinned:
                continue
            if pinned_by_all() + piece.nbytes > limit_bytes:
                return limited_by
            # Whatever makes the driver refuse one piece makes it refuse the others: the first refusal ends it.
            if error := piece.register(registrar):
                return Shortfall(refused(error), _REFUSAL_ADVICE)
        return None

    def _say(self, shortfall: Shortfall | None) -> None:
        text = f"Streaming: {self.pinned_bytes / GIB:.2f} of {self.nbytes / GIB:.2f} GiB of {self._what} pinned"
        if shortfall is not None:
            text = f"{text}; {shortfall.reason}, so some copies are slower. {shortfall.advice}".rstrip()
        said, self._said = self._said, text
        if text != said:
            can_be_helped = shortfall is not None and shortfall.advice
            logger.log(logging.WARNING if can_be_helped else logging.INFO, "%s", text)
