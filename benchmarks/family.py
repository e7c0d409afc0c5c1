"""What the comparison asks of each way to run Flux: a family of weights, and a model at work."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from cases import Case


class Unavailable(Exception):  # noqa: N818  a reason, not a fault
    """A contender cannot run here, or not this case; the message says why."""


class Model(Protocol):
    """A model at work on a case."""

    device: torch.device

    def load(self) -> None:
        """Bring it to the device, as far as it goes there."""
        ...

    def forward(self) -> torch.Tensor:
        """One call of the transformer, the same each time."""
        ...

    def step(self) -> torch.Tensor:
        """One call of the transformer, as the next step of a sampling."""
        ...

    def sample(self, on_step: Callable[[], None], steps: int | None = None) -> torch.Tensor:
        """A whole sampling; ``on_step`` is called after each step."""
        ...

    def stays(self) -> dict[str, int]:
        """How many blocks of each kind this package keeps on the device now; nothing if it does not stream them."""
        ...


class Family(Protocol):
    """Weights in host memory, and the ways to run them."""

    def at_work(self, setting: str, case: Case) -> AbstractContextManager[Model]:
        """The model in this setting, not loaded yet; afterwards nothing of it is on the device.

        Raises:
            Unavailable: it cannot do that.
        """
        ...
