"""CLIP-L and T5 through ComfyUI's own classes, with the Linears that a file has in 4 bits left in 4 bits."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import torch
from torch import nn

from ...memory import is_out_of_memory, is_out_of_ram
from ..checkpoint.catalogue import COMPANIONS, group_4bit
from ..checkpoint.errors import CheckpointError
from ..checkpoint.header import Header, TensorEntry
from ..checkpoint.identify import of_another_kind
from ..checkpoint.read_parts import DenseMemory, PackedMemory, memory_of, read_entries, read_parts
from ..checkpoint.require import require_no_missing
from ..checkpoint.shards import read_checkpoint_header
from ..checkpoint.tensors import TransformerTensor, Weight4bit
from ..linear.linear4bit import Linear4bit
from .patched_encoders import patch_4bit_layers

_MARKS = {
    "t5xxl": re.compile(r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.q\.weight$"),
    "clip_l": re.compile(r"text_model\.encoder\.layers\.\d+\.mlp\.fc1\.weight$|transformer\.resblocks\.0\.ln_1\."),
}
"""A weight of each encoder, by the names of transformers; of CLIP-L also by OpenAI's, which ComfyUI renames."""


_FORMATS = "_quantization_metadata"
"""The metadata in which some files describe ComfyUI's own formats; others do it in tensors."""

_READ_BY_ALL = "bf16, fp16 or plain fp8 (t5xxl_fp8_e4m3fn.safetensors)"

_OPTIONAL = ("text_projection.weight", "logit_scale", "lm_head.weight", "position_ids", *COMPANIONS)
"""Ends of names without which a prompt is encoded all the same."""

_EMBEDDING = "encoder.embed_tokens.weight"

State = dict[str, torch.Tensor]


class LayersWithoutMemory(comfy.ops.manual_cast):
    """ComfyUI's layers for an encoder with some Linears in 4 bits. A Linear has no memory before its weight comes: a
    dense T5 would take four times what the file has."""

    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(
            self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
        ) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False) if bias else None

        def _load_from_state_dict(self, state_dict: State, prefix: str, *lists: Any) -> None:
            for name, shape in (("weight", (self.out_features, self.in_features)), ("bias", (self.out_features,))):
                expected = getattr(self, name)
                if expected is None and prefix + name not in state_dict:
                    continue
                value = taken(state_dict, prefix + name, shape, *lists)
                if value is None and expected is not None:
                    # CLIP-L files may lack text_projection, which Flux does not look at; ComfyUI computes it anyway.
                    setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=expected.dtype), requires_grad=False))
                elif value is not None and not value.is_meta:
                    # For a packed weight, `adopt_4bit` puts another layer in the place of this one. A bias is taken if
                    # a file has one, though ComfyUI's T5 has none.
                    dtype = value.dtype if expected is None else _finer(value.dtype, expected.dtype)
                    setattr(self, name, nn.Parameter(value.to(dtype), requires_grad=False))


