"""What a model gives where its modulation is not computed ahead."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch

from flux_nf4.offload.ahead import Ahead

Made = TypeVar("Made")


def as_before(make: Callable[[], Made]) -> Made:
    """What ``make`` gives where each forward of a model computes all it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ahead, "output", _computed_now)
        return make()


def _computed_now(ahead: Ahead, index: int, vector: torch.Tensor) -> Any:
    with (ahead.bring_all or nullcontext)():
        return ahead.blocks[index]((vector,))[0]
