"""Text encoders with 4-bit layers that have no memory yet: who streams them decides where their bytes are."""

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import nn

from ...families.encoders import ENCODERS, Encoder, encoder_types
from ...memory import is_out_of_memory, is_out_of_ram
from ..checkpoint.catalogue import COMPANIONS
from ..checkpoint.encoder_file import EncoderFile
from ..checkpoint.errors import CheckpointError
from ..checkpoint.header import TensorEntry, natural_key
from ..checkpoint.read_parts import read_entries, torch_dtype
from ..checkpoint.tensors import TransformerTensor, Weight4bit
from ..linear.linear4bit import Linear4bit
from . import text_encoders
from .tokenizers import tokenizer_tensors

_WITHOUT_DYNAMIC = (
    {"disable_dynamic": True}
    if "disable_dynamic" in inspect.signature(comfy.sd.load_text_encoder_state_dicts).parameters
    else {}
)
"""For ComfyUIs that would move it by their dynamic VRAM."""

_TYPES_WITH_TWO = ("flux", "sd3")

State = dict[str, torch.Tensor]


class _Operations(text_encoders.LayersWithoutMemory):
    """Layers that have no memory before their values come, and then take these as they are mapped from the file."""

    class Linear(text_encoders.LayersWithoutMemory.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            dtype = self.get_parameter("weight").dtype
            super()._load_from_state_dict(*args, **kwargs)
            _convert(self, dtype)

    class Embedding(comfy.ops.manual_cast.Embedding):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"device": torch.device("meta")})
            # Not on the meta device: some ComfyUIs move a model before it has its values.
            empty = torch.empty(0, dtype=self.get_parameter("weight").dtype)
            self.weight = nn.Parameter(empty, requires_grad=False)

        def _load_from_state_dict(self, state_dict: State, prefix: str, *lists: Any) -> None:
            dtype, key = self.weight.dtype, f"{prefix}weight"
            value = text_encoders.taken(state_dict, key, (self.num_embeddings, self.embedding_dim), *lists)
            if value is not None and value.is_meta:
                errors = lists[-1]
                errors.append(f"{key}: it is packed in 4 bits, which only the weight of a Linear may be")
            elif value is not None:
                self.weight = nn.Parameter(value, requires_grad=False)
                _convert(self, dtype)


def _convert(layer: nn.Module, dtype: torch.dtype) -> None:
    """Have its values in the dtype that ComfyUI gives the model."""
    for name, value in layer.named_parameters(recurse=False):
        if value.dtype != dtype:
            setattr(layer, name, nn.Parameter(value.to(dtype), requires_grad=False))


@dataclass(frozen=True)
class BuiltEncoders:
    """ComfyUI's CLIP. ``weights`` are what each 4-bit layer has to be given: their tensors are on the meta device."""

    clip: comfy.sd.CLIP
    weights: Mapping[Linear4bit, TransformerTensor]


def require_type(file: EncoderFile, clip_type: str) -> None:
    """Check that a prompt for ``clip_type`` is encoded with this text encoder, and that this ComfyUI knows how.

    Raises:
        CheckpointError: naming the types that are right, or what ComfyUI lacks.
    """
    encoder = file.encoder
    if clip_type not in encoder.types:
        kinds = " or ".join(encoder.types)
        raise CheckpointError(file.path, f"it is {encoder.name}, which is for type {kinds}, not {clip_type}.")
    if not _knows(encoder.types[clip_type]):
        raise CheckpointError(
            file.path,
            f"it is {encoder.name}. This ComfyUI does not encode prompts for {clip_type} with it yet (it has no "
            f"comfy.text_encoders.{encoder.types[clip_type]}): update ComfyUI.",
        )


def supported_types() -> list[str]:
    """The CLIP types for which this ComfyUI encodes with one of our text encoders."""
    known = {kind for encoder in ENCODERS for kind, needed in encoder.types.items() if _knows(needed)}
    return [kind for kind in encoder_types() if kind in known]


def encoder_dtype(file: EncoderFile) -> torch.dtype:
    """The dtype that ComfyUI gives the dense tensors: that of the norms, but for CLIP-L; of T5 at most 16 bits."""
    management = comfy.model_management
    device = management.text_encoder_device()
    common: torch.dtype = management.text_encoder_dtype(device)
    norm = next((name for name in _NORMS if name in file.tensors), None)
    entry = file.tensors.get(norm or "")
    if not isinstance(entry, TensorEntry):
        return common
    dtype = torch_dtype(entry)
    picked: torch.dtype = management.pick_weight_dtype(dtype, common, device) if norm == _NORMS[0] else dtype
    return picked


_NORMS = ("encoder.final_layer_norm.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight")


def _knows(path: str) -> bool:
    module, *names = path.split(".")
    try:
        reduce(getattr, names, importlib.import_module(f"comfy.text_encoders.{module}"))
    except (ImportError, AttributeError):
        return False
    return True


