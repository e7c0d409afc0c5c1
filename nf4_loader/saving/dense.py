"""The dense values of a tensor in a file: dequantised if it is packed, scaled if it has a scale."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..checkpoint.header import TensorEntry
from ..checkpoint.read_parts import CPU, DenseMemory, read_fused, read_parts, swap_halves, torch_dtype
from ..checkpoint.tensors import TransformerTensor, Weight4bit
from ..linear import kernels


def read_dense(
    tensor: TransformerTensor,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    scales: Mapping[str, TensorEntry] = MappingProxyType({}),
) -> torch.Tensor:
    """The values of a tensor, dequantised if they are packed.

    They go to the device as they are stored, because then they are smallest, and are converted there.

    Args:
        tensor: Of a file.
        dtype: Of the result; None for the file's own dtype, and bf16 for packed weights.
        device: Where the result is to be.
        scales: By the name of a part, what to multiply it by: one number, or one for each row.
    """
    if tensor.weights4bit and dtype is None:
        dtype = torch.bfloat16
    parts = [_read_part(part, dtype, device, scales.get(part.name)) for part in tensor.parts]
    values = torch.cat(parts) if len(parts) > 1 else parts[0]
    if tensor.halves_swapped:
        swap_halves(values)
    return values.view(tensor.shape)


def _read_part(
    part: Weight4bit | TensorEntry, dtype: torch.dtype | None, device: torch.device, scale: TensorEntry | None
) -> torch.Tensor:
    if scale is not None:
        values = _read_part(part, torch.float32, device, None)
        return values.mul_(_read_part(scale, torch.float32, device, None).view(-1, 1)).to(dtype)
    if isinstance(part, TensorEntry):
        values = torch.empty(part.shape, dtype=torch_dtype(part))
        read_parts([DenseMemory(part, values)], lambda _: None)
        return values.to(device).to(dtype)
    packed, absmax = (memory.to(device) for memory in read_fused(TransformerTensor((part,))))
    return kernels.dequantise(packed, absmax, part.state, dtype or torch.bfloat16)
