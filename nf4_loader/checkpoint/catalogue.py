"""What a checkpoint holds: its tensors grouped into transformer, text encoders and VAE.

The transformer may be in any layout of `families`, with any of its Linears packed. All-in-one files (lllyasviel's
flux1-dev-bnb-nf4 v1 and v2, and those that Forge and others save in the same way) also have ``text_encoders.clip_l.``,
``text_encoders.t5xxl.`` and ``vae.``.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ... import families
from .errors import DAMAGED, CheckpointError
from .header import Header, TensorEntry
from .quant_state import (
    MAX_QUANT_STATE_BYTES,
    NESTED_MAP,
    QUANT_STATE,
    QuantState,
    parse_quant_state,
)
from .read import opened, read_into
from .shards import read_checkpoint_header
from .tensors import TransformerTensor, Weight4bit

TEXT_ENCODERS_PREFIX = "text_encoders."
CLIP_L_PREFIX = TEXT_ENCODERS_PREFIX + "clip_l."
T5_PREFIX = TEXT_ENCODERS_PREFIX + "t5xxl."
VAE_PREFIX = "vae."

_OTHER_PARTS = (
    TEXT_ENCODERS_PREFIX,
    VAE_PREFIX,
    "cond_stage_model.",
    "conditioner.",
    "first_stage_model.",
    "model_ema.",
)
"""Beginnings of the names of all other parts of a checkpoint, as various tools write them."""

SCALES = (".scale_weight", ".weight_scale")
"""Ends of the names of scales, by which the values of a layer's fp8 weight are multiplied (ComfyUI's scaled fp8)."""

COMPANIONS = (*SCALES, ".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant")
"""Ends of all names that come with quantised weights of ComfyUI's: scaled fp8, and its formats from 0.8 on."""

_QUANT_STATE = re.compile(rf"(?P<weight>.+\.weight){re.escape(QUANT_STATE)}(?P<type>\w+)$")
_QUANT_FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class Catalogue:
    """The parts of one checkpoint.

    ``transformer`` has its tensors by the names of ComfyUI's model without prefix (``img_in.weight``). The other parts
    keep the file's full names; ``others`` are step counters and whatever else there is. ``found`` is None where there
    is no transformer that can be read; then ``transformer`` has all that is in no other part.
    """

    header: Header
    found: families.Found | None
    transformer: Mapping[str, TransformerTensor]
    text_encoders: Mapping[str, TensorEntry]
    vae: Mapping[str, TensorEntry]
    others: Mapping[str, TensorEntry]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def parts(self) -> tuple[Weight4bit | TensorEntry, ...]:
        """The parts of every transformer tensor."""
        return tuple(part for tensor in self.transformer.values() for part in tensor.parts)

    @property
    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every transformer tensor as if nothing were packed, by name without prefix."""
        return {name: tensor.shape for name, tensor in self.transformer.items()}

    @property
    def transformer_bytes(self) -> int:
        """Bytes of the transformer's tensors in the file, without code tables and quant states."""
        return sum(part.nbytes for part in self.parts)

    @property
    def transformer_ram(self) -> int:
        """Bytes of host memory that the transformer takes once it is read."""
        return sum(tensor.ram_bytes for tensor in self.transformer.values())

    @property
    def ram_bytes(self) -> int:
        """Bytes of host memory that all of the file takes: the transformer, text encoders and VAE."""
        beside = (*self.text_encoders.values(), *self.vae.values())
        return self.transformer_ram + sum(entry.nbytes for entry in beside)

    @property
    def t5_layers(self) -> int:
        """Number of T5 encoder layers in the file (24 in the real ones)."""
        block = re.compile(re.escape(T5_PREFIX) + r"transformer\.encoder\.block\.(\d+)\.")
        return len({match[1] for match in map(block.match, self.text_encoders) if match})


def read_catalogue(path: Path) -> Catalogue:
    """Read the header and the quant states of a checkpoint and sort its tensors into parts.

    It need not be of a known family: `require_transformer` and `require_all_in_one` decide.

    Args:
        path: A file, any one of its shards, their index, or a folder of diffusers.

    Raises:
        CheckpointError: a file is missing, cannot be read or is not safetensors, files disagree, or a quant state does
            not fit the bytes that it describes.
    """
    header = read_checkpoint_header(path)
    found = families.detect(header.tensors)
    if found is not None and not found.layout.is_read:
        found = None
    parts: dict[str, dict[str, TensorEntry]] = {"": {}, TEXT_ENCODERS_PREFIX: {}, VAE_PREFIX: {}, "others": {}}
    for name, entry in header.tensors.items():
        parts[_part_of(name, found)][name] = entry
    transformer = _placed(path, found, group_4bit(path, parts[""]))
    return Catalogue(header, found, transformer, parts[TEXT_ENCODERS_PREFIX], parts[VAE_PREFIX], parts["others"])


def _part_of(name: str, found: families.Found | None) -> str:
    if is_of_transformer(name, found):
        return ""
    return next((part for part in (TEXT_ENCODERS_PREFIX, VAE_PREFIX) if name.startswith(part)), "others")


def is_of_transformer(name: str, found: families.Found | None) -> bool:
    """Whether the tensor ``name`` of a checkpoint with the transformer ``found`` may belong to that."""
    return not name.startswith(_OTHER_PARTS) and (found is None or name.startswith(found.prefix))


