"""What a safetensors file is that holds no 4-bit transformer of a known family, and which loader is right for it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ... import families
from ...families.encoders import encoder_names, has_encoder, prefix_not_read
from .header import Header, natural_key
from .quant_state import QUANT_STATE


@dataclass(frozen=True)
class _Facts:
    """What the rules ask about a file. ``kind`` is a model of another architecture, ``loader`` the right one for it."""

    header: Header
    found: families.Found | None
    kind: str
    loader: str

    @property
    def names(self) -> Iterable[str]:
        return self.header.tensors

    @property
    def is_4bit(self) -> bool:
        return any(QUANT_STATE in name for name in self.names)

    @property
    def is_known(self) -> bool:
        """Whether the transformer is of a family that can be loaded in some layout."""
        return self.found is not None and self.found.family.native.is_read

    @property
    def is_read(self) -> bool:
        """Whether it can be loaded in the layout that it has, once it is in 4 bits."""
        return self.found is not None and self.found.layout.is_read

    @property
    def is_native(self) -> bool:
        return self.found is not None and self.found.layout is self.found.family.native

    @property
    def family(self) -> str:
        return self.found.family.name if self.found is not None else ""

    @property
    def sample(self) -> str:
        """The dtype of a large weight, "" if the file has no such weight."""
        entry = self.header.tensors.get(self.sample_name)
        return entry.dtype if entry is not None else ""

    @property
    def sample_name(self) -> str:
        return f"{self.found.prefix}{self.found.layout.sample}.weight" if self.found is not None else ""


@dataclass(frozen=True)
class _Rule:
    """If ``is_it`` is true of a file, ``says`` returns what the file is and what to do with it, in sentences."""

    is_it: Callable[[_Facts], bool]
    says: Callable[[_Facts], str]


def what_else_it_is(header: Header) -> str:
    """Say what the file is and what to do with it, in sentences."""
    names = header.tensors
    kinds = (found for mark, *found in _OTHER_MODELS if any(re.search(mark, name) for name in names))
    kind, loader = next(kinds, ("", ""))
    facts = _Facts(header, families.detect(names), kind, loader)
    return next(rule.says(facts) for rule in _RULES if rule.is_it(facts))


def of_another_kind(names: Iterable[str]) -> str | None:
    """What a file of these tensors is and what to do with it, if no loader of ComfyUI's own takes their format, or if
    it is an addition to a model (which has blocks of the same names). Otherwise None.
    """
    names = list(names)
    return next((answer for is_it, answer in _OTHER_KINDS if any(map(is_it, names))), None)


_OTHER_KINDS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (
        lambda name: name.endswith((".qweight", ".wscales", ".wtscale")),
        "it is a nunchaku (SVDQuant) file, not bitsandbytes NF4 or FP4. Load it with 'Nunchaku FLUX DiT Loader' of the "
        "ComfyUI-nunchaku package.",
    ),
    (
        lambda name: name.endswith((".SCB", ".weight_format")),
        "its weights are 8-bit LLM.int8 of bitsandbytes ('.SCB' tensors), not NF4 or FP4. ComfyUI has no loader for "
        "it: pick an NF4 file, or an fp8 one with 'Load Checkpoint'.",
    ),
    (
        lambda name: bool(re.search(r"(^lora_|\.lora_|_lora\d*\.|\.lokr_|\.hada_|\.diff(_b)?$)", name)),
        "it is a LoRA, not a checkpoint. Put it into models/loras and load it with 'LoraLoaderModelOnly' on the MODEL.",
    ),
    (
        lambda name: bool(re.search(r"(^|\.)controlnet_", name)),
        "it is a ControlNet, not a checkpoint. Put it into models/controlnet and load it with 'Load ControlNet Model'.",
    ),
    (
        lambda name: bool(re.search(r"(^|\.)ip_adapter", name)),
        "it is an IP-adapter, not a checkpoint. Load it with the nodes of the package that it is made for, such as "
        "x-flux-comfyui, on the MODEL.",
    ),
)

_T5, _CLIP = "a T5 text encoder", "a CLIP text encoder"
_LANGUAGE_MODEL = "a language model (a text encoder)"
"""Mistral 3, Qwen3, Qwen2.5-VL and others, whose hidden states tell a transformer what to draw."""

_ENCODERS = (_T5, _CLIP, _LANGUAGE_MODEL)

_VAE = ("a VAE", "'Load VAE'")
_OTHER_MODELS = (
    (r"(^|\.)joint_blocks\.0\.", "a Stable Diffusion 3 model", "'Load Checkpoint'"),
    (r"^transformer_blocks\.0\.", "a model in the layout of diffusers", "a loader for that model"),
    (r"^(vae\.)?encoder\.down_blocks\.", *_VAE),
    (r"(^|\.)(input_blocks|down_blocks)\.", "a Stable Diffusion or SDXL model", "'Load Checkpoint'"),
    (r"(^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.", _T5, "'DualCLIPLoader' (type flux)"),
    (r"(^|\.)text_model\.encoder\.layers\.0\.", _CLIP, "'DualCLIPLoader' (type flux)"),
    (r"(^|\.)layers\.0\.(self_attn|mlp|input_layernorm)\.", _LANGUAGE_MODEL, "'Load CLIP' (folder text_encoders)"),
    (r"(^|\.)decoder\.conv_in\.weight$", *_VAE),
)


def _is_torchao(facts: _Facts) -> bool:
    return "tensor_names" in facts.header.metadata or any("_qdata" in name for name in facts.names)


def _is_in_comfyuis_format(facts: _Facts) -> bool:
    return any(name.endswith(".comfy_quant") for name in facts.names)


def _comfyuis_format(facts: _Facts) -> str:
    loader = facts.loader if facts.kind and not facts.found else _loader_of_dense(facts.names)
    return (
        "its weights are in a format of ComfyUI's own ('.comfy_quant' tensors: fp8, NVFP4 or others), not NF4 or FP4 "
        f"of bitsandbytes. Load it with {loader}, of a ComfyUI that is new enough."
    )


def _is_packed_without_state(facts: _Facts) -> bool:
    entry = facts.header.tensors.get(facts.sample_name)
    if not facts.is_read or entry is None:
        return False
    return entry.dtype in ("U8", "I8") or len(entry.shape) != 2 or entry.shape[1] == 1


def _packed_without_state(facts: _Facts) -> str:
    entry = facts.header.tensors[facts.sample_name]
    return (
        f"{entry.name} is packed ({entry.dtype} of shape {entry.shape}) but no quant state ('.weight{QUANT_STATE}nf4') "
        "says how to read it. The file was saved without it: download it again, or another one."
    )


def _dense_of_a_family(facts: _Facts) -> str:
    if len({entry.path for entry in facts.header.tensors.values()}) > 1:
        return _dense_shards(facts)
    dtype = f"{facts.sample} " if facts.sample else ""
    dense = f"it is a {facts.family} model with dense {dtype}weights, not in NF4 or FP4."
    if facts.found is not None and not facts.found.layout.is_comfyuis:
        return (
            f"{dense} ComfyUI does not load it in the names of {facts.found.layout.name}: make an NF4 file of it with "
            "commands/quantise.py."
        )
    stream = f"Load it with {_loader_of_dense(facts.names)} and stream it with 'Stream Model Blocks'"
    if not facts.is_known:
        return f"{dense} {stream}."
    return f"{dense} {stream}, or make an NF4 file of it with the node 'Quantise Flux to NF4 and Save'."


def _dense_shards(facts: _Facts) -> str:
    if not facts.is_known:
        return f"it is one of the shards of a dense {facts.family} model, which ComfyUI does not load. Join them first."
    return (
        f"it is one of the shards of a dense {facts.family} model, which ComfyUI does not load. Make an NF4 file of "
        "all of them with commands/quantise.py, which takes their folder."
    )


def _dense_in_unread_layout(facts: _Facts) -> str:
    return f"it is {_in_layout(facts)}, dense. Load it with a loader for that model."


def _4bit_in_unread_layout(facts: _Facts) -> str:
    assert facts.found is not None
    native = facts.found.family.native
    return (
        f"it is {_in_layout(facts)}, in 4 bits of bitsandbytes. Of that model this node loads files in the names of "
        f"{native.name} ('{native.marks[-1]}*'), the transformer alone: pick one of those."
    )


def _in_layout(facts: _Facts) -> str:
    return f"a {facts.family} model in the layout of {facts.found.layout.name if facts.found else 'nobody'}"


def _has_another_prefix(facts: _Facts) -> bool:
    return facts.found is None and families.prefix_not_read(facts.names) is not None


def _another_prefix(facts: _Facts) -> str:
    prefix, family = families.prefix_not_read(facts.names) or ("", families.FLUX1)
    return (
        f"the names of its {family.name} transformer begin with '{prefix}', which no loader knows. Save the file again "
        f"without that prefix, or with '{families.CHECKPOINT_PREFIX}' in its place."
    )


def _4bit_encoder(_: _Facts) -> str:
    return (
        f"it is a text encoder in 4 bits, and no transformer. If it is {encoder_names()}, put it into "
        "models/text_encoders and load it with 'Load 4-bit Text Encoder (streamed)'."
    )


def _4bit_encoder_with_prefix(facts: _Facts) -> str:
    prefix = prefix_not_read(facts.names)
    return (
        f"it is {facts.kind} in 4 bits, whose names begin with '{prefix}', which no loader knows. Save the file again "
        "without that prefix."
    )


def _4bit_of_another_model(facts: _Facts) -> str:
    what = facts.kind or (f"a {facts.family} model" if facts.found else "")
    sample = ", ".join(sorted(facts.names, key=natural_key)[:3])
    return (
        f"it is a bitsandbytes 4-bit file, but not of a model that this node loads ({families.names()}): "
        f"{f'it is {what}' if what else f'its first names are {sample}'}. Use a loader for that model."
    )


def _another_model(facts: _Facts) -> str:
    return f"it is {facts.kind}, not a transformer of {families.names()}. Load it with {facts.loader}."


def _nothing_known(facts: _Facts) -> str:
    mark = families.FLUX1.native.marks[0]
    return (
        f"it holds no transformer of {families.names()} (such as '{mark}*'). Pick an NF4 or FP4 file such as "
        "flux1-dev-bnb-nf4-v2.safetensors."
    )


def _loader_of_dense(names: Iterable[str]) -> str:
    all_in_one = any(name.startswith("text_encoders.") for name in names)
    loader, folder = ("Load Checkpoint", "checkpoints") if all_in_one else ("Load Diffusion Model", "diffusion_models")
    return f"'{loader}' (folder {folder})"


_RULES = (
    _Rule(lambda facts: of_another_kind(facts.names) is not None, lambda facts: of_another_kind(facts.names) or ""),
    _Rule(
        _is_torchao,
        lambda _: (
            "its weights are quantised by torchao, not by bitsandbytes to NF4 or FP4. ComfyUI has no loader for it: "
            "pick an NF4 file, or an fp8 one with 'Load Diffusion Model'."
        ),
    ),
    _Rule(_has_another_prefix, _another_prefix),
    _Rule(_is_in_comfyuis_format, _comfyuis_format),
    _Rule(_is_packed_without_state, _packed_without_state),
    _Rule(lambda facts: facts.is_read or (facts.is_native and not facts.is_4bit), _dense_of_a_family),
    _Rule(lambda facts: facts.is_known and not facts.is_4bit, _dense_in_unread_layout),
    _Rule(lambda facts: facts.is_known, _4bit_in_unread_layout),
    _Rule(lambda facts: facts.is_4bit and has_encoder(facts.names), _4bit_encoder),
    _Rule(
        lambda facts: facts.is_4bit and facts.kind in _ENCODERS and prefix_not_read(facts.names) is not None,
        _4bit_encoder_with_prefix,
    ),
    _Rule(lambda facts: facts.is_4bit, _4bit_of_another_model),
    _Rule(lambda facts: bool(facts.kind), _another_model),
    _Rule(lambda _: True, _nothing_known),
)
"""The first rule that applies answers."""
