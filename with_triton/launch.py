"""Launches Triton kernels with the least time of the host.

Triton looks at each argument of each launch to find the compiled kernel, which takes the host longer than the launch.
So the compiled kernel is kept, and called from then on. It is given addresses, because it asks the driver about each
tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch

_compiled: dict[tuple[object, ...], Any] = {}
"""Kernels as Triton has compiled them for tensors that begin at multiples of 16 bytes, each with the grid that it is
launched on. There is one for each size of layers, pictures, prompts and LoRAs, of 0.7 kB."""


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[torch.Tensor],
    numbers: tuple[int, ...],
    dtype: torch.dtype,
    **options: Any,
) -> None:
    """Run ``kernel`` on the current device, which has to be that of ``tensors``.

    Args:
        tensors: The first arguments of the kernel. Their dtypes are the same whenever ``numbers`` and ``dtype`` are.
        numbers: Its other arguments; those that are constants for Triton are among them.
        options: What Triton compiles it with.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    is_aligned = not any(address % 16 for address in addresses)
    key = (kernel, tensors[0].device, dtype, numbers, grid, *options.items())
    known = _compiled.get(key) if is_aligned else None
    if known is not None:
        try:
            known(*addresses, *numbers)
        except TypeError:  # a Triton whose compiled kernels take other arguments: nothing has been launched
            _compiled[key] = None
        else:
            return
    compiled = kernel[grid](*tensors, *numbers, **options)
    if is_aligned and key not in _compiled:
        _compiled[key] = None if compiled is None else compiled[grid]  # an interpreted one is not compiled
