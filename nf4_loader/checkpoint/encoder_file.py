"""A text encoder in a file of its own: which one it is, and its tensors by the names of `families.encoders`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ... import families
from ...families.encoders import Encoder, detect_encoder, encoder_name, encoder_names, has_encoder
from .catalogue import group_4bit
from .errors import DAMAGED, CheckpointError
from .header import Header, TensorEntry
from .identify import of_another_kind, what_else_it_is
from .quant_state import QUANT_STATE
from .shards import read_checkpoint_header
from .tensors import Weight4bit


@dataclass(frozen=True)
class EncoderFile:
    """A text encoder and what is read of it. ``tensors`` are by our names; what no model of ComfyUI's has, and layers
    that are not used, are not among them."""

    header: Header
    encoder: Encoder
    tensors: Mapping[str, Weight4bit | TensorEntry]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def is_4bit(self) -> bool:
        return any(isinstance(tensor, Weight4bit) for tensor in self.tensors.values())

    @property
    def packed(self) -> dict[str, Weight4bit]:
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, Weight4bit)}

    @property
    def nbytes(self) -> int:
        """Bytes in the file of what is read, without code tables and quant states."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def layers(self) -> dict[str, int]:
        """How many layers of each kind are used."""
        found = {layer[:2] for name in self.tensors if (layer := self.encoder.layer_of(name))}
        kinds = self.encoder.layers
        return {kind: sum(kinds[of] == kind for of, _ in found) for kind in dict.fromkeys(kinds.values())}


def read_encoder_file(path: Path) -> EncoderFile:
    """Read the header and the quant states of a text encoder's file.

    Args:
        path: A file, any one of its shards, their index, or a folder of transformers.

    Raises:
        CheckpointError: it is no text encoder that this package knows, a file is missing or is not safetensors, files
            disagree, or a quant state does not fit the bytes that it describes.
    """
    return encoder_in(read_checkpoint_header(path))


def encoder_in(header: Header) -> EncoderFile:
    """As `read_encoder_file`, of a header that is read already."""
    path = header.path
    problem = of_another_kind(header.tensors)
    if problem is not None:
        raise CheckpointError(path, problem)
    tensors: dict[str, Weight4bit | TensorEntry] = {}
    for name, tensor in group_4bit(path, _wanted(header.tensors)).items():
        ours = encoder_name(name)
        assert ours is not None
        if ours in tensors:
            raise CheckpointError(path, f"{name}: {tensors[ours].name} is the same tensor of the model. {DAMAGED}")
        tensors[ours] = tensor
    encoder = detect_encoder({name: tensor.shape for name, tensor in tensors.items()})
    if encoder is None:
        raise CheckpointError(path, _refusal(header))
    return EncoderFile(header, encoder, {name: tensor for name, tensor in tensors.items() if encoder.is_read(name)})


def _wanted(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    return {name: entry for name, entry in tensors.items() if encoder_name(name) is not None}


def _refusal(header: Header) -> str:
    if families.detect(header.tensors) is not None:
        return (
            "it is a transformer and no text encoder. Put it into models/diffusion_models and load it with 'Load Flux "
            "NF4 UNet (streamed)'."
        )
    if has_encoder(header.tensors) and any(QUANT_STATE in name for name in header.tensors):
        what = "it is another language model in 4 bits, or one of another size, for which there is no node here."
    else:
        what = what_else_it_is(header)
    return f"it is no text encoder that this node loads ({encoder_names()}): {what}"
