"""Where the tensors of a model to be saved come from: a checkpoint, or a GGUF file."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import layouts
from .catalogue import Catalogue, TransformerTensor, read_catalogue
from .errors import CheckpointError
from .header import TensorEntry
from .identify import what_else_it_is
from .parts import read_dense
from .save import Source

_SCALES = (".scale_weight", ".weight_scale")
"""Of fp8 weights: one fp32 number, by which the values are multiplied (ComfyUI's scaled fp8)."""

_NOT_SAVED = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def sources_of_file(path: Path, *, all_in_one: bool) -> list[Source]:
    """The tensors of a Flux transformer, dense or in 4 bits, in any layout; or of a GGUF file of one.

    Args:
        path: As `read_catalogue` takes it, or a GGUF file.
        all_in_one: Give the text encoders and the VAE of the file, too.

    Raises:
        CheckpointError: there is no Flux transformer in it that can be read, or the encoders and the VAE are not there.
    """
    if path.suffix == ".gguf":
        return _sources_of_gguf(path)
    catalogue = read_catalogue(path)
    if all_in_one and not (catalogue.text_encoders and catalogue.vae):
        raise CheckpointError(path, "it has no text encoders or no VAE: only the transformer of it can be saved.")
    return sources_of_catalogue(catalogue) + (
        sources_of_entries({**catalogue.text_encoders, **catalogue.vae}) if all_in_one else []
    )


def sources_of_catalogue(catalogue: Catalogue) -> list[Source]:
    """The tensors of the transformer."""
    if catalogue.layout is None or any(name.endswith(".comfy_quant") for name in catalogue.transformer):
        raise CheckpointError(catalogue.path, what_else_it_is(catalogue.header, is_flux=False))
    sources = []
    for name, tensor in catalogue.transformer.items():
        if name.endswith(_NOT_SAVED):
            continue
        scale = next(
            (catalogue.transformer[other] for other in _scales_of(name) if other in catalogue.transformer), None
        )
        read = functools.partial(_read, tensor, scale)
        sources.append(Source(name, tensor.shape, read, stored=tensor if scale is None else None))
    return sources


def sources_of_entries(entries: Mapping[str, TensorEntry]) -> list[Source]:
    """Tensors that are copied as they are, by their names in the new file."""
    tensors = {name: TransformerTensor((entry,)) for name, entry in entries.items()}
    return [
        Source(name, tensor.shape, functools.partial(read_dense, tensor), stored=tensor, is_layer=False)
        for name, tensor in tensors.items()
    ]


def _scales_of(name: str) -> list[str]:
    return [name.removesuffix(".weight") + scale for scale in _SCALES] if name.endswith(".weight") else []


def _read(tensor: TransformerTensor, scale: TransformerTensor | None) -> torch.Tensor:
    is_fp8 = any(isinstance(part, TensorEntry) and part.dtype.startswith("F8") for part in tensor.parts)
    if scale is not None:
        return read_dense(tensor, torch.float32).mul_(read_dense(scale, torch.float32)).bfloat16()
    is_weight = len(tensor.shape) == 2 and (is_fp8 or tensor.weights4bit)
    return read_dense(tensor, torch.bfloat16 if is_weight else None)


def _sources_of_gguf(path: Path) -> list[Source]:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(path, "reading GGUF needs the package gguf: pip install gguf") from None
    try:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(path, f"it is not readable as GGUF ({error}). Download it again.") from error
    prefix, layout = layouts.detect(tensors)
    if layout != "Black Forest Labs":
        raise CheckpointError(path, "it holds no Flux transformer ('double_blocks.0.*' is missing).")
    return [
        Source(
            layouts.place(layout, name.removeprefix(prefix)).name,
            tuple(reversed(tensor.shape.tolist())),
            functools.partial(
                dequantised_gguf, tensor.data, tensor.tensor_type, tuple(reversed(tensor.shape.tolist()))
            ),
        )
        for name, tensor in tensors.items()
    ]


def dequantised_gguf(data: Any, kind: Any, shape: Sequence[int]) -> torch.Tensor:
    """Values of a GGUF tensor.

    Args:
        data: Its bytes, a numpy array.
        kind: ``gguf.GGMLQuantizationType``.
        shape: The logical shape.

    Returns:
        bf16 of quantised ones, as of dense ones in bf16; otherwise the dtype that they have.
    """
    import gguf

    values = torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).reshape(tuple(shape))
    dtypes = {"F32": torch.float32, "F16": torch.float16}
    return values.to(dtypes.get(kind.name, torch.bfloat16))
