"""Configurations of ComfyUI's model classes that several cases of `model_families` share."""

from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams
from model_case import known, t

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "use_linear_in_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
}
FLUX = known(
    FluxParams,
    {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "vec_in_dim": 32,
        "context_in_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 3,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    },
)
TEXT = {"c_crossattn": t(1, 8, 32)}
FLUX_INPUTS = {**TEXT, "y": t(1, 32), "guidance": t(1)}
WAN = {
    "dim": 128,
    "ffn_dim": 128,
    "num_heads": 2,
    "num_layers": 5,
    "text_dim": 32,
    "text_len": 8,
    "freq_dim": 32,
    "in_dim": 16,
    "out_dim": 16,
    "patch_size": (1, 2, 2),
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
CLIP_VISION = t(1, 257, 1280)
VIDEO = (1, 16, 2, 8, 8)
HUNYUAN = known(
    HunyuanVideoParams,
    {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "vec_in_dim": 32,
        "axes_dim": [8, 12, 12],
        "meanflow": False,
        "context_in_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 3,
        "theta": 256,
        "qkv_bias": True,
        "byt5": False,
        "guidance_embed": False,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
    },
)
COSMOS = {
    "max_img_h": 16,
    "max_img_w": 16,
    "max_frames": 8,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "num_blocks": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 32,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False,
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 32,
}
LUMINA = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 2,
    "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512],
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 32,
}
CHROMA = known(
    ChromaParams,
    {
        **{key: FLUX[key] for key in ("context_in_dim", "hidden_size", "mlp_ratio", "num_heads", "axes_dim", "theta")},
        "qkv_bias": True,
        "depth": 2,
        "depth_single_blocks": 3,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "in_dim": 64,
        "out_dim": 64,
        "hidden_dim": 64,
        "n_layers": 2,
        "txt_ids_dims": [],
        "vec_in_dim": None,
    },
)
QWEN = {
    "in_channels": 64,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
QWEN_INPUTS = {**TEXT, "attention_mask": t(1, 8, ones=True)}

AUDIO = {
    "io_channels": 16,
    "embed_dim": 64,
    "cond_token_dim": 32,
    "global_cond_dim": 32,
    "project_cond_tokens": False,
    "depth": 3,
    "num_heads": 2,
}
PIXELDIT = {
    "num_groups": 2,
    "hidden_size": 64,
    "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 32,
    "pixel_num_groups": 2,
    "patch_depth": 3,
    "pixel_depth": 1,
    "patch_size": 8,
    "txt_embed_dim": 32,
    "txt_max_length": 8,
}
