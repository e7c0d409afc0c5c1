"""The Linear that holds a 4-bit weight as plain tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..checkpoint.quant_state import NestedAbsmax, NestedTables, QuantType
from . import kernels

_READ_ONLY = "a 4-bit weight cannot be written to; patch a dequantised copy instead"


class Linear4bit(nn.Module):
    """A Linear of logical shape (out, in) whose weight stays packed.

    Buffers ``packed`` (uint8, ((out * in + 1) // 2,)) and ``absmax`` (fp32, (ceil(out * in / blocksize),)),
    parameter ``bias`` ((out,) or None). Plain tensors, so that whoever owns the memory may rebind them at
    will; bitsandbytes' ``Params4bit`` moves its quant state in place, synchronously, and loses attributes.

    With ``nested``, how absmax was quantised once more, part for part, ``absmax`` is uint8 and comes with the buffers
    ``nested_absmax``, ``nested_map`` and ``nested_offset`` (`NestedTables`): a twelfth less to hold and to stream, for
    expanding it in each forward.

    ``weight`` reads as the dense weight wherever its shape, dtype or values are looked at. ``weight_function``
    and ``bias_function`` are ComfyUI's: each takes a fresh dense tensor in compute dtype and returns the patched one.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_map: torch.Tensor
    nested_offset: torch.Tensor
    bias: nn.Parameter | None
    weight_function: list[Callable[[torch.Tensor], torch.Tensor]]
    bias_function: list[Callable[[torch.Tensor], torch.Tensor]]

    def __init__(
        self,
        shape: tuple[int, int],
        quant_type: QuantType,
        blocksize: int,
        *,
        nested: Sequence[NestedAbsmax] = (),
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.shape = shape
        self.quant_type: QuantType = quant_type
        self.blocksize = blocksize
        self.nested = tuple(nested)
        self.dtype = dtype
        self.weight_function = []
        self.bias_function = []
        numel = shape[0] * shape[1]
        self.register_buffer("packed", torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device))
        absmax_dtype = torch.uint8 if nested else torch.float32
        self.register_buffer("absmax", torch.empty(-(-numel // blocksize), dtype=absmax_dtype, device=device))
        if nested:
            for name, size in zip(NestedTables._fields, NestedTables.shapes(nested), strict=True):
                self.register_buffer(f"nested_{name}", torch.empty(size, dtype=torch.float32, device=device))
        self._register_bias(bias, device)

    def _register_bias(self, bias: bool, device: torch.device | None) -> None:
        value = torch.empty(self.out_features, dtype=self.dtype, device=device)
        self.register_parameter("bias", nn.Parameter(value, requires_grad=False) if bias else None)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def weight(self) -> "DenseView":
        return DenseView(self, self.shape)

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a fresh dense tensor of the logical shape on the device of the packed bytes."""
        return kernels.dequantise(self.packed, self.fp32_absmax(), self.shape, self.blocksize, self.quant_type, dtype)

    @property
    def nested_tables(self) -> NestedTables | None:
        """What nested absmax comes with, of all parts."""
        return NestedTables(self.nested_absmax, self.nested_map, self.nested_offset) if self.nested else None

    def fp32_absmax(self) -> torch.Tensor:
        """fp32, (ceil(out * in / blocksize),): the buffer itself, or what it is expanded to."""
        tables = self.nested_tables
        if tables is None:
            return self.absmax
        if len(self.nested) == 1:  # what a forward does 300 times: a third less of the host's time
            return kernels.expand_absmax(self.nested[0], self.absmax, tables)
        codes = self.absmax.split([part.count for part in self.nested])
        own = zip(self.nested, codes, tables.of_parts(self.nested), strict=True)
        return torch.cat([kernels.expand_absmax(*part) for part in own])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = self._bias_for(input)
        if self.weight_function:
            weight = self.dequantise(input.dtype)
            for function in self.weight_function:
                weight = function(weight)
            return nn.functional.linear(input, weight, bias)
        return self._multiply(input, bias)

    def _bias_for(self, input: torch.Tensor) -> torch.Tensor | None:
        if self.bias is None:
            return None
        bias: torch.Tensor = self.bias.to(input.dtype, copy=bool(self.bias_function))
        for function in self.bias_function:
            bias = function(bias)
        return bias

    def _multiply(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        absmax = self.fp32_absmax()
        return kernels.linear(input, self.packed, absmax, self.shape, self.blocksize, self.quant_type, bias)

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

    def extra_repr(self) -> str:
        nested = ", nested" if self.nested else ""
        return f"{self.shape}, {self.quant_type}, blocksize={self.blocksize}{nested}, bias={self.bias is not None}"


class DenseView(torch.Tensor):
    """Reads as the dense weight of a `Linear4bit`: shape, dtype and device cost nothing, any use of the
    values dequantises. It owns no memory and cannot be written to. ``shape`` may be larger than the weight's, with
    zeros beyond; ``device`` is where it reads as being, by default where the packed bytes are.
    """

    linear: Linear4bit

    @staticmethod
    def __new__(
        cls: type[torch.Tensor], linear: Linear4bit, shape: tuple[int, ...], device: torch.device | None = None
    ) -> "DenseView":
        # A wrapper subclass: https://pytorch.org/docs/stable/notes/extending.html#subclassing-torch-tensor
        wrapper: DenseView = torch.Tensor._make_wrapper_subclass(  # type: ignore[assignment]
            cls, shape, dtype=linear.dtype, device=device or linear.device, requires_grad=False
        )
        return wrapper

    def __init__(self, linear: Linear4bit, shape: tuple[int, ...], device: torch.device | None = None) -> None:
        self.linear = linear

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DenseView({self.linear})"

    def _dense(self) -> torch.Tensor:
        weight = self.linear.dequantise(self.dtype).to(self.device)
        rows, columns = (wanted - there for wanted, there in zip(self.shape, weight.shape, strict=True))
        return nn.functional.pad(weight, (0, columns, 0, rows)) if rows or columns else weight

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(_READ_ONLY)  # torch would write to a part of a dequantised copy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def dense(value: Any) -> Any:
            return value._dense() if isinstance(value, cls) else value

        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if written and any(isinstance(leaf, cls) for leaf in tree_leaves(value)):
                raise RuntimeError(_READ_ONLY)
        return func(*tree_map(dense, args), **tree_map(dense, kwargs))