def group_4bit(path: Path, tensors: Mapping[str, TensorEntry]) -> dict[str, Weight4bit | TensorEntry]:
    """Group what bitsandbytes writes for each packed weight; every other tensor stays by itself.

    Raises:
        CheckpointError: a file cannot be read, or a quant state does not fit the bytes that it describes.
    """
    states = {match["weight"]: entry for name, entry in tensors.items() if (match := _QUANT_STATE.match(name))}
    weights4bit: dict[str, Weight4bit] = {}
    used: set[str] = set()
    for weight, raw in _read_all(path, states).items():
        try:
            weights4bit[weight] = _weight4bit(tensors, weight, states[weight], parse_quant_state(raw))
        except ValueError as error:
            raise CheckpointError(path, f"{weight}: {error}. {DAMAGED}") from None
        used.update((weight, states[weight].name), (f"{weight}.{field}" for field in _QUANT_FIELDS))
    return weights4bit | {name: entry for name, entry in tensors.items() if name not in used}


def _read_all(path: Path, states: Mapping[str, TensorEntry]) -> dict[str, bytes]:
    """The bytes of every quant state; each file is opened once."""
    read: dict[str, bytes] = {}
    for source, group in itertools.groupby(states.items(), key=lambda item: item[1].path):
        with opened(source) as file:
            for weight, entry in group:
                if entry.nbytes > MAX_QUANT_STATE_BYTES:
                    problem = f"{entry.name}: {entry.nbytes:,} bytes are no quant state. {DAMAGED}"
                    raise CheckpointError(path, problem)
                raw = bytearray(entry.nbytes)
                read_into(file, source, entry.offset, memoryview(raw))
                read[weight] = bytes(raw)
    return read


def _weight4bit(
    tensors: Mapping[str, TensorEntry], weight: str, quant_state: TensorEntry, state: QuantState
) -> Weight4bit:
    wanted = {"packed": weight, "absmax": f"{weight}.absmax", "quant_map": f"{weight}.quant_map"}
    if state.nested:
        wanted |= {"nested_absmax": f"{weight}.nested_absmax", "nested_map": f"{weight}.nested_quant_map"}
    entries: dict[str, TensorEntry] = {}
    for field, name in wanted.items():
        if name not in tensors:
            raise ValueError(f"'{name}' is not in the file")
        entries[field] = tensors[name]

    described = f"its quant state says {state.shape} in {state.quant_type} with blocksize {state.blocksize}"
    if entries["packed"].nbytes != state.packed_bytes:
        raise ValueError(
            f"{described}, which is {state.packed_bytes:,} bytes; the file has {entries['packed'].nbytes:,}"
        )
    absmax_dtype = "U8" if state.nested else "F32"
    _check_entry(described, "absmax", entries["absmax"], absmax_dtype, state.absmax_count)
    _check_entry(described, "quant_map", entries["quant_map"], "F32", 16)
    for nested in state.nested:
        _check_entry(described, "nested_absmax", entries["nested_absmax"], "F32", nested.blocks)
        _check_entry(described, "nested_quant_map", entries["nested_map"], "F32", NESTED_MAP)
    return Weight4bit(state=state, quant_state=quant_state, **entries)


def _check_entry(described: str, field: str, entry: TensorEntry, dtype: str, count: int) -> None:
    found = math.prod(entry.shape)
    if found != count or entry.dtype != dtype:
        raise ValueError(
            f"{described}, which needs {count:,} {dtype} values of {field}; the file has {found:,} of {entry.dtype}"
        )


def _placed(
    path: Path, found: families.Found | None, tensors: Mapping[str, Weight4bit | TensorEntry]
) -> dict[str, TransformerTensor]:
    """The tensors of a file by the names of ComfyUI's model, made of their parts."""
    parts: dict[str, dict[int, Weight4bit | TensorEntry]] = {}
    places: dict[str, families.Place] = {}
    for name, tensor in tensors.items():
        place = found.place(name) if found is not None else families.Place(name)
        other = parts.setdefault(place.name, {}).setdefault(place.part, tensor)
        if other is not tensor:
            raise CheckpointError(path, f"{tensor.name}: {other.name} is the same tensor of the model. {DAMAGED}")
        places[place.name] = place
    return {name: _stacked(path, places[name], parts[name]) for name in parts}


def _stacked(path: Path, place: families.Place, parts: Mapping[int, Weight4bit | TensorEntry]) -> TransformerTensor:
    ordered = tuple(parts[part] for part in sorted(parts))
    names = ", ".join(part.name for part in ordered)
    if len(ordered) < place.parts:
        raise CheckpointError(
            path, f"{place.name}: it is made of {place.parts} tensors, of which the file has only {names}. {DAMAGED}"
        )
    if len(ordered) > 1 and len({part.shape[1:] if part.shape else part for part in ordered}) != 1:
        shapes = ", ".join(str(part.shape) for part in ordered)
        raise CheckpointError(path, f"{names}: of shapes {shapes}, they make no {place.name}. {DAMAGED}")
    tensor = TransformerTensor(ordered, place.halves_swapped, place.flattened)
    if place.flattened and tensor.weights4bit:
        raise CheckpointError(path, f"{names}: it is packed in 4 bits, which no {place.name} is. {DAMAGED}")
    if place.halves_swapped and not _halves_are_whole_blocks(tensor):
        raise CheckpointError(path, f"{names}: its two halves, which change places, end inside a block. {DAMAGED}")
    return tensor


def _halves_are_whole_blocks(tensor: TransformerTensor) -> bool:
    shape = tensor.shape
    state = tensor.fused
    return bool(shape) and shape[0] % 2 == 0 and (state is None or state.numel // 2 % state.blocksize == 0)
