"""comfy-kitchen's int8 matmul by its two compiled functions, called without the Python code around them.

That code looks for activations, residuals and single rows, none of which a Linear of ours has. This takes the host as
long as both launches. The compiled functions are not public, and their arguments differ between versions (0.2.31 to
0.2.40 are known): so they are used only where they give the bits that the public function gives.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # it is public, but not in the stubs

from ...memory import is_out_of_memory

GROUP = 256
"""Columns that ConvRot (arXiv 2512.03673) rotates together."""

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""comfy-kitchen's, of dtypes."""

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""``linear(input, rows, row_scale, bias)``, as `kitchen.linear`."""

_FEW_ROWS, _LEAST_CAPABILITY = 2, (8, 0)
"""For so few rows of input, and for older GPUs, comfy-kitchen has other kernels."""


def faster(theirs: Linear, cuda: Any, device: torch.device, dtype: torch.dtype) -> Linear:
    """What computes as ``theirs``, the public function, on ``device`` in ``dtype`` with the least time of the host.

    Args:
        cuda: The module `comfy_kitchen.backends.cuda`, or what has its names.

    Raises:
        RuntimeError: there is too little memory to try; another time there may be enough.
    """
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return theirs
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device="cpu").to(device)

    input, bias, row_scale = random(32, 2 * GROUP).to(dtype), random(64).to(dtype), random(64)
    weight = ((254 * random(64, 2 * GROUP) - 127).to(torch.int8), row_scale)
    for takes_weight, bias_dtype in itertools.product((True, False), (dtype, torch.float32)):
        try:
            own = _Direct(theirs, cuda, device, dtype, takes_weight, bias_dtype)
            if all(torch.equal(own(input, *weight, b), theirs(input, *weight, b)) for b in (bias, None)):
                return own
        except Exception as error:  # another version of comfy-kitchen: other names or arguments
            if is_out_of_memory(error):
                raise
    return theirs


class _Direct:
    """A `Linear` on ``device`` in ``dtype``.

    ``takes_weight``: quantising takes the weight of a norm and its epsilon, too. ``bias_dtype``: what the matmul adds.
    """

    def __init__(
        self,
        theirs: Linear,
        cuda: Any,
        device: torch.device,
        dtype: torch.dtype,
        takes_weight: bool,
        bias_dtype: torch.dtype,
    ) -> None:
        self._theirs, self._device, self._code, self._bias_dtype = theirs, device, CODES[dtype], bias_dtype
        self._quantise, self._multiply = cuda._C.quantize_int8_rowwise_convrot64, cuda._C.cutlass_int8_dequant
        self._most_columns, self._fits = cuda._CONVROT_FUSED_MAX_K, cuda._convrot_fused_shared_memory_fits
        with torch.inference_mode(False):
            self._no_weight = torch.empty(0, dtype=dtype, device=device)
            self._no_bias = torch.empty(0, dtype=bias_dtype, device=device)
        self._takes_weight = takes_weight
        self._takes_columns: dict[int, bool] = {}

    def __call__(
        self, input: torch.Tensor, rows: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        out, columns = rows.shape
        x = input.reshape(-1, columns).contiguous()
        count, device = x.shape[0], self._device
        added = self._no_bias if bias is None else bias.to(self._bias_dtype)
        if count <= _FEW_ROWS or added.data_ptr() % 16 or not self._takes(x, columns):
            return self._theirs(input, rows, row_scale, bias)
        codes = torch.empty_like(x, dtype=torch.int8)
        scale = torch.empty((count, 1), device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        more = (to_dlpack(self._no_weight), 0.0) if self._takes_weight else ()
        # Neither random rounding, nor an activation, nor a seed.
        self._quantise(to_dlpack(x), to_dlpack(codes), to_dlpack(scale), GROUP, False, 0, 0, *more, stream)
        output = x.new_empty((*input.shape[:-1], out))
        weight, scales = (to_dlpack(codes), to_dlpack(rows)), (to_dlpack(scale), to_dlpack(row_scale))
        into = to_dlpack(output.view(count, out))
        if not self._multiply(*weight, *scales, to_dlpack(added), into, self._code, stream):
            return self._theirs(input, rows, row_scale, bias)
        return output

    def _takes(self, x: torch.Tensor, columns: int) -> bool:
        """Whether a row fits the memory of a block of threads: as comfy-kitchen asks."""
        takes = self._takes_columns.get(columns)
        if takes is None:
            takes = columns % GROUP == 0 and columns <= self._most_columns and bool(self._fits(x, columns, GROUP))
            self._takes_columns[columns] = takes
        return takes
