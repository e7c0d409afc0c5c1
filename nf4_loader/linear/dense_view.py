"""The weight of a 4-bit Linear, as others see it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .linear4bit import Linear4bit

READ_ONLY = "a 4-bit weight cannot be written to; patch a dequantised copy instead"
_NO_MEMORY = "a 4-bit weight has no memory of dense values; take a dense copy first, with .clone()"


class DenseView(torch.Tensor):
    """Reads as the dense weight of a `Linear4bit`: shape, dtype and device cost nothing, any use of the values
    dequantises. It owns no memory and cannot be written to.

    Args:
        linear: Whose weight it is.
        shape: What it reads as: the weight's own, or a larger one, with zeros beyond the weight.
        device: Where it reads as being; None for where the packed bytes are.
        functions: What is done to the dense values, in order.
    """

    linear: "Linear4bit"

    @staticmethod
    def __new__(
        cls: type[torch.Tensor],
        linear: "Linear4bit",
        shape: tuple[int, ...],
        device: torch.device | None = None,
        functions: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (),
    ) -> "DenseView":
        # A wrapper subclass: https://pytorch.org/docs/stable/notes/extending.html#subclassing-torch-tensor
        wrapper: DenseView = torch.Tensor._make_wrapper_subclass(  # type: ignore[assignment]
            cls, shape, dtype=linear.dtype, device=device or linear.device, requires_grad=False
        )
        return wrapper

    def __init__(
        self,
        linear: "Linear4bit",
        shape: tuple[int, ...],
        device: torch.device | None = None,
        functions: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (),
    ) -> None:
        self.linear = linear
        self.functions = tuple(functions)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DenseView({self.linear})"

    @property
    def data(self) -> "DenseView":
        """Itself: who writes to ``weight.data`` is told that it cannot, in place of writing to a copy."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise RuntimeError(READ_ONLY)

    def numpy(self, *, force: bool = False) -> Any:
        return self._dense(self.device).numpy(force=force)

    def tolist(self) -> Any:
        return self._dense(self.device).tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        raise RuntimeError(_NO_MEMORY)  # safetensors asks for it, and would write nothing

    def storage(self) -> torch.TypedStorage:
        raise RuntimeError(_NO_MEMORY)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self._dense(self.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._dense(self.device).__reduce_ex__(protocol)

    def _dense(self, device: torch.device) -> torch.Tensor:
        """The values on ``device``. The packed bytes go there, an eighth of fp32, and not the dense weight."""
        if device.type == "meta":  # ComfyUI's patches are tried on shapes
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        linear = self.linear if self.linear.device == device else self.linear.on(device)
        weight = linear.dequantise(self.dtype)
        for function in self.functions:
            weight = function(weight)
        rows, columns = (wanted - there for wanted, there in zip(self.shape, weight.shape, strict=True))
        return nn.functional.pad(weight, (0, columns, 0, rows)) if rows or columns else weight

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(READ_ONLY)  # torch would write to a part of a dequantised copy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def dense(value: Any) -> Any:
            return value._dense(device or value.device) if isinstance(value, cls) else value

        kwargs = kwargs or {}
        device = kwargs.get("device") if func is torch.ops.aten._to_copy.default else None
        for position, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if written and any(isinstance(leaf, cls) for leaf in tree_leaves(value)):
                raise RuntimeError(READ_ONLY)
        return func(*tree_map(dense, args), **tree_map(dense, kwargs))
