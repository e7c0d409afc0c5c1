"""The text encoders that this package loads in 4 bits, in one table: names of their tensors, and what they are for.

The names in files of transformers depend on its version: those of a language model begin with ``model.``,
``language_model.model.`` or ``model.language_model.``. In this package a tensor has the name of ComfyUI's model, which
begins with ``model.``, ``visual.`` or ``lm_head.`` (T5 and CLIP have the same names in both). Knows neither torch nor
ComfyUI.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_Shapes = Mapping[str, tuple[int, ...]]

_RENAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("model.lm_head.", "lm_head."),
)
"""Beginnings of names in files, and what replaces each. The first one that fits counts."""

_BARE = ("layers.", "embed_tokens.", "norm.")
"""Beginnings in a file of the language model alone (``Qwen3Model``), whose names have no prefix."""

_NOT_READ = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")
"""The part of Mistral 3 that sees pictures. ComfyUI's model lacks it."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """One text encoder.

    Attributes:
        name: As people call it.
        types: ComfyUI's CLIP types that it encodes prompts for, and the module of ``comfy.text_encoders`` that each
            type needs for this encoder.
        layers: Its lists of layers, and the kind of each list's layers.
        first_layer: A tensor that its files have, and files of other encoders lack.
        width: Features of its hidden states; None if ``first_layer`` is enough to recognise it.
        without: The beginning of names that its files lack; "" for none.
        depth: How many layers are used; None for all. The others are not read.
        unused: Beginnings of names that ComfyUI's model lacks. They are not read either.
    """

    name: str
    types: Mapping[str, str]
    layers: Mapping[str, str]
    first_layer: str
    width: int | None = None
    without: str = ""
    depth: int | None = None
    unused: tuple[str, ...] = ()

    def is_in(self, shapes: _Shapes) -> bool:
        """Whether these logical shapes, by ComfyUI's names, are those of this encoder."""
        if self.first_layer not in shapes:
            return False
        if self.without and any(name.startswith(self.without) for name in shapes):
            return False
        return self.width is None or shapes.get(_WIDTH) == (self.width,)

    def is_read(self, name: str) -> bool:
        """Whether the model computes with the tensor ``name``."""
        if name.startswith(self.unused):
            return False
        layer = self.layer_of(name)
        return layer is None or self.depth is None or layer[1] < self.depth

    def layer_of(self, name: str) -> tuple[str, int, str] | None:
        """Of the tensor ``name``: the list and number of its layer, and its name there; None if it is in no layer."""
        match = _LAYER.match(name)
        if match is None or match["blocks"] not in self.layers:
            return None
        return match["blocks"], int(match["index"]), match["name"]


_LAYER = re.compile(r"(?P<blocks>.+?)\.(?P<index>\d{1,6})\.(?P<name>.+)")
_WIDTH = "model.layers.0.post_attention_layernorm.weight"
_QUERY_NORM = "model.layers.0.self_attn.q_norm.weight"
_TEXT = "text"
_LANGUAGE = {"model.layers": _TEXT}
_WITH_VISION = _LANGUAGE | {"visual.blocks": "vision", "visual.deepstack_merger_list": "vision"}
_DEEPSTACK = "visual.deepstack_merger_list.0.norm.weight"

ENCODERS: tuple[Encoder, ...] = (
    Encoder(
        "T5-XXL",
        {
            "flux": "flux.flux_clip",
            "sd3": "sd3_clip.sd3_clip",
            "chroma": "pixart_t5.pixart_te",
            "pixart": "pixart_t5.pixart_te",
            "ltxv": "lt.ltxv_te",
            "mochi": "genmo.mochi_te",
        },
        {"encoder.block": _TEXT},
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    ),
    Encoder(
        "CLIP-L",
        {"flux": "flux.flux_clip", "sd3": "sd3_clip.sd3_clip"},
        {"text_model.encoder.layers": _TEXT},
        "text_model.encoder.layers.0.mlp.fc1.weight",
    ),
    Encoder(
        "Mistral 3",
        {"flux2": "flux.flux2_te"},
        _LANGUAGE,
        _WIDTH,
        5120,
        without=_QUERY_NORM,
        depth=30,  # FLUX.2 uses the outputs of layers up to this one
        unused=("lm_head.",),
    ),
    Encoder("Qwen3-VL 4B", {"krea2": "krea2.te", "flux2": "flux.klein_te"}, _WITH_VISION, _DEEPSTACK, 2560),
    Encoder(
        "Qwen3-VL 8B", {"ideogram4": "ideogram4.te_qwen3vl", "flux2": "flux.klein_te"}, _WITH_VISION, _DEEPSTACK, 4096
    ),
    Encoder("Qwen3 4B", {"flux2": "flux.klein_te", "lumina2": "z_image.te"}, _LANGUAGE, _QUERY_NORM, 2560),
    Encoder("Qwen3 8B", {"flux2": "flux.klein_te", "ideogram4": "ideogram4.te"}, _LANGUAGE, _QUERY_NORM, 4096),
    Encoder(
        "Qwen2.5-VL 7B",
        {"qwen_image": "qwen_image.te"},
        _WITH_VISION,
        "model.layers.0.self_attn.k_proj.bias",
        without=_QUERY_NORM,
        unused=("lm_head.",),
    ),
)
"""An encoder comes before those whose tensors its files have, too: a Qwen3-VL file has all tensors of a Qwen3 file."""


def encoder_name(name: str) -> str | None:
    """ComfyUI's name of the tensor that a file calls ``name``; None if ComfyUI's models lack it."""
    if name.startswith(_NOT_READ):
        return None
    for beginning, ours in _RENAMES:
        if name.startswith(beginning):
            return ours + name.removeprefix(beginning)
    return f"model.{name}" if name.startswith(_BARE) else name


def has_encoder(names: Iterable[str]) -> bool:
    """Whether a file with these names of tensors may be a text encoder of the table."""
    ours = {encoder_name(name) for name in names}
    return any(encoder.first_layer in ours for encoder in ENCODERS)


def prefix_not_read(names: Iterable[str]) -> str | None:
    """What the names of a text encoder of the table begin with in this file, if it is nothing that is known here."""
    first_layers = tuple(f".{encoder.first_layer}" for encoder in ENCODERS)
    name = next((name for name in names if name.endswith(first_layers)), None)
    if name is None:
        return None
    return next(name.removesuffix(first[1:]) for first in first_layers if name.endswith(first))


def detect_encoder(shapes: _Shapes) -> Encoder | None:
    """The text encoder with these logical shapes, by ComfyUI's names; None if it is not in the table."""
    return next((encoder for encoder in ENCODERS if encoder.is_in(shapes)), None)


def encoder_types() -> tuple[str, ...]:
    """All CLIP types of the encoders in the table."""
    return tuple(dict.fromkeys(kind for encoder in ENCODERS for kind in encoder.types))


def encoders_by_type() -> str:
    """The encoders of each CLIP type, for a tooltip: sentences such as "flux, sd3: T5-XXL, CLIP-L."."""
    types: dict[str, list[str]] = {}
    for kind in encoder_types():
        types.setdefault(", ".join(encoder.name for encoder in ENCODERS if kind in encoder.types), []).append(kind)
    return " ".join(f"{', '.join(kinds)}: {names}." for names, kinds in types.items())


def encoder_names() -> str:
    """The names of all encoders in the table, for messages."""
    *others, last = (encoder.name for encoder in ENCODERS)
    return f"{', '.join(others)} or {last}"
