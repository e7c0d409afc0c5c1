"""The lines in the log about the patches that a patcher takes."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .patch_check import Accepted
from .unread_lora import why_nothing_was_recognised

logger = logging.getLogger(__name__)

_SHOWN = 4


@dataclass(frozen=True)
class PatchRun:
    """Patches that were added one after the other, and that the log has not told yet.

    Some nodes add each patch of a LoRA on its own, so that it has a strength of its own: one line is enough for all.
    """

    taken: int = 0
    skipped: tuple[str, ...] = ()
    strengths: frozenset[float] = frozenset()
    unread: str = ""
    """Why a patch was none of this model's."""

    def plus(self, patches: Mapping[Any, Any], found: Accepted, strength: float) -> "PatchRun":
        """The run with ``patches``, of which ``found`` was accepted. Several at once get a line of their own."""
        if len(patches) != 1 and self != _NONE:
            return self.tell().plus(patches, found, strength)
        is_unread = not found.taken and not found.skipped
        run = PatchRun(
            self.taken + len(found.taken),
            self.skipped + found.skipped,
            self.strengths | {strength},
            why_nothing_was_recognised() if is_unread else self.unread,
        )
        return run if len(patches) == 1 else run.tell()

    def tell(self) -> "PatchRun":
        """Write the line, if there is something to say. Returns the run to go on with."""
        if self.skipped:
            shown = "; ".join(self.skipped[:_SHOWN])
            more = f"; and {len(self.skipped) - _SHOWN} more" if len(self.skipped) > _SHOWN else ""
            logger.warning(
                "LoRA: %d patches applied at %s, %d skipped: %s%s",
                self.taken,
                self._strengths,
                len(self.skipped),
                shown,
                more,
            )
        elif self.taken:
            logger.info(
                "LoRA: %d patches applied at %s, all that ComfyUI recognised for this model",
                self.taken,
                self._strengths,
            )
        elif self.unread:
            logger.warning("%s", self.unread)
        return _NONE

    @property
    def _strengths(self) -> str:
        low, high = min(self.strengths), max(self.strengths)
        return f"strength {low:g}" if low == high else f"strengths {low:g} to {high:g}"


_NONE = PatchRun()
