"""The weight of a 4-bit Linear, as others see it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .linear4bit import Linear4bit

_READ_ONLY = "a 4-bit weight cannot be written to; patch a dequantised copy instead"


class DenseView(torch.Tensor):
    """Reads as the dense weight of a `Linear4bit`: shape, dtype and device cost nothing, any use of the values
    dequantises. It owns no memory and cannot be written to.

    Args:
        linear: Whose weight it is.
        shape: What it reads as: the weight's own, or a larger one, with zeros beyond the weight.
        device: Where it reads as being; None for where the packed bytes are.
    """

    linear: "Linear4bit"

    @staticmethod
    def __new__(
        cls: type[torch.Tensor], linear: "Linear4bit", shape: tuple[int, ...], device: torch.device | None = None
    ) -> "DenseView":
        # A wrapper subclass: https://pytorch.org/docs/stable/notes/extending.html#subclassing-torch-tensor
        wrapper: DenseView = torch.Tensor._make_wrapper_subclass(  # type: ignore[assignment]
            cls, shape, dtype=linear.dtype, device=device or linear.device, requires_grad=False
        )
        return wrapper

    def __init__(self, linear: "Linear4bit", shape: tuple[int, ...], device: torch.device | None = None) -> None:
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
