"""What a model gives where its modulation is not computed ahead."""

from collections.abc import Callable
from typing import TypeVar

import pytest

from flux_nf4.offload.ahead import Ahead

Made = TypeVar("Made")


def as_before(make: Callable[[], Made]) -> Made:
    """What ``make`` gives where each forward of a model computes all it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ahead, "output", lambda ahead, index, vector: ahead.blocks[index]((vector,))[0])
        return make()
