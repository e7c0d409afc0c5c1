"""Flux.1 and its relatives: models of double and single blocks.

ComfyUI's models have the names of Black Forest Labs' code. diffusers has other names. Where ComfyUI has one weight for
q, k, v and the MLP's input, stacked row-wise, diffusers has one weight for each; and it has the two halves of the last
modulation in the other order. The mapping is from diffusers' ``loaders/single_file_utils.py``
(``convert_flux_transformer_checkpoint_to_diffusers``, ``convert_flux2_transformer_checkpoint_to_diffusers``).
"""

from .family import Family, Layers, Layout, Modulation, Shapes

_LISTS = {"double_blocks": "double", "single_blocks": "single"}
_LISTS_OF_DIFFUSERS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
_BESIDE_BLOCKS = ("img_in.weight", "final_layer.linear.weight")
_RENAMES = {"_norm.weight": "_norm.scale"}
"""Most files call the tensor of an RMSNorm of q or k ``.scale``, some call it ``.weight``."""

_NATIVE = "Black Forest Labs"
_DIFFUSERS = "diffusers"
_QKV = "double_blocks.0.img_attn.qkv"

_SWAPPED = frozenset({"final_layer.adaLN_modulation.1"})
"""In diffusers the scale comes before the shift."""

_REST: Layers = {
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
_DOUBLE: Layers = {
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
_SINGLE: Layers = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}

_REST_2: Layers = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_DOUBLE_2: Layers = {
    **{ours: theirs for ours, theirs in _DOUBLE.items() if "_attn." in ours},
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_SINGLE_2: Layers = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}

_INPUT_CHANNELS = {64: "", 128: " (Canny or Depth)", 384: " (Fill)"}


def _flux1_variant(shapes: Shapes) -> str:
    inputs = shapes.get("img_in.weight", (0, 0))[1]
    guidance = "dev" if "guidance_in.in_layer.weight" in shapes else "schnell"
    return f"{guidance}{_INPUT_CHANNELS.get(inputs, f' ({inputs} input channels)')}"


FLUX1 = Family(
    "Flux.1",
    frozenset({"flux"}),
    _LISTS,
    (
        Layout(_NATIVE, ("double_blocks.0.",), _QKV),
        Layout(
            _DIFFUSERS,
            ("single_transformer_blocks.0.proj_mlp.",),  # other models of diffusers have transformer_blocks, too
            "single_transformer_blocks.0.proj_mlp",
            _LISTS_OF_DIFFUSERS,
            {"": _REST, "double_blocks": _DOUBLE, "single_blocks": _SINGLE},
            _SWAPPED,
        ),
    ),
    _BESIDE_BLOCKS,
    _RENAMES,
    _flux1_variant,
    modulation=Modulation(
        {"double_blocks": ("img_mod", "txt_mod"), "single_blocks": ("modulation",)},
        timestep="time_in",
        embedding="timestep_embedding",
        others=("guidance_in", "vector_in"),
    ),
)

_FLUX2_SIZES = {6144: "dev", 4096: "klein 9B", 3072: "klein 4B"}
"""By the width of a token."""


def _flux2_variant(shapes: Shapes) -> str:
    return _FLUX2_SIZES.get(shapes.get("img_in.weight", (0, 0))[0], "")


def _flux2_since(shapes: Shapes) -> str:
    return "0.3.72" if _flux2_variant(shapes) == "dev" else "0.9.2"  # before, all had the heads of dev


FLUX2 = Family(
    "Flux 2",
    frozenset({"flux2"}),
    _LISTS,
    (
        Layout(_NATIVE, ("double_stream_modulation_img.lin.", "double_blocks.0."), _QKV),
        Layout(
            _DIFFUSERS,
            ("double_stream_modulation_img.linear.", "single_transformer_blocks.0."),
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            _LISTS_OF_DIFFUSERS,
            {"": _REST_2, "double_blocks": _DOUBLE_2, "single_blocks": _SINGLE_2},
            _SWAPPED,
            is_comfyuis=False,
        ),
    ),
    _BESIDE_BLOCKS,
    _RENAMES,
    _flux2_variant,
    since=_flux2_since,
)

CHROMA = Family(
    "Chroma",
    frozenset({"chroma"}),
    _LISTS,
    (
        Layout(_NATIVE, ("distilled_guidance_layer.", "double_blocks.0."), _QKV),
        Layout(_DIFFUSERS, ("distilled_guidance_layer.", "single_transformer_blocks.0."), is_read=False),
    ),
    _BESIDE_BLOCKS,
    _RENAMES,
)

HUNYUAN_VIDEO = Family(
    "HunyuanVideo",
    frozenset({"hunyuan_video"}),
    _LISTS,
    (
        Layout(
            "Tencent",
            ("txt_in.individual_token_refiner.", "double_blocks.0."),
            "double_blocks.0.img_mlp.0",
            is_read=False,
        ),
    ),
    _BESIDE_BLOCKS,
)
"""It is in the table so that its dense files, whose blocks have Flux' names, are not taken for Flux."""
