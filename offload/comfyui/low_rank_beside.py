"""LoRA beside the matmul of a Linear whose weight is a quantised tensor class, as in ComfyUI's native formats.

As soon as a layer of ComfyUI's has a ``weight_function``, it leaves its quantised matmul (int8, fp8, 4 bits) and
computes with a dense copy of its weight. So the LoRA is computed from the layer's input instead, and added to its
output, in the output's dtype. The weight is neither expanded nor quantised again.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...low_rank.branch import LowRank
from ...low_rank.factors import factors_of
from .patch_check import Patch


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether it is a Linear, of torch or ComfyUI, whose weight is made of other tensors."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not hasattr(module, "in_features"):
        return False
    return bool(is_traceable_wrapper_subclass(weight))


class LowRankBeside:
    """Takes low-rank patches on behalf of a layer (`TakesPatches`), by a hook on the layer's forward.

    The hook is never removed: torch.compile looks at a module's hooks only when it compiles the module. The factors are
    buffers of the layer, so that they are on the device whenever it computes.
    """

    def __init__(self, layer: nn.Module) -> None:
        rows, columns = layer.get_parameter("weight").shape
        self._shape = (rows, columns)
        self._low_rank: LowRank | None = None
        # Before other hooks: the streamer's hook releases the layer's tensors.
        layer.register_forward_hook(self._add, prepend=True)

    def take_patches(self, patches: Sequence[Patch], dtype: torch.dtype) -> Mapping[str, torch.Tensor] | None:
        factors = factors_of(patches, self._shape)
        self._low_rank = None if factors is None else LowRank.of(factors, dtype, self._low_rank)
        if factors is None:
            return None
        return self._low_rank.tensors if self._low_rank is not None else {}

    def _add(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if self._low_rank is None:
            return output
        rows, columns = self._shape
        output = output.contiguous()
        self._low_rank.add_to(output.view(-1, rows), inputs[0].reshape(-1, columns), layer._buffers)
        return output
