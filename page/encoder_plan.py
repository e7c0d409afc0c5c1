"""The plan for a text encoder from its file's header alone; see `file_plan`."""

import math

import torch

from ..nf4_loader.checkpoint.encoder_file import EncoderFile
from ..nf4_loader.checkpoint.header import TensorEntry
from ..nf4_loader.checkpoint.tensors import TransformerTensor, Weight4bit
from ..offload.plan import BlockSize
from ..offload.record import Field
from .file_plan import field_of, size_of

LARGE_BYTES = 32 << 20
_STAY_IN_RAM = ("embed_tokens.weight", "shared.weight", "lm_head.weight", "token_embedding.weight")
"""Ends of names of what is in host memory if it is large (`offload.comfyui.large_layers`)."""


def encoder_sizes(file: EncoderFile, dtype: torch.dtype) -> tuple[BlockSize, ...]:
    """What `Streamer.sizes` gives for the loaded text encoder, tiles in the file's order; dense tensors are of
    ``dtype``."""
    kinds = list(file.encoder.layers)
    layers: dict[tuple[int, int], dict[str, list[Field]]] = {}
    for name, tensor in file.tensors.items():
        found = file.encoder.layer_of(name)
        if found is not None:
            blocks, index, inner = found
            module, _, end = inner.rpartition(".")
            fields = layers.setdefault((kinds.index(blocks), index), {}).setdefault(module, [])
            fields += [field_of(module, end, nbytes) for nbytes in _sizes(tensor, dtype)]
    named = list(file.encoder.layers.values())
    return tuple(size_of(named[of], owners) for (of, _), owners in sorted(layers.items()))


def encoder_other_bytes(file: EncoderFile, dtype: torch.dtype) -> int:
    """Bytes of what is in no layer and always on the device."""
    others = (
        (name, sum(_sizes(tensor, dtype)))
        for name, tensor in file.tensors.items()
        if file.encoder.layer_of(name) is None and not _is_tokenizer(tensor)
    )
    return sum(nbytes for name, nbytes in others if not (name.endswith(_STAY_IN_RAM) and nbytes >= LARGE_BYTES))


def _is_tokenizer(tensor: Weight4bit | TensorEntry) -> bool:
    """ComfyUI's own files have the tokenizer's file in one."""
    return isinstance(tensor, TensorEntry) and tensor.dtype == "U8"


def _sizes(tensor: Weight4bit | TensorEntry, dtype: torch.dtype) -> list[int]:
    if isinstance(tensor, Weight4bit):
        return TransformerTensor((tensor,)).packed_sizes
    return [math.prod(tensor.shape) * dtype.itemsize]
