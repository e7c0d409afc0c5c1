"""The names that tools give a Flux transformer's tensors, and their names in Black Forest Labs' code.

ComfyUI's model has Black Forest Labs' names. diffusers has its own, splits q, k, v and the MLP's input, which lie one
below the other in one weight here, and has the two halves of the last modulation the other way round
(``diffusers.loaders.single_file_utils.convert_flux_transformer_checkpoint_to_diffusers`` is the way there).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Layout = Literal["Black Forest Labs", "diffusers"]

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "")
_MARKS: Mapping[Layout, str] = {
    "Black Forest Labs": "double_blocks.0.",
    "diffusers": "single_transformer_blocks.0.proj_mlp.",  # other models of diffusers have transformer_blocks, too
}

_OF_CHROMA = "distilled_guidance_layer."
"""diffusers' Chroma has the blocks of its Flux, and other names beside them, which have no place here."""

_Layers = Mapping[str, tuple[str, ...]]
"""Layers of Black Forest Labs, and the layers of diffusers whose rows make each, in order."""

_REST: _Layers = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_DOUBLE: _Layers = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE: _Layers = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_BLOCKS = {"transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE)}
_HALVES_SWAPPED = "final_layer.adaLN_modulation.1"
"""diffusers has the rows of scale, then those of shift; Black Forest Labs shift, then scale."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file goes: part ``part`` of the ``parts`` whose rows, one below the other, make ``name``."""

    name: str
    part: int = 0
    parts: int = 1
    halves_swapped: bool = False


def detect(names: Iterable[str]) -> tuple[str, Layout | None]:
    """The prefix of a Flux transformer's names in a file, and its layout; None where there is no such transformer."""
    names = list(names)
    for prefix in _PREFIXES:
        for layout, mark in _MARKS.items():
            is_chroma = layout == "diffusers" and any(name.startswith(prefix + _OF_CHROMA) for name in names)
            if not is_chroma and any(name.startswith(prefix + mark) for name in names):
                return prefix, layout
    return "", None


def place(layout: Layout | None, name: str) -> Place:
    """Where the tensor ``name`` (without prefix) goes; names that ``layout`` does not have stay as they are."""
    if layout == "diffusers":
        return _place_of_diffusers(name)
    # The RMSNorms of q and k are ``.scale`` in most files and ``.weight`` in some.
    return Place(name.removesuffix(".weight") + ".scale" if name.endswith("_norm.weight") else name)


def _place_of_diffusers(name: str) -> Place:
    layer, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return Place(name)
    if layer in _PLACES_OF_REST:
        found, inner = "", _PLACES_OF_REST[layer]
    elif (block := re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)) and block[3] in _PLACES.get(block[1], {}):
        found, inner = f"{_BLOCKS[block[1]][0]}.{block[2]}.", _PLACES[block[1]][block[3]]
    else:
        return Place(name)
    if inner.name.endswith("_norm"):
        kind = kind.replace("weight", "scale")
    return Place(f"{found}{inner.name}.{kind}", inner.part, inner.parts, inner.name == _HALVES_SWAPPED)


def _inverted(layers: _Layers) -> dict[str, Place]:
    return {
        theirs: Place(ours, part, len(parts)) for ours, parts in layers.items() for part, theirs in enumerate(parts)
    }


_PLACES_OF_REST = _inverted(_REST)
_PLACES = {theirs: _inverted(layers) for theirs, (_, layers) in _BLOCKS.items()}
