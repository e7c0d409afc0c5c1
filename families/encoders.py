"""The text encoders that this package loads in 4 bits, in one table: names of their tensors, and what they are for.

Files of transformers call the tensors in several ways: by its version, a language model is ``model.``,
``language_model.model.`` or ``model.language_model.``. Here each has one name, that of ComfyUI's model: ``model.``,
``visual.`` and ``lm_head.`` (T5 and CLIP have the same names in both). Knows neither torch nor ComfyUI.
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
"""Beginnings of names, and ours. The first that fits counts."""

_BARE = ("layers.", "embed_tokens.", "norm.")
"""Beginnings in a file of the language model alone (``Qwen3Model``), whose names have no prefix."""

_NOT_READ = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")
"""What sees pictures in Mistral 3. ComfyUI's model has no such part."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """One text encoder.

    Attributes:
        name: As people call it.
        types: What it encodes prompts for: names of ComfyUI's CLIP types, each with what of ``comfy.text_encoders`` the
            type needs for this encoder.
        layers: Its lists of layers, and what the layers of each are called in a plan.
        first_layer: A tensor that only a file of such a model has.
        width: Of its hidden states; None where ``first_layer`` tells enough.
        without: The beginning of a name that a file of it does not have, "" for none.
        depth: How many layers are used; None is all. The others are not read.
        unused: Beginnings of names that ComfyUI's model does not have. They are not read either.
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
        """Whether these logical shapes, by our names, are of such a model."""
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
        """The list and the number of the layer that the tensor ``name`` is in, and its name there; None where it is in
        none."""
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
        depth=30,  # the last that FLUX.2 looks at
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
"""Those with more in them come first: a file of Qwen3-VL has all that one of Qwen3 has."""


def encoder_name(name: str) -> str | None:
    """Our name of the tensor that a file calls ``name``; None where no model of ComfyUI's has it."""
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


def detect_encoder(shapes: _Shapes) -> Encoder | None:
    """The text encoder of these logical shapes by our names; None where it is none that can be loaded."""
    return next((encoder for encoder in ENCODERS if encoder.is_in(shapes)), None)


def encoder_types() -> tuple[str, ...]:
    """All CLIP types that an encoder of the table is for."""
    return tuple(dict.fromkeys(kind for encoder in ENCODERS for kind in encoder.types))


def encoder_names() -> str:
    """Of all of them, for messages."""
    *others, last = (encoder.name for encoder in ENCODERS)
    return f"{', '.join(others)} or {last}"
