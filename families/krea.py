"""Krea 2: one list of blocks, and before them a small transformer that merges the outputs of the text encoder's layers.

ComfyUI has the names of Krea's code. The mapping to diffusers' names is from its ``loaders/single_file_utils.py``
(``convert_krea2_transformer_checkpoint_to_diffusers``).
"""

from .family import Family, Layers, Layout

_ATTENTION_AND_MLP: Layers = {
    "prenorm.scale": ("norm1.weight",),
    "postnorm.scale": ("norm2.weight",),
    "attn.wq": ("attn.to_q",),
    "attn.wk": ("attn.to_k",),
    "attn.wv": ("attn.to_v",),
    "attn.gate": ("attn.to_gate",),
    "attn.wo": ("attn.to_out.0",),
    "attn.qknorm.qnorm.scale": ("attn.norm_q.weight",),
    "attn.qknorm.knorm.scale": ("attn.norm_k.weight",),
    "mlp.gate": ("ff.gate",),
    "mlp.up": ("ff.up",),
    "mlp.down": ("ff.down",),
}
_REST: Layers = {
    "first": ("img_in",),
    "tmlp.0": ("time_embed.linear_1",),
    "tmlp.2": ("time_embed.linear_2",),
    "tproj.1": ("time_mod_proj",),
    "txtmlp.0.scale": ("txt_in.norm.weight",),
    "txtmlp.1": ("txt_in.linear_1",),
    "txtmlp.3": ("txt_in.linear_2",),
    "txtfusion.projector": ("text_fusion.projector",),
    "last.linear": ("final_layer.linear",),
    "last.norm.scale": ("final_layer.norm.weight",),
    "last.modulation.lin": ("final_layer.scale_shift_table",),
}

KREA2 = Family(
    "Krea 2",
    frozenset({"krea2"}),
    {"blocks": "blocks"},
    (
        Layout("Krea", ("txtfusion.", "blocks.0.attn.wq."), "blocks.0.mlp.up"),
        Layout(
            "diffusers",
            ("text_fusion.", "transformer_blocks.0.attn.to_gate."),
            "transformer_blocks.0.ff.up",
            {
                "transformer_blocks": "blocks",
                "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
                "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
            },
            {
                "": _REST,
                "blocks": {**_ATTENTION_AND_MLP, "mod.lin": ("scale_shift_table",)},
                "txtfusion.layerwise_blocks": _ATTENTION_AND_MLP,
                "txtfusion.refiner_blocks": _ATTENTION_AND_MLP,
            },
            flattened=frozenset({"mod.lin"}),
            is_comfyuis=False,
        ),
    ),
    ("first.weight", "last.linear.weight"),
    since=lambda _: "0.26.0",
)
