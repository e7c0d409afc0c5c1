"""A 4-bit Linear that computes with LoRA as it is: its packed weight is neither changed nor expanded for that."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import patched_weight
from .linear4bit import DenseView, Linear4bit
from .linear_of_parts import LinearOfParts
from .low_rank import LowRank, factors_of

_MANY_ROWS = 256
"""From so many rows on the base matmul adds to the low-rank product, while it computes, in place of the product being
added to its output, which would be read and written once more. Fewer have a kernel of their own (`kernels.linear`)."""


class PatchedLinear4bit(Linear4bit):
    """A `Linear4bit` that takes low-rank patches of its weight; without any, its forward is the plain one.

    ``computes_on`` is where the forward runs, which for a streamed layer is not where its weight is now.
    ``patched_shape`` is the shape of the weight with all that `weight_function` does to it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.computes_on: torch.device | None = None
        self.patched_shape: tuple[int, ...] = self.shape
        self._low_rank: LowRank | None = None

    @property
    def weight(self) -> DenseView:
        # ComfyUI reads the shape of img_in.weight to see whether a LoRA has widened it (BFL's Canny and Depth), and the
        # device of any weight to bring a LoRA there that it computes itself (bypass).
        return DenseView(self, self.patched_shape, self.computes_on)

    def take_patches(self, patches: Sequence[Sequence[Any]], dtype: torch.dtype) -> Mapping[str, torch.Tensor] | None:
        """Compute with these patches of the weight from now on, in place of earlier ones, if all are plain LoRA.

        Args:
            patches: ComfyUI's, in order: (strength, adapter or tuple, strength_model, offset, function). With a
                strength of None a patch stands by: it does nothing, but its factors stay in place, so that giving it a
                strength later changes nothing but ``lora_scale``.
            dtype: What the forward computes in.

        Returns:
            Host tensors that the forward expects as buffers of this module, under these names, on its device: the
            same objects as before where nothing but strengths has changed. None if not all are plain LoRA: then it
            computes with none of them.
        """
        factors = [factors_of(patch, self.shape) for patch in patches]
        if any(made is None and patch[0] is not None for patch, made in zip(patches, factors, strict=True)):
            self._low_rank = None
            return None
        self._low_rank = LowRank.of([made for made in factors if made], dtype, self._low_rank)
        return self._low_rank.tensors if self._low_rank else {}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._low_rank is None:
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        if len(rows) < _MANY_ROWS or not self._low_rank.covers(self.out_features) or self.weight_function:
            output = super().forward(input)
            self._low_rank.add_to(output.view(-1, self.out_features), rows, self._buffers)
            return output
        if self._expands_patched(len(rows), input):
            return torch.nn.functional.linear(input, self._patched_weight(input.dtype), self._bias_for(input))
        output = self._low_rank.product(rows, self._bias_for(input), self._buffers)
        output.addmm_(rows, self.dequantise(input.dtype).t())
        return output.view(*input.shape[:-1], self.out_features)

    def _expands_patched(self, rows: int, input: torch.Tensor) -> bool:
        """Whether to add the patches to the weight while it is expanded.

        That costs by the numbers of the weight; the product by those that it moves, the input's once and the output's
        twice, two thirds as much for each (measured on an H100).
        """
        assert self._low_rank is not None
        if torch.compiler.is_compiling():
            return False  # first: it would guard on what is looked at here
        moved = rows * (self.in_features + 2 * self.out_features)
        return (
            3 * self.out_features * self.in_features < 2 * moved
            and patched_weight.takes(self.shape, input.dtype, *zip(*self._low_rank.pieces, strict=True))
            and patched_weight.works_on(input.device, input.dtype)
        )

    def _patched_weight(self, dtype: torch.dtype) -> torch.Tensor:
        assert self._low_rank is not None
        patches = self._low_rank.patches(self._buffers)
        how = (self.shape, self.blocksize, self.quant_type, dtype)
        return patched_weight.expand(self.packed, self.fp32_absmax(), *how, patches)


class PatchedLinearOfParts(PatchedLinear4bit, LinearOfParts):
    """A `LinearOfParts` that takes patches, too."""

    def _expands_patched(self, rows: int, input: torch.Tensor) -> bool:
        return False
