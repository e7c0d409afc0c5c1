"""Tensors of a checkpoint: a 4-bit weight with all that bitsandbytes wrote for it, and a tensor made of parts."""

import functools
import math
from dataclasses import dataclass, replace

import torch

from .header import TensorEntry
from .quant_state import DensePart, NestedAbsmax, QuantState

_ALIGNMENT = 16
"""Bytes: what bitsandbytes' kernels want."""


@dataclass(frozen=True)
class Weight4bit:
    """One packed weight: how to read it, and where its bytes are."""

    state: QuantState
    packed: TensorEntry
    absmax: TensorEntry
    quant_map: TensorEntry
    quant_state: TensorEntry
    nested_absmax: TensorEntry | None = None
    nested_map: TensorEntry | None = None

    @property
    def name(self) -> str:
        return self.packed.name

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All that bitsandbytes wrote for it."""
        every = (self.packed, self.absmax, self.quant_map, self.nested_absmax, self.nested_map, self.quant_state)
        return tuple(entry for entry in every if entry is not None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.state.shape

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes and absmax in the file."""
        return self.packed.nbytes + self.absmax.nbytes


@dataclass(frozen=True)
class TransformerTensor:
    """One tensor of the transformer: the rows of its parts, one below the other.

    Most tensors have one part; diffusers' q, k and v are three parts of one. With ``halves_swapped`` the second half of
    the rows comes first. With ``flattened`` the model has the values in one dimension, the file in more.
    """

    parts: tuple[Weight4bit | TensorEntry, ...]
    halves_swapped: bool = False
    flattened: bool = False

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        if self.flattened:
            return (sum(math.prod(part.shape) for part in self.parts),)
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:]) if len(self.parts) > 1 else first

    @functools.cached_property
    def weights4bit(self) -> tuple[Weight4bit, ...]:
        return tuple(part for part in self.parts if isinstance(part, Weight4bit))

    @functools.cached_property
    def fused(self) -> QuantState | None:
        """The quant state of all parts read as one 4-bit weight: their bytes one after the other, and so their absmax.

        That changes no value. None if they differ in type or blocksize, one is dense, or one ends inside a block.
        """
        states = [weight.state for weight in self.weights4bit]
        if len(states) < len(self.parts) or len({(state.quant_type, state.blocksize) for state in states}) != 1:
            return None
        if any(state.numel % state.blocksize for state in states[:-1]):
            return None
        rows, columns = self.shape
        return QuantState(states[0].quant_type, states[0].blocksize, (rows, columns))

    @functools.cached_property
    def nested(self) -> tuple[NestedAbsmax, ...]:
        """The nested absmax of each part, or () if the model expands it to fp32.

        It stays nested only if the tensor is ``fused``, every part is nested and starts 16-byte aligned, and no halves
        are swapped.
        """
        nested = tuple(nested for weight in self.weights4bit for nested in weight.state.nested)
        is_aligned = all(part.count % _ALIGNMENT == 0 and 4 * part.blocks % _ALIGNMENT == 0 for part in nested[:-1])
        is_kept = self.fused is not None and len(nested) == len(self.parts) and is_aligned and not self.halves_swapped
        return nested if is_kept else ()

    @functools.cached_property
    def held(self) -> tuple[QuantState | DensePart, ...]:
        """How a model holds it: as one 4-bit weight if it is `fused`, else part by part, with absmax in fp32."""
        if self.fused is not None:
            return (replace(self.fused, nested=self.nested),)
        return tuple(
            replace(part.state, nested=())
            if isinstance(part, Weight4bit)
            else DensePart((part.shape[0], part.shape[1]))
            for part in self.parts
        )

    @property
    def packed_sizes(self) -> list[int]:
        """Bytes of each tensor that a model holds for the packed parts: codes, absmax, tables of nested absmax."""
        states = [part for part in self.held if isinstance(part, QuantState)] if self.weights4bit else []
        kept = [tensor for state in states for tensor in state.tensors(torch.float32).values()]
        return [math.prod(shape) * dtype.itemsize for shape, dtype in kept]

    @property
    def ram_bytes(self) -> int:
        """Bytes of host memory of what is packed, and of what is dense as the file has it."""
        return sum(self.packed_sizes) + sum(part.nbytes for part in self.parts if isinstance(part, TensorEntry))
