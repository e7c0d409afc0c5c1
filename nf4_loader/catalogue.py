"""What a checkpoint holds: its tensors grouped into transformer, text encoders and VAE.

The all-in-one layout (lllyasviel's flux1-dev-bnb-nf4 v1 and v2, and what Forge and others save alike):
Black Forest Labs' names under ``model.diffusion_model.`` or no prefix, any of the Linears packed,
``text_encoders.clip_l.``, ``text_encoders.t5xxl.`` and ``vae.`` beside them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError
from .header import Header, TensorEntry, natural_key, read_header
from .quant_state import QuantState, parse_quant_state

TRANSFORMER_PREFIX = "model.diffusion_model."
TEXT_ENCODERS_PREFIX = "text_encoders."
CLIP_L_PREFIX = TEXT_ENCODERS_PREFIX + "clip_l."
T5_PREFIX = TEXT_ENCODERS_PREFIX + "t5xxl."
VAE_PREFIX = "vae."

_QUANT_STATE = re.compile(r"(?P<weight>.+\.weight)\.quant_state\.bitsandbytes__(?P<type>\w+)$")
_QUANT_FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DAMAGED = "The file is damaged or was made by a tool that this node does not know."


@dataclass(frozen=True)
class Weight4bit:
    """One packed weight: how to read it, and where its bytes are."""

    state: QuantState
    packed: TensorEntry
    absmax: TensorEntry
    quant_map: TensorEntry
    nested_absmax: TensorEntry | None
    nested_map: TensorEntry | None


@dataclass(frozen=True)
class Catalogue:
    """The parts of one checkpoint.

    ``weights4bit`` and ``dense`` have the transformer's tensors by their Black Forest Labs names without
    prefix (``img_in.weight``); ``text_encoders`` and ``vae`` keep the file's full names.
    """

    header: Header
    weights4bit: Mapping[str, Weight4bit]
    dense: Mapping[str, TensorEntry]
    text_encoders: Mapping[str, TensorEntry]
    vae: Mapping[str, TensorEntry]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every transformer tensor as if nothing were packed, by name without prefix."""
        shapes: dict[str, tuple[int, ...]] = {name: weight.state.shape for name, weight in self.weights4bit.items()}
        shapes.update((name, entry.shape) for name, entry in self.dense.items())
        return shapes

    @property
    def t5_layers(self) -> int:
        """Number of T5 encoder layers in the file (24 in the real ones)."""
        block = re.compile(re.escape(T5_PREFIX) + r"transformer\.encoder\.block\.(\d+)\.")
        return len({match[1] for match in map(block.match, self.text_encoders) if match})


def read_catalogue(path: Path) -> Catalogue:
    """Read the header and the quant states of ``path`` and sort its tensors into parts.

    Raises:
        CheckpointError: the file is not a 4-bit Flux checkpoint (the message says which loader is right),
            or a quant state does not fit the bytes that it describes.
    """
    header = read_header(path)
    parts: dict[str, dict[str, TensorEntry]] = {"transformer": {}, "text_encoders": {}, "vae": {}}
    for name, entry in header.tensors.items():
        if name.startswith(TEXT_ENCODERS_PREFIX):
            parts["text_encoders"][name] = entry
        elif name.startswith(VAE_PREFIX):
            parts["vae"][name] = entry
        else:
            parts["transformer"][_norm_scale(name.removeprefix(TRANSFORMER_PREFIX))] = entry
    _refuse_what_is_not_4bit_flux(path, parts["transformer"], all_in_one=bool(parts["text_encoders"]))
    weights4bit, dense = _split_quantised(path, parts["transformer"])
    return Catalogue(header, weights4bit, dense, parts["text_encoders"], parts["vae"])


def require_all_in_one(catalogue: Catalogue) -> None:
    """Check that CLIP-L, T5 and VAE are in the file.

    Raises:
        CheckpointError: naming the parts that are missing and what to do.
    """
    parts = {
        "CLIP-L": any(name.startswith(CLIP_L_PREFIX) for name in catalogue.text_encoders),
        "T5-XXL": catalogue.t5_layers > 0,
        "VAE": bool(catalogue.vae),
    }
    missing = [part for part, present in parts.items() if not present]
    if missing:
        raise CheckpointError(
            catalogue.path,
            f"it has the Flux transformer but no {', no '.join(missing)} (looked for '{CLIP_L_PREFIX}*', "
            f"'{T5_PREFIX}*' and '{VAE_PREFIX}*'). This node gives MODEL, CLIP and VAE from one all-in-one file, such "
            "as flux1-dev-bnb-nf4-v2.safetensors: pick one of those. A UNet-only file needs a UNet-only NF4 loader, "
            "with 'DualCLIPLoader' (clip_l and t5xxl, type flux) and 'Load VAE' (ae.safetensors) beside it.",
        )


def _norm_scale(name: str) -> str:
    """The RMSNorms of q and k are ``.scale`` in most files and ``.weight`` in some."""
    return name.removesuffix(".weight") + ".scale" if name.endswith("_norm.weight") else name


