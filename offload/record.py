"""A block's tensors laid out flat in one record, and the block bound to any copy of those bytes."""

import weakref
from dataclasses import dataclass

import torch
from torch import nn

ALIGNMENT = 256
"""Bytes. CUDA kernels want 16; 256 is what the device allocator itself keeps."""


@dataclass(frozen=True)
class Field:
    """One tensor of a record: where it is in the block and where its bytes are in the record."""

    module: str
    name: str
    is_parameter: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class RecordLayout:
    """The fields of a block in order; equal for blocks of equal structure. ``nbytes`` includes padding."""

    fields: tuple[Field, ...]
    nbytes: int


def layout_of(block: nn.Module) -> RecordLayout:
    """Lay out every parameter and persistent or other buffer of ``block``.

    Raises:
        ValueError: the block has no tensors.
    """
    fields: list[Field] = []
    offset = 0
    for path, module in block.named_modules():
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                nbytes = tensor.numel() * tensor.element_size()
                fields.append(Field(path, name, is_parameter, tensor.dtype, tuple(tensor.shape), offset, nbytes))
                offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    if not fields:
        raise ValueError(f"a {type(block).__name__} without parameters or buffers cannot be streamed")
    return RecordLayout(tuple(fields), offset)


Views = tuple[torch.Tensor, ...]


def views_of(layout: RecordLayout, record: torch.Tensor) -> Views:
    """The fields of ``layout`` as views into ``record`` (uint8, at least ``layout.nbytes`` long)."""
    # Ordinary tensors: inference tensors could not be written by a thread outside inference mode.
    with torch.inference_mode(False), torch.no_grad():
        return tuple(_view(field, record) for field in layout.fields)


def _view(field: Field, record: torch.Tensor) -> torch.Tensor:
    view = record[field.offset : field.offset + field.nbytes].view(field.dtype).view(field.shape)
    return nn.Parameter(view, requires_grad=False) if field.is_parameter else view


def _keep_in_place(module: nn.Module) -> None:
    reference = weakref.ref(module)
    module._apply = lambda fn, recurse=True: reference()  # type: ignore[method-assign]


class BoundBlock:
    """A block whose tensors are views of a record, and can be swapped for those of another.

    ``block.to()`` and the like no longer move it: whoever holds this decides where its bytes are.
    """

    def __init__(self, block: nn.Module, layout: RecordLayout) -> None:
        self.block = block
        self.layout = layout
        modules = dict(block.named_modules())
        self.targets = tuple(
            (modules[field.module]._parameters if field.is_parameter else modules[field.module]._buffers, field.name)
            for field in layout.fields
        )
        for module in modules.values():
            _keep_in_place(module)

    def bind(self, views: Views) -> None:
        """Make the block use ``views``, as made by `views_of` for its layout."""
        for (tensors, name), view in zip(self.targets, views, strict=True):
            tensors[name] = view