def taken(
    state_dict: State,
    key: str,
    shape: tuple[int, ...],
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> torch.Tensor | None:
    """The tensor ``key``; or None, and it is in ``missing``, or ``errors`` say that its shape is another.

    The last five arguments are those of `nn.Module._load_from_state_dict`.
    """
    value = state_dict.get(key)
    if value is None:
        missing.append(key)
    elif tuple(value.shape) != shape:
        errors.append(f"{key}: it has shape {tuple(value.shape)}; needed is {shape}")
        return None
    return value


def _finer(stored: torch.dtype, models: torch.dtype) -> torch.dtype:
    """The dtype to hold a dense tensor in, of the file's and the model's: ComfyUI rounds a patched one to it."""
    both_are_float = stored.is_floating_point and models.is_floating_point
    return models if both_are_float and torch.finfo(models).eps < torch.finfo(stored).eps else stored


@dataclass(frozen=True)
class _Encoder:
    """One text encoder in a file."""

    kind: str
    """"clip_l" or "t5xxl"."""
    header: Header
    state: State
    """For ComfyUI. What is packed is meta tensors of the logical shape."""
    packed: Mapping[str, Weight4bit]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def is_as_the_model(self) -> bool:
        """Whether the file's tensors are the model's: not those under OpenAI's names, which ComfyUI renames, and not
        those that only the metadata tells how to read."""
        is_openai = any(name.startswith("transformer.resblocks.") for name in self.header.tensors)
        return not is_openai and _FORMATS not in self.header.metadata


def load_dual_clip(paths: Sequence[Path], embedding_directory: Sequence[str]) -> comfy.sd.CLIP:
    """Load CLIP-L and T5 for Flux from two files, in any order, each dense or in 4 bits.

    Raises:
        CheckpointError: a file is none of the two, both are of one kind, ComfyUI does not take them, or a tensor is
            missing.
    """
    encoders: dict[str, _Encoder] = {}
    for path in paths:
        encoder = _read_encoder(path)
        if encoder.kind in encoders:
            raise CheckpointError(
                path,
                f"it is of the same kind ({encoder.kind}) as {encoders[encoder.kind].path.name} in the other input: "
                "pick CLIP-L and T5-XXL.",
            )
        encoders[encoder.kind] = encoder
    if len(encoders) < len(_MARKS):
        raise CheckpointError(paths[0], "Flux needs two text encoders: CLIP-L and T5-XXL.")
    found = encoders.values()
    weights = {f"{one.kind}.transformer.{name}": weight for one in found for name, weight in one.packed.items()}
    for encoder in found:
        require_computable(encoder.path, encoder.state, weights)
    t5 = encoders["t5xxl"]
    layers = max(int(match[1]) for name in t5.state if (match := _MARKS["t5xxl"].search(name))) + 1
    states = [encoder.state for encoder in found]  # in which ComfyUI gives tensors its own names
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            states,
            embedding_directory=list(embedding_directory),
            clip_type=comfy.sd.CLIPType.FLUX,
            model_options=options_for(weights, layers),
        )
    except Exception as error:  # ComfyUI's code looks at shapes that nobody has checked, and raises whatever comes
        if is_out_of_ram(error) or is_out_of_memory(error):
            raise
        other = encoders["clip_l"].path.name
        raise CheckpointError(
            t5.path, f"ComfyUI does not take it with {other} ({type(error).__name__}: {error})."
        ) from error
    transformers = transformers_of(clip)
    for encoder, state in zip(found, states, strict=True):
        require_complete(encoder.path, transformers[f"{encoder.kind}.transformer"], state)
    adopt_4bit(clip, weights)
    if all(encoder.is_as_the_model for encoder in found):
        clip.cond_stage_model.nf4_entries = {
            f"text_encoders.{one.kind}.transformer.{name}": entry
            for one in found
            for name, entry in one.header.tensors.items()
        }
    return clip


def _read_encoder(path: Path) -> _Encoder:
    header = read_checkpoint_header(path)
    kind = _encoder_of(path, header.tensors)
    state, packed = read_encoders(path, header.tensors)
    return _Encoder(kind, header, _in_comfyuis_format(state, header.metadata), packed)


def _encoder_of(path: Path, tensors: Mapping[str, TensorEntry]) -> str:
    for part, mark in _MARKS.items():
        if any(mark.match(name) for name in tensors):
            return part
    raise CheckpointError(
        path,
        "it is neither CLIP-L ('text_model.encoder.layers.0...' or 'transformer.resblocks.0...') nor T5 "
        "('encoder.block.0...'). Pick clip_l.safetensors and a t5xxl file from models/text_encoders.",
    )


def read_encoders(path: Path, tensors: Mapping[str, TensorEntry]) -> tuple[State, dict[str, Weight4bit]]:
    """The state dict of text encoders for ComfyUI, with meta tensors of the logical shape for what is packed; and the
    packed weights by name.

    Raises:
        CheckpointError: they are quantised in another format, or a quant state does not fit.
    """
    problem = of_another_kind(tensors)
    if problem is not None:
        raise CheckpointError(path, f"of its text encoders: {problem}")
    grouped = group_4bit(path, tensors)
    weights = {name: part for name, part in grouped.items() if isinstance(part, Weight4bit)}
    state = {name: torch.empty(weight.shape, device="meta") for name, weight in weights.items()}
    state |= read_entries([part for part in grouped.values() if isinstance(part, TensorEntry)])
    name_embedding(state)
    return state, weights


def name_embedding(state: State) -> None:
    """Call a T5's embedding as ComfyUI does. It has two names in transformers, and a file may have either or both."""
    for name in [name for name in state if name.endswith(_EMBEDDING)]:
        state.setdefault(name.removesuffix(_EMBEDDING) + "shared.weight", state.pop(name))


