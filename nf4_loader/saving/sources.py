"""Where the tensors of a model to be saved come from: a checkpoint, or a GGUF file."""

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import families
from ..checkpoint.catalogue import COMPANIONS, SCALES, Catalogue, is_of_transformer, read_catalogue
from ..checkpoint.errors import CheckpointError
from ..checkpoint.header import TensorEntry
from ..checkpoint.identify import of_another_kind, what_else_it_is
from ..checkpoint.read_parts import TORCH_DTYPES
from ..checkpoint.tensors import TransformerTensor
from .dense import read_dense
from .save import Source

logger = logging.getLogger(__name__)

_WHOLE_NUMBERS = {"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}


def sources_of_file(path: Path, *, all_in_one: bool) -> list[Source]:
    """The tensors of a transformer of a known family, dense or in 4 bits, in any layout; or of a GGUF file of one.

    Args:
        path: As `read_catalogue` takes it, or a GGUF file.
        all_in_one: Give the text encoders and the VAE of the file, too.

    Raises:
        CheckpointError: there is no transformer in it that can be read, or the encoders and the VAE are not there.
    """
    catalogue = None if _is_gguf(path) else read_catalogue(path)
    if all_in_one and not (catalogue and catalogue.text_encoders and catalogue.vae):
        raise CheckpointError(path, "it has no text encoders or no VAE: only the transformer of it can be saved.")
    if catalogue is None:
        return _sources_of_gguf(path)
    return sources_of_catalogue(catalogue) + (
        sources_of_entries({**catalogue.text_encoders, **catalogue.vae}) if all_in_one else []
    )


def has_others(path: Path) -> bool:
    """Whether the file has text encoders and a VAE, for `sources_of_file` with ``all_in_one``."""
    if _is_gguf(path):
        return False
    catalogue = read_catalogue(path)
    return bool(catalogue.text_encoders and catalogue.vae)


def sources_of_catalogue(catalogue: Catalogue) -> list[Source]:
    """The tensors of the transformer. Other tensors of the file are left out, and the log says so.

    Raises:
        CheckpointError: there is no transformer, or it has weights that are neither float numbers nor in 4 bits.
    """
    if catalogue.found is None:
        raise CheckpointError(catalogue.path, what_else_it_is(catalogue.header))
    other = of_another_kind(catalogue.header.tensors)
    _require_whole(catalogue.path, catalogue.found.family, catalogue.transformer, other)
    sources, left_out = [], list(catalogue.others)
    for name, tensor in catalogue.transformer.items():
        if name.endswith(COMPANIONS):
            continue
        if _is_bookkeeping(tensor):
            left_out.append(name)
            continue
        _require_values(catalogue, tensor)
        scales = _scales_of(catalogue, tensor)
        read = functools.partial(_read, tensor, scales)
        stored, is_embedding = None if scales else tensor, name in catalogue.found.family.embeddings
        sources.append(Source(name, tensor.shape, read, stored=stored, is_embedding=is_embedding))
    _say_what_is_left_out(catalogue.path, left_out)
    return sources


def _is_bookkeeping(tensor: TransformerTensor) -> bool:
    """Whether it is a counter that a trainer has left in the file. No model here has tensors of whole numbers."""
    return all(
        isinstance(part, TensorEntry) and part.dtype in _WHOLE_NUMBERS and not part.name.endswith(".weight")
        for part in tensor.parts
    )


def _say_what_is_left_out(path: Path, names: Sequence[str]) -> None:
    if names:
        logger.warning(
            "NF4: %s: %d tensors do not belong to the transformer and are left out of the new file (%s%s)",
            path.name,
            len(names),
            ", ".join(names[:4]),
            ", ..." if len(names) > 4 else "",
        )


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def sources_of_entries(entries: Mapping[str, TensorEntry]) -> list[Source]:
    """Tensors that are copied as they are, by their names in the new file."""
    tensors = {name: TransformerTensor((entry,)) for name, entry in entries.items()}
    return [
        Source(name, tensor.shape, functools.partial(_read, tensor, {}), stored=tensor, is_layer=False)
        for name, tensor in tensors.items()
    ]


def _require_whole(path: Path, family: families.Family, names: Collection[str], other: str | None = None) -> None:
    """Check that there are tensors beside the blocks, since additions to a model have blocks, too.

    Raises:
        CheckpointError: there are none. It says ``other``, if that is known.
    """
    missing = [name for name in family.beside_blocks if name not in names]
    if missing:
        incomplete = f"it has blocks of a {family.name} model, but no {' and no '.join(missing)}. Download a whole one."
        raise CheckpointError(path, other or incomplete)


def _require_values(catalogue: Catalogue, tensor: TransformerTensor) -> None:
    if any(isinstance(part, TensorEntry) and part.dtype not in TORCH_DTYPES for part in tensor.parts):
        raise CheckpointError(catalogue.path, what_else_it_is(catalogue.header))


def _scales_of(catalogue: Catalogue, tensor: TransformerTensor) -> dict[str, TensorEntry]:
    """The scales of a tensor's parts, by the names of the parts in the file."""
    scales: dict[str, TensorEntry] = {}
    for part in tensor.parts:
        if not part.name.endswith(".weight"):
            continue
        layer = part.name.removesuffix(".weight")
        found = [entry for end in SCALES if (entry := catalogue.header.tensors.get(layer + end))]
        if found:
            scales[part.name] = found[0]
            if [size for size in found[0].shape if size != 1] not in ([], [part.shape[0]]):
                raise CheckpointError(
                    catalogue.path,
                    f"{found[0].name}: of shape {found[0].shape}; what can be read is fp8 with one number for each "
                    f"weight or row ({part.shape[0]} of them). Make the file of the model in bf16.",
                )
    return scales


def _read(tensor: TransformerTensor, scales: Mapping[str, TensorEntry], device: torch.device) -> torch.Tensor:
    is_fp8 = any(isinstance(part, TensorEntry) and part.dtype.startswith("F8") for part in tensor.parts)
    is_weight = len(tensor.shape) == 2 and (is_fp8 or tensor.weights4bit or scales)
    return read_dense(tensor, torch.bfloat16 if is_weight else None, device, scales)


def _sources_of_gguf(path: Path) -> list[Source]:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(path, "reading GGUF needs the package gguf: pip install gguf") from None
    try:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(path, f"it is not readable as GGUF ({error}). Download it again.") from error
    found = families.detect(tensors)
    if found is None or found.layout is not found.family.native or not found.layout.is_read:
        raise CheckpointError(path, f"it holds no transformer of {families.names()} in the names of ComfyUI's model.")
    left_out = [name for name in tensors if not is_of_transformer(name, found)]
    placed = {found.place(name).name: tensor for name, tensor in tensors.items() if name not in left_out}
    _require_whole(path, found.family, placed)
    _say_what_is_left_out(path, left_out)
    return [
        Source(
            name,
            tuple(reversed(tensor.shape.tolist())),
            functools.partial(_read_gguf, tensor),
            is_embedding=name in found.family.embeddings,
        )
        for name, tensor in placed.items()
    ]


def _read_gguf(tensor: Any, device: torch.device) -> torch.Tensor:
    return dequantised_gguf(tensor.data, tensor.tensor_type, tuple(reversed(tensor.shape.tolist()))).to(device)


def dequantised_gguf(data: Any, kind: Any, shape: Sequence[int]) -> torch.Tensor:
    """Values of a GGUF tensor.

    Args:
        data: Its bytes, a numpy array.
        kind: ``gguf.GGMLQuantizationType``.
        shape: The logical shape.

    Returns:
        In bf16 if the tensor is quantised or in bf16, else in its own dtype.
    """
    import gguf

    values = torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).reshape(tuple(shape))
    dtypes = {"F32": torch.float32, "F16": torch.float16}
    return values.to(dtypes.get(kind.name, torch.bfloat16))