def build_encoders(files: Sequence[EncoderFile], clip_type: str, embedding_directory: Sequence[str]) -> BuiltEncoders:
    """Make ComfyUI's CLIP of one or more text encoders, at least one of which is in 4 bits.

    Raises:
        CheckpointError: a file is not for ``clip_type``, two are of one kind, a tensor is missing or of another shape,
            or the tokenizer's file is missing.
    """
    for file in files:
        require_type(file, clip_type)
        _require_4bit_or_plain(file)
    _require_number(files, clip_type)
    if len({file.encoder for file in files}) < len(files):
        raise CheckpointError(
            files[1].path,
            f"it is the same text encoder ({files[1].encoder.name}) as {files[0].path.name}: pick another.",
        )
    sources: dict[int, Weight4bit] = {}
    states = [_state(file, clip_type, sources) for file in files]
    kept = [list(state.values()) for state in states]  # so that no other tensor gets the id of one of these
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            states,
            embedding_directory=list(embedding_directory),
            # Where the kind of encoder decides, ComfyUI may have the type in its list only.
            clip_type=getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            model_options=options_for(files),
            **_WITHOUT_DYNAMIC,
        )
    except Exception as error:  # ComfyUI's code looks at shapes that nobody has checked, and raises whatever comes
        if is_out_of_ram(error) or is_out_of_memory(error):
            raise
        names = " with ".join(file.path.name for file in files[1:])
        beside = f" with {names}" if names else ""
        raise CheckpointError(
            files[0].path, f"ComfyUI does not take it{beside} ({type(error).__name__}: {error})."
        ) from error
    _let_go(clip)
    given = {name for state in states for name in state}
    for transformer in text_encoders.transformers_of(clip).values():
        text_encoders.require_complete(files[0].path, transformer, given)
    weights = _adopt(files, clip, states, sources)
    del kept
    return BuiltEncoders(clip, weights)


def _require_number(files: Sequence[EncoderFile], clip_type: str) -> None:
    """ComfyUI would make another model of too few or too many."""
    if clip_type == "flux" and len(files) < 2:
        raise CheckpointError(
            files[0].path,
            "Flux.1 needs two text encoders, CLIP-L and T5-XXL: pick the other one as the second (clip_name2).",
        )
    if clip_type not in _TYPES_WITH_TWO and len(files) > 1:
        raise CheckpointError(
            files[1].path, f"type {clip_type} has one text encoder: set the second (clip_name2) to none."
        )


def _let_go(clip: comfy.sd.CLIP) -> None:
    """Take it off ComfyUI's list of loaded models: it is on it where text encoders compute on the CPU."""
    loaded = comfy.model_management.current_loaded_models
    for entry in [entry for entry in loaded if entry.model is not None and entry.model.is_clone(clip.patcher)]:
        entry.model_unload()
        loaded.remove(entry)


def options_for(files: Sequence[EncoderFile]) -> dict[str, Any]:
    """ComfyUI's options for these text encoders."""
    layers = next((sum(file.layers.values()) for file in files if file.encoder.name == "T5-XXL"), 24)
    return {
        "custom_operations": _Operations,
        "initial_device": comfy.model_management.text_encoder_offload_device(),
        "t5xxl_model_config": {"num_layers": layers},
    }


def _state(file: EncoderFile, clip_type: str, sources: dict[int, Weight4bit]) -> State:
    """For ComfyUI. What is packed is meta tensors of the logical shape, which ``sources`` knows by their ids."""
    names = _comfy_names(file.encoder, clip_type)
    entries = {ours: tensor for ours, tensor in file.tensors.items() if isinstance(tensor, TensorEntry)}
    values = read_entries(list(entries.values()))
    state = {names(ours): values[entry.name] for ours, entry in entries.items()}
    for ours, weight in file.packed.items():
        state[names(ours)] = torch.empty(weight.shape, device="meta")
        sources[id(state[names(ours)])] = weight
    text_encoders.name_embedding(state)
    return state | tokenizer_tensors(file, state)


def _comfy_names(encoder: Encoder, clip_type: str) -> Any:
    """What ComfyUI expects a file to call a tensor. It renames Qwen3-VL itself, except for FLUX.2."""
    if not encoder.name.startswith("Qwen3-VL") or clip_type == "flux2":
        return lambda name: name
    prefixes = {"model": "model.language_model", "visual": "model.visual"}

    def theirs(name: str) -> str:
        first, _, rest = name.partition(".")
        return f"{prefixes.get(first, first)}.{rest}" if rest else name

    return theirs


def _require_4bit_or_plain(file: EncoderFile) -> None:
    scales = next((name for name in file.tensors if name.endswith(COMPANIONS)), None)
    if scales is not None:
        raise CheckpointError(
            file.path,
            f"{scales}: a text encoder in a format of ComfyUI's own. Load it with 'CLIPLoader' or 'DualCLIPLoader', "
            "and stream it with 'Stream Text Encoder'.",
        )


def _adopt(
    files: Sequence[EncoderFile], clip: comfy.sd.CLIP, states: Sequence[State], sources: Mapping[int, Weight4bit]
) -> dict[Linear4bit, TransformerTensor]:
    """Put a `Linear4bit` without memory in the place of each Linear whose weight is packed."""
    weights: dict[Linear4bit, TransformerTensor] = {}
    packed = {name: sources[id(value)] for state in states for name, value in state.items() if id(value) in sources}
    with torch.inference_mode(False), torch.no_grad():
        for part in text_encoders.transformers_of(clip).values():
            modules = dict(part.named_modules())
            for name in _names_in(modules, packed):
                path = name.removesuffix(".weight")
                replaced, tensor = modules[path], TransformerTensor((packed.pop(name),))
                linear = Linear4bit(tensor.held, bias=False, dtype=replaced.weight.dtype, device=torch.device("meta"))
                linear.bias = replaced.bias
                parent, _, child = path.rpartition(".")
                setattr(modules[parent], child, linear)
                weights[linear] = tensor
    unknown = sorted(packed, key=natural_key)
    if unknown:
        raise CheckpointError(files[0].path, f"{unknown[0]}: ComfyUI's text encoder has no such Linear.")
    return weights


def _names_in(modules: Mapping[str, nn.Module], names: Iterable[str]) -> list[str]:
    return [name for name in names if isinstance(modules.get(name.removesuffix(".weight")), _Operations.Linear)]
