"""Qwen-Image and Qwen-Image-Edit: one list of blocks, with the names of diffusers, which ComfyUI uses, too."""

from .family import Family, Layout

QWEN_IMAGE = Family(
    "Qwen-Image",
    frozenset({"qwen_image"}),
    {"transformer_blocks": "transformer_blocks"},
    (
        Layout(
            "diffusers",
            ("txt_norm.", "transformer_blocks.0.attn.add_q_proj.", "transformer_blocks.0.img_mod."),
            "transformer_blocks.0.img_mlp.net.0.proj",
        ),
    ),
    ("img_in.weight", "proj_out.weight"),
    embeddings=frozenset({"time_text_embed.addition_t_embedding.weight"}),
    told_by_config={"zero_cond_t": "__index_timestep_zero__"},  # Edit 2511 gives its input pictures timestep 0
)
