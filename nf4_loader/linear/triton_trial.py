"""Small weights with which the Triton kernels are tried, and what plain torch makes of them."""

from collections.abc import Iterable

import torch

from ...low_rank.branch import Patch
from ..checkpoint.quant_state import QuantState
from . import by_table

BLOCKSIZE = 64
"""Of the weights that are tried."""


class RandomNumbers:
    """The arguments of a trial, the same each time. The device's own generator is left alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(0)

    def uniform(self, *shape: int) -> torch.Tensor:
        """From 0 to 1, in fp32."""
        return torch.rand(shape, generator=self._generator, device="cpu").to(self._device)

    def weight(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``packed`` and ``absmax`` as in `kernels.dequantise`, in blocks of BLOCKSIZE."""
        packed = (256 * self.uniform(rows * columns // 2)).to(torch.uint8)
        return packed, self.uniform(rows * columns // BLOCKSIZE)

    def patch(self, start: int, rows: int, columns: int, rank: int, dtype: torch.dtype) -> Patch:
        up, down = self.uniform(rows, rank).to(dtype), self.uniform(rank, columns).to(dtype)
        return Patch(start, up, down, self.uniform(rank))


def patched_by_table(
    packed: torch.Tensor, absmax: torch.Tensor, state: QuantState, patches: Iterable[Patch]
) -> torch.Tensor:
    """The weight with ``patches`` in it, (out, in) in fp32, in plain torch: what a kernel's result is compared with."""
    weight = by_table.dequantise(packed, absmax, state, torch.float32)
    for start, up, down, scale in patches:
        weight[start : start + len(up)] += (up.float() * scale) @ down.float()
    return weight