def _in_comfyuis_format(state: State, metadata: Mapping[str, str]) -> State:
    """``state`` as ComfyUI's own loader hands it on: from 0.8 on it describes layers in scaled fp8 in another way."""
    convert = getattr(comfy.utils, "convert_old_quants", None)
    return state if convert is None else convert(state, metadata=metadata)[0]


def require_computable(path: Path, state: Iterable[str], weights: Mapping[str, Weight4bit]) -> None:
    """Check that this ComfyUI computes with the scales of these text encoders, if they have any.

    Args:
        path: Of their file.
        state: Their tensors' names.
        weights: All that is packed in the encoders that are loaded together, which have `LayersWithoutMemory`.

    Raises:
        CheckpointError: saying what is in the way.
    """
    scales = [name for name in state if name.endswith(COMPANIONS)]
    if scales and weights:
        raise CheckpointError(
            path,
            f"{scales[0]}: a text encoder in ComfyUI's scaled fp8 or another format of its own does not go with 4-bit "
            f"layers of text encoders. Pick another file of one of the two: {_READ_BY_ALL}.",
        )
    newer = next((name for name in scales if name.endswith((".comfy_quant", ".weight_scale"))), None)
    if newer is not None and not hasattr(comfy.utils, "detect_layer_quantization"):
        raise CheckpointError(
            path,
            f"{newer}: a text encoder in a format of ComfyUI's own that this ComfyUI does not read yet. Update ComfyUI "
            f"to 0.8 or later, or load another T5 with 'DualCLIPLoader' (type flux): {_READ_BY_ALL}.",
        )


def transformers_of(clip: comfy.sd.CLIP) -> dict[str, nn.Module]:
    """Each text encoder's transformer by its path in ``clip.cond_stage_model``."""
    return {
        f"{path}.transformer": module.transformer
        for path, module in clip.cond_stage_model.named_modules()
        if isinstance(module, comfy.sd1_clip.SDClipModel)
    }


def require_complete(path: Path, transformer: nn.Module, given: Container[str]) -> None:
    """Check that a text encoder has all values that it computes with. ComfyUI leaves memory that nobody has filled.

    Args:
        path: Of its file.
        transformer: One of `transformers_of`, before a `Linear4bit` is put into it.
        given: The names of the tensors that it was given.

    Raises:
        CheckpointError: naming the tensors that are missing.
    """
    missing = (name for name in transformer.state_dict() if name not in given and not name.endswith(_OPTIONAL))
    require_no_missing(path, "the text encoder", missing)


def options_for(weights: Mapping[str, Weight4bit], t5_layers: int) -> dict[str, Any]:
    """ComfyUI's options for text encoders with these packed weights."""
    options: dict[str, Any] = {"t5xxl_model_config": {"num_layers": t5_layers}}
    if weights:
        offload_device = comfy.model_management.text_encoder_offload_device()
        options |= {"custom_operations": LayersWithoutMemory, "initial_device": offload_device}
    return options


def adopt_4bit(clip: comfy.sd.CLIP, weights: Mapping[str, Weight4bit]) -> None:
    """Put a `Linear4bit` with the file's bytes in the place of each Linear whose weight is packed.

    Args:
        clip: Made with `options_for` the same weights.
        weights: By their names in ``clip.cond_stage_model``.
    """
    modules = dict(clip.cond_stage_model.named_modules())
    memory: list[PackedMemory | DenseMemory] = []
    with torch.inference_mode(False), torch.no_grad():
        for name, weight in weights.items():
            path = name.removesuffix(".weight")
            replaced = modules.get(path)
            if not isinstance(replaced, LayersWithoutMemory.Linear):
                raise CheckpointError(weight.packed.path, f"{weight.name}: this text encoder has no such Linear.")
            tensor = TransformerTensor((weight,))
            linear = Linear4bit(tensor.held, bias=False, dtype=replaced.weight.dtype)
            linear.bias = replaced.bias
            parent, _, child = path.rpartition(".")
            setattr(modules[parent], child, linear)
            memory += memory_of(tensor, linear.tensors)
        read_parts(memory, lambda _: None)
    if weights:
        patch_4bit_layers(clip)
