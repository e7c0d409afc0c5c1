"""The Linear that holds a 4-bit weight as plain tensors."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...low_rank.branch import LowRank
from ...low_rank.factors import factors_of
from ..checkpoint.quant_state import DensePart, NestedTables, QuantState
from . import int8, kernels, matmul
from .dense_view import READ_ONLY, DenseView


class Linear4bit(nn.Linear):
    """A Linear of logical shape (out, in) whose rows are the rows of its parts, one below the other.

    Most layers have one part, in 4 bits. Layers whose q, k and v are quantised in different ways have several, because
    making them alike would cost bits. Part i has the buffers ``packed_i`` (uint8, ((rows * in + 1) // 2,)) and
    ``absmax_i`` (fp32, (ceil(rows * in / blocksize),)), or ``dense_i`` ((rows, in), in ``dtype``) if it is not
    quantised. If its absmax is nested, ``absmax_i`` is uint8, and ``nested_absmax_i``, ``nested_map_i`` and
    ``nested_offset_i`` (`NestedTables`) come with it: a twelfth less to hold and to stream, for expanding it in each
    forward.

    The buffers are plain tensors, so that whoever owns the memory may rebind them; bitsandbytes' ``Params4bit`` moves
    its quant state in place, synchronously, and loses attributes. They are not in the state dict.

    ``weight`` and the state dict's weight read as the dense one. ``weight_function`` and ``bias_function`` are
    ComfyUI's: each takes a fresh dense tensor in compute dtype and returns the patched one. ``low_rank`` is LoRA that
    is computed beside the weight; its tensors have to be buffers of the module (`take_patches`).
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    weight_function: list[Callable[[torch.Tensor], torch.Tensor]]
    bias_function: list[Callable[[torch.Tensor], torch.Tensor]]
    low_rank: LowRank | None = None
    computes_on: torch.device | None = None
    """Where the forward runs, which for a streamed layer is not where its weight is now."""

    def __init__(
        self,
        parts: Sequence[QuantState | DensePart],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a dense weight
        self.parts = tuple(parts)
        self.out_features, self.in_features = sum(part.shape[0] for part in parts), parts[0].shape[1]
        self.shape = (self.out_features, self.in_features)
        self.dtype = dtype
        self.weight_function = []
        self.bias_function = []
        self.int8: int8.Int8 | None = None
        """What it has to multiply in int8; None if it is to be exact."""
        self.patched_shape: tuple[int, ...] = self.shape
        """The shape of the weight after all that ``weight_function`` does to it."""
        self.is_one_weight = len(self.parts) == 1 and isinstance(self.parts[0], QuantState)
        """Whether all rows are one 4-bit weight, that a kernel can multiply with."""
        self._names: tuple[tuple[str, ...], ...] = tuple(
            tuple(f"{name}_{i}" for name in part.tensors(dtype)) for i, part in enumerate(self.parts)
        )
        for part, names in zip(self.parts, self._names, strict=True):
            for name, (shape, kept_as) in zip(names, part.tensors(dtype).values(), strict=True):
                self.register_buffer(name, torch.empty(shape, dtype=kept_as, device=device), persistent=False)
        value = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if value is None else nn.Parameter(value, requires_grad=False))

    @property
    def device(self) -> torch.device:
        """Where the weight is now."""
        return self._buffers[self._names[0][0]].device  # type: ignore[union-attr]

    @property  # type: ignore[override]
    def weight(self) -> DenseView:
        # ComfyUI reads the shape of img_in.weight to see whether a LoRA has widened it (BFL's Canny and Depth), and the
        # device of any weight to bring a LoRA there that it computes itself (bypass).
        return DenseView(self, self.patched_shape, self.computes_on)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise RuntimeError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # a parameter that is set as an attribute comes by here
            raise RuntimeError(READ_ONLY)
        super().register_parameter(name, param)

    def dense_with(self, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> DenseView:
        """What reads as ``function`` of the dense weight, which has this ``shape``."""
        return DenseView(self, shape, functions=[function])

    @property
    def tensors(self) -> list[dict[str, torch.Tensor]]:
        """The tensors of each part, by their names in `QuantState.tensors` or `DensePart.tensors`."""
        kinds = [part.tensors(self.dtype) for part in self.parts]
        return [
            {kind: self.get_buffer(name) for kind, name in zip(of_part, names, strict=True)}
            for of_part, names in zip(kinds, self._names, strict=True)
        ]

    def packed_weight(self, i: int = 0) -> tuple[torch.Tensor, torch.Tensor, QuantState]:
        """Packed codes, fp32 absmax and state of part i, which is in 4 bits: as `kernels` take them."""
        packed, absmax, state, tables = self.stored_weight(i)
        return packed, kernels.fp32_absmax(state, absmax, tables), state

    def stored_weight(self, i: int = 0) -> tuple[torch.Tensor, torch.Tensor, QuantState, NestedTables | None]:
        """Packed codes, absmax as it is held and state of part i, and the tables of its absmax if that is nested."""
        state: Any = self.parts[i]
        buffers: Any = self._buffers  # not by attribute: nn.Module looks for those in Python
        packed, absmax, *tables = [buffers[name] for name in self._names[i]]
        return packed, absmax, state, NestedTables(*tables) if tables else None

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a fresh dense tensor of the logical shape and ``dtype``, on its device."""
        if self.is_one_weight:
            return self._dequantised(0, dtype)
        weight = torch.empty(self.shape, dtype=dtype, device=self.device)
        rows = weight.split([part.shape[0] for part in self.parts])
        for i, part in enumerate(self.parts):
            is_dense = isinstance(part, DensePart)
            rows[i].copy_(self.get_buffer(f"dense_{i}") if is_dense else self._dequantised(i, dtype))
        return weight

    def _dequantised(self, i: int, dtype: torch.dtype) -> torch.Tensor:
        packed, absmax, state, tables = self.stored_weight(i)
        return kernels.dequantise(packed, absmax, state, dtype, tables)

    def take_patches(self, patches: Sequence[Sequence[Any]], dtype: torch.dtype) -> Mapping[str, torch.Tensor] | None:
        """Compute with these patches of the weight from now on, in place of earlier ones, if all are plain LoRA.

        Args:
            patches: ComfyUI's, in order (see `factors_of`).
            dtype: What the forward computes in.

        Returns:
            Host tensors that the forward expects as buffers of this module, under these names, on its device. They are
            the same objects as before as far as only strengths have changed. None if not all are plain LoRA: then it
            computes with none of them.
        """
        factors = factors_of(patches, self.shape)
        before = self._low_rank_scale
        self.low_rank = None if factors is None else LowRank.of(factors, dtype, self.low_rank)
        if self._low_rank_scale is not before:
            int8.forget_scales(self)
        if factors is None:
            return None
        return self.low_rank.tensors if self.low_rank is not None else {}

    @property
    def _low_rank_scale(self) -> torch.Tensor | None:
        """Another object after any change of the patches."""
        return None if self.low_rank is None else self.low_rank.tensors["lora_scale"]

    def compute_by(self, compute: str | None, device: torch.device, dtype: torch.dtype) -> int:
        """Multiply from now on as ``compute`` says (`int8.Compute`; None is exact), in ``dtype`` on ``device``.

        Returns the bytes that it keeps on the device for that, whether it is streamed or not.
        """
        found = int8.use(self, compute, device, dtype)
        if found is not self.int8:  # to set an attribute of a module takes longer than to look
            self.int8 = found
        return 0 if self.int8 is None else self.int8.nbytes

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` (..., in) in any float dtype; returns (..., out) in the same dtype."""
        return matmul.multiply(self, input, self._bias_for(input))

    def _bias_for(self, input: torch.Tensor) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.bias
        if bias is None:
            return None
        bias = bias.to(input.dtype, copy=bool(self.bias_function))
        for function in self.bias_function:
            bias = function(bias)
        return bias

    def on(self, device: torch.device) -> "Linear4bit":
        """A copy of the layer with its buffers on ``device``; whatever is there already is shared."""
        other = copy.copy(self)
        other._buffers = {
            name: buffer if buffer is None else buffer.to(device) for name, buffer in self._buffers.items()
        }
        return other

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Linear4bit":
        # ``.to(dtype)`` and the like are about the dense weight and the bias: absmax stays as it is.
        before, device = dict(self._buffers), self.device
        super()._apply(fn, recurse)
        for name, table in before.items():
            after = self._buffers[name]
            is_ours = name.startswith(("absmax", "nested_"))
            if is_ours and table is not None and after is not None and after.dtype != table.dtype:
                self._buffers[name] = table.to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # ComfyUI takes a LoRA's keys from the state dict: the weight has to be in it under its usual name.
        destination[prefix + "weight"] = DenseView(self, self.shape)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and getattr(weight, "linear", None) is not self:
            errors = lists[-1]
            errors.append(f"{prefix}weight: {READ_ONLY}")
            return
        others = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        kinds = [_described(part) for part in self.parts]
        return f"{self.shape}, {' + '.join(kinds)}, bias={self.bias is not None}"


def _described(part: QuantState | DensePart) -> str:
    if isinstance(part, DensePart):
        return "dense"
    return f"{part.quant_type}/{part.blocksize}{' nested' if part.nested else ''}"