def _refuse_what_is_not_4bit_flux(path: Path, transformer: Mapping[str, TensorEntry], all_in_one: bool) -> None:
    is_flux = any(name.startswith("double_blocks.0.") for name in transformer)
    if any(_QUANT_STATE.match(name) for name in transformer):
        if is_flux:
            return
        if any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in transformer):
            raise CheckpointError(
                path,
                "it is a 4-bit model with the tensor names of diffusers ('transformer_blocks.0...'). This node reads "
                "Black Forest Labs names ('double_blocks.0...'): pick an all-in-one file such as "
                "flux1-dev-bnb-nf4-v2.safetensors.",
            )
        sample = ", ".join(sorted(transformer, key=natural_key)[:3])
        raise CheckpointError(
            path,
            f"it is a bitsandbytes 4-bit file, but not of a Flux model: it has no 'double_blocks.0.*' (its first "
            f"names: {sample}). This node loads Flux only: use a loader for that model.",
        )
    if any(name.endswith((".SCB", ".weight_format")) for name in transformer):
        raise CheckpointError(
            path,
            "its weights are 8-bit LLM.int8 of bitsandbytes ('.SCB' tensors), not NF4 or FP4. ComfyUI has no loader "
            "for it: pick an NF4 file, or an fp8 one with 'Load Checkpoint'.",
        )
    if is_flux:
        weight = transformer.get("double_blocks.0.img_attn.qkv.weight")
        dtype = weight.dtype if weight else "unknown"
        loader = "'Load Checkpoint'" if all_in_one else "'Load Diffusion Model' (folder diffusion_models)"
        if weight and (weight.dtype in ("U8", "I8") or len(weight.shape) != 2 or weight.shape[1] == 1):
            raise CheckpointError(
                path,
                f"double_blocks.0.img_attn.qkv.weight is packed ({dtype} of shape {weight.shape}) but no quant state "
                "('.weight.quant_state.bitsandbytes__nf4') says how to read it. The file was saved without it: "
                "download it again, or another one.",
            )
        raise CheckpointError(
            path,
            f"it is a Flux model with dense {dtype} weights: no tensor ends in "
            f"'.weight.quant_state.bitsandbytes__nf4' or '__fp4'. Load it with {loader}.",
        )
    raise CheckpointError(
        path,
        "it holds no Flux transformer ('double_blocks.0.*' is missing), so it is no Flux checkpoint. Pick an NF4 "
        "all-in-one file such as flux1-dev-bnb-nf4-v2.safetensors; LoRAs, encoders and VAEs have their own loaders.",
    )


def _split_quantised(
    path: Path, transformer: Mapping[str, TensorEntry]
) -> tuple[dict[str, Weight4bit], dict[str, TensorEntry]]:
    states = {match["weight"]: name for name in transformer if (match := _QUANT_STATE.match(name))}
    weights4bit: dict[str, Weight4bit] = {}
    used: set[str] = set()
    with path.open("rb") as file:
        for weight, state_name in states.items():
            entry = transformer[state_name]
            file.seek(entry.offset)
            try:
                weights4bit[weight] = _weight4bit(transformer, weight, parse_quant_state(file.read(entry.nbytes)))
            except ValueError as error:
                raise CheckpointError(path, f"{weight}: {error}. {_DAMAGED}") from None
            used.update((weight, state_name), (f"{weight}.{field}" for field in _QUANT_FIELDS))
    dense = {name: entry for name, entry in transformer.items() if name not in used}
    for name, entry in dense.items():
        if name.endswith(".absmax") or (name.endswith(".weight") and entry.dtype in ("U8", "I8")):
            weight = name.removesuffix(".absmax")
            raise CheckpointError(
                path,
                f"{weight}: it is packed, but '{weight}.quant_state.bitsandbytes__nf4', which gives its shape, is not "
                f"in the file. {_DAMAGED}",
            )
    return weights4bit, dense


def _weight4bit(transformer: Mapping[str, TensorEntry], weight: str, state: QuantState) -> Weight4bit:
    wanted = {"packed": weight, "absmax": f"{weight}.absmax", "quant_map": f"{weight}.quant_map"}
    if state.nested is not None:
        wanted |= {"nested_absmax": f"{weight}.nested_absmax", "nested_map": f"{weight}.nested_quant_map"}
    found = {field: transformer.get(name) for field, name in wanted.items()}
    for field, entry in found.items():
        if entry is None:
            raise ValueError(f"'{wanted[field]}' is not in the file")
    entries = {field: entry for field, entry in found.items() if entry is not None}

    described = f"its quant state says {state.shape} in {state.quant_type} with blocksize {state.blocksize}"
    if entries["packed"].nbytes != state.packed_bytes:
        raise ValueError(
            f"{described}, which is {state.packed_bytes:,} bytes; the file has {entries['packed'].nbytes:,}"
        )
    absmax_dtype = "F32" if state.nested is None else "U8"
    _check_entry(described, "absmax", entries["absmax"], absmax_dtype, state.absmax_count)
    _check_entry(described, "quant_map", entries["quant_map"], "F32", 16)
    if state.nested is not None:
        nested_count = -(-state.absmax_count // state.nested.blocksize)
        _check_entry(described, "nested_absmax", entries["nested_absmax"], "F32", nested_count)
        _check_entry(described, "nested_quant_map", entries["nested_map"], "F32", 256)
    return Weight4bit(
        state,
        entries["packed"],
        entries["absmax"],
        entries["quant_map"],
        entries.get("nested_absmax"),
        entries.get("nested_map"),
    )


def _check_entry(described: str, field: str, entry: TensorEntry, dtype: str, count: int) -> None:
    found = 1
    for size in entry.shape:
        found *= size
    if found != count or entry.dtype != dtype:
        raise ValueError(
            f"{described}, which needs {count:,} {dtype} values of {field}; the file has {found:,} of {entry.dtype}"
        )
