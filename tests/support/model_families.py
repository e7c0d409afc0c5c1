"""ComfyUI's model classes, each made small: a configuration, and the inputs of one forward.

`CASES` has one case for each class of diffusion model, and more where a family has inputs of its own (reference
latents, masks, control). Sizes are the least that the class takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams


@dataclass(frozen=True)
class Tensor:
    """A random input of this shape; whole numbers below ``below`` if that is given."""

    shape: tuple[int, ...]
    below: int | None = None
    ones: bool = False

    def make(self, generator):
        if self.ones:
            return torch.ones(self.shape)
        if self.below is not None:
            return torch.randint(0, self.below, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator) * 0.5


@dataclass(frozen=True)
class Case:
    """``supported`` is a class of ``comfy.supported_models``; ``stands_for`` are others that run the same model."""

    supported: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    inputs: dict[str, Any] = field(default_factory=dict)
    stands_for: tuple[str, ...] = ()
    state: Callable[[], dict[str, torch.Tensor]] = dict


def t(*shape, **kind):
    return Tensor(shape, **kind)


def made(value, generator):
    """``value`` with each `Tensor` in it made."""
    if isinstance(value, Tensor):
        return value.make(generator)
    if isinstance(value, dict):
        return {key: made(of, generator) for key, of in value.items()}
    return [made(of, generator) for of in value] if isinstance(value, list) else value


def is_there(case):
    return hasattr(comfy.supported_models, case.supported)


def known(parameters, config):
    """What of ``config`` this version's ``parameters`` have: some are newer."""
    return {key: value for key, value in config.items() if key in (*parameters.__dataclass_fields__, "image_model")}


def make_model(case):
    """ComfyUI's model of a case with random weights in fp32."""
    supported = getattr(comfy.supported_models, case.supported)
    config = supported({**supported.unet_config, **case.config})
    config.unet_config |= case.config  # some classes say themselves what their files do not tell
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = config.get_model(case.state(), "")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    # As ComfyUI makes models, in inference mode: torch multiplies in another order where a gradient might be wanted.
    return model.eval().requires_grad_(False)


def forward(model, case):
    """What the model says of a fixed latent."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(case.latent, generator=generator)
    inputs = made(case.inputs, generator)
    sigma = torch.full((case.latent[0],), 0.7)
    with torch.no_grad():
        return model.apply_model(latent, sigma, **inputs).clone()


def seconds():
    """What a file of Stable Audio has beside the model: how it tells a length."""
    from comfy.ldm.audio.embedders import NumberConditioner

    names = [f"conditioner.conditioners.seconds_{of}" for of in ("start", "total")]
    return {f"{name}.{key}": value for name in names for key, value in NumberConditioner(768).state_dict().items()}


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
    "rope_theta": 10000.0,
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

CASES = {
    "SD 1.5": Case(
        "SD15",
        UNET,
        (1, 4, 8, 8),
        TEXT,
        ("LotusD", "Stable_Zero123", "SD15_instructpix2pix", "SD20", "SD_X4Upscaler"),
    ),
    "SDXL": Case(
        "SDXL",
        {**UNET, "model_channels": 64, "num_classes": "sequential", "adm_in_channels": 32},
        (1, 4, 8, 8),
        {**TEXT, "y": t(1, 32)},
        (
            *("SD21UnclipL", "SD21UnclipH", "SDXL_instructpix2pix", "SDXLRefiner", "SSD1B", "KOALA_700M", "KOALA_1B"),
            "Segmind_Vega",
        ),
    ),
    "SVD": Case(
        "SVD_img2vid",
        {
            **UNET,
            "model_channels": 64,
            "in_channels": 8,
            "video_kernel_size": [3, 1, 1],
            "extra_ff_mix_layer": True,
            "merge_strategy": "learned_with_images",
            "merge_factor": 0.0,
            "num_classes": "sequential",
            "adm_in_channels": 32,
            "use_temporal_resblock": True,
            "use_temporal_attention": True,
        },
        (2, 4, 8, 8),
        {
            "c_crossattn": t(2, 8, 32),
            "y": t(2, 32),
            "c_concat": t(2, 4, 8, 8),
            "image_only_indicator": t(1, 2),
            "num_video_frames": 2,
        },
        ("SV3D_u", "SV3D_p"),
    ),
    "Stable Cascade C": Case(
        "Stable_Cascade_C",
        {
            "c_cond": 32,
            "c_hidden": [32, 32],
            "nhead": [2, 2],
            "blocks": [[1, 2], [2, 1]],
            "c_clip_text": 32,
            "c_clip_text_pooled": 32,
            "c_clip_img": 32,
        },
        (1, 16, 8, 8),
        {"clip_text": t(1, 8, 32), "clip_text_pooled": t(1, 1, 32), "clip_img": t(1, 1, 32), "sca": t(1), "crp": t(1)},
    ),
    "Stable Cascade B": Case(
        "Stable_Cascade_B",
        {
            "c_hidden": [32, 32, 32, 32],
            "nhead": [-1, -1, 2, 2],
            "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "c_cond": 32,
            "c_clip": 32,
        },
        (1, 4, 32, 32),
        {"effnet": t(1, 16, 8, 8), "clip": t(1, 1, 32), "sca": t(1)},
    ),
    "SD3": Case(
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "num_blocks": 2,
            "input_size": None,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 32, "out_features": 128},
            },
            "pos_embed_max_size": 8,
            "num_patches": 64,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
        },
        (1, 16, 8, 8),
        {**TEXT, "y": t(1, 32)},
    ),
    "AuraFlow": Case(
        "AuraFlow",
        {
            "max_seq": 64,
            "cond_seq_dim": 32,
            "n_layers": 4,
            "n_double_layers": 2,
            "dim": 64,
            "n_heads": 2,
            "global_conddim": 64,
        },
        (1, 4, 8, 8),
        TEXT,
    ),
    "PixArt": Case(
        "PixArtSigma",
        {
            "num_heads": 2,
            "patch_size": 2,
            "hidden_size": 64,
            "in_channels": 4,
            "depth": 3,
            "model_max_length": 8,
            "input_size": 32,
            "pe_interpolation": 1,
            "micro_condition": False,
            "caption_channels": 32,
        },
        (1, 4, 40, 40),
        TEXT,
        ("PixArtAlpha",),
    ),
    "Hunyuan-DiT": Case(
        "HunyuanDiT1",
        {
            "depth": 4,
            "hidden_size": 64,
            "num_heads": 2,
            "text_states_dim": 32,
            "text_states_dim_t5": 32,
            "text_len": 8,
            "text_len_t5": 8,
            "size_cond": True,
            "use_style_cond": True,
            "mlp_ratio": 2.0,
        },
        (1, 4, 8, 8),
        {
            **TEXT,
            "text_embedding_mask": t(1, 8, ones=True),
            "encoder_hidden_states_t5": t(1, 8, 32),
            "text_embedding_mask_t5": t(1, 8, ones=True),
            "image_meta_size": t(1, 6),
        },
        ("HunyuanDiT",),
    ),
    "Flux": Case("Flux", FLUX, (1, 4, 8, 8), FLUX_INPUTS, ("FluxInpaint",)),
    "Flux with a mask and reference latents": Case(
        "Flux",
        FLUX,
        (1, 4, 8, 8),
        {**FLUX_INPUTS, "attention_mask": t(1, 32, 32, ones=True), "ref_latents": [t(1, 4, 4, 8)]},
    ),
    "Flux with control": Case(
        "Flux",
        FLUX,
        (1, 4, 8, 8),
        {**FLUX_INPUTS, "control": {"input": [t(1, 16, 64), t(1, 16, 64)], "output": [t(1, 16, 64)] * 3}},
    ),
    "Flux schnell": Case("FluxSchnell", {**FLUX, "guidance_embed": False}, (1, 4, 8, 8), FLUX_INPUTS),
    "LongCat-Image": Case(
        "LongCatImage",
        known(FluxParams, {**FLUX, "guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}),
        (1, 4, 8, 8),
        TEXT,
    ),
    "Flux 2": Case(
        "Flux2",
        known(
            FluxParams,
            {
                **FLUX,
                "image_model": "flux2",
                "axes_dim": [8, 8, 8, 8],
                "patch_size": 1,
                "in_channels": 16,
                "out_channels": 16,
                "vec_in_dim": None,
                "global_modulation": True,
                "mlp_silu_act": True,
                "qkv_bias": False,
                "ops_bias": False,
                "default_ref_method": "index",
                "ref_index_scale": 10.0,
                "txt_ids_dims": [3],
            },
        ),
        (1, 16, 8, 8),
        {**TEXT, "guidance": t(1), "ref_latents": [t(1, 16, 4, 4)]},
    ),
    "Chroma": Case("Chroma", CHROMA, (1, 4, 8, 8), {**TEXT, "guidance": t(1)}),
    "Chroma Radiance": Case(
        "ChromaRadiance",
        known(
            ChromaRadianceParams,
            {
                **CHROMA,
                "in_channels": 3,
                "out_channels": 3,
                "patch_size": 4,
                "nerf_hidden_size": 16,
                "nerf_mlp_ratio": 2,
                "nerf_depth": 5,
                "nerf_max_freqs": 4,
                "nerf_tile_size": 512,
                "nerf_final_head_type": "conv",
                "nerf_embedder_dtype": torch.float32,
                "use_x0": False,
                "use_sequential_txt_ids": False,
            },
        ),
        (1, 3, 16, 16),
        {**TEXT, "guidance": t(1)},
    ),
    "Mochi": Case(
        "GenmoMochi",
        {
            "depth": 5,
            "patch_size": 2,
            "num_heads": 2,
            "hidden_size_x": 64,
            "hidden_size_y": 32,
            "mlp_ratio_x": 192.0,
            "mlp_ratio_y": 2.0,
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "patch_embed_bias": True,
            "posenc_preserve_area": True,
            "timestep_mlp_bias": True,
            "attend_to_padding": False,
            "timestep_scale": 1000.0,
            "use_t5": True,
            "t5_feat_dim": 32,
            "t5_token_length": 8,
            "rope_theta": 10000.0,
        },
        (1, 12, 2, 8, 8),
        {**TEXT, "attention_mask": t(1, 8, ones=True), "num_tokens": 8},
    ),
    "LTX-Video": Case(
        "LTXV",
        {
            "in_channels": 16,
            "cross_attention_dim": 64,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_channels": 32,
            "num_layers": 3,
        },
        (1, 16, 2, 4, 4),
        {**TEXT, "attention_mask": t(1, 8, ones=True), "frame_rate": 25},
    ),
    "HunyuanVideo": Case(
        "HunyuanVideo",
        HUNYUAN,
        VIDEO,
        {**TEXT, "y": t(1, 32), "attention_mask": t(1, 8, ones=True)},
        ("HunyuanVideoSkyreelsI2V", "HunyuanVideoI2V"),
    ),
    "HunyuanVideo with control": Case(
        "HunyuanVideo",
        HUNYUAN,
        VIDEO,
        {**TEXT, "y": t(1, 32), "control": {"input": [t(1, 32, 64)] * 2, "output": [t(1, 32, 64)] * 3}},
    ),
    "HunyuanVideo 1.5": Case(
        "HunyuanVideo15",
        known(
            HunyuanVideoParams,
            {
                **HUNYUAN,
                "vec_in_dim": None,
                "vision_in_dim": 32,
                "meanflow_sum": True,
                "byt5": True,
                "use_cond_type_embedding": True,
            },
        ),
        VIDEO,
        {**TEXT, "clip_fea": t(1, 4, 32), "txt_byt5": t(1, 4, 1472)},
        ("HunyuanVideo15_SR_Distilled",),
    ),
    "HunyuanImage 2.1": Case(
        "HunyuanImage21",
        {**HUNYUAN, "patch_size": [1, 1], "axes_dim": [16, 16], "vec_in_dim": None, "byt5": True},
        (1, 16, 8, 8),
        {**TEXT, "txt_byt5": t(1, 4, 1472)},
        ("HunyuanImage21Refiner",),
    ),
    "Cosmos": Case(
        "CosmosT2V",
        {
            **COSMOS,
            "block_config": "FA-CA-MLP",
            "block_x_format": "THWBD",
            "affline_emb_norm": True,
            "extra_per_block_abs_pos_emb": True,
            "extra_per_block_abs_pos_emb_type": "learnable",
        },
        VIDEO,
        {**TEXT, "fps": t(1)},
        ("CosmosI2V",),
    ),
    "Cosmos Predict 2": Case(
        "CosmosT2IPredict2",
        {**COSMOS, "rope_enable_fps_modulation": False},
        VIDEO,
        TEXT,
        ("CosmosI2VPredict2",),
    ),
    "Lumina 2": Case(
        "Lumina2",
        LUMINA,
        (1, 16, 8, 8),
        {**TEXT, "attention_mask": t(1, 8, ones=True), "num_tokens": 8},
    ),
    "Z-Image": Case(
        "ZImage",
        {
            **LUMINA,
            "n_kv_heads": 4,
            "dim": 256,
            "n_heads": 4,
            "axes_dims": [16, 24, 24],
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 8,
        },
        (1, 16, 8, 8),
        {**TEXT, "num_tokens": 8},
    ),
    "Wan": Case("WAN21_T2V", WAN, VIDEO, TEXT, ("WAN22_T2V", "WAN21_FlowRVS")),
    "Wan image to video": Case(
        "WAN21_I2V",
        {**WAN, "in_dim": 36},
        VIDEO,
        {**TEXT, "c_concat": t(1, 20, 2, 8, 8), "clip_fea": CLIP_VISION},
        ("WAN21_FunControl2V",),
    ),
    "Wan with a reference": Case(
        "WAN21_FunControl2V",
        {**WAN, "in_dim": 48, "in_dim_ref_conv": 16},
        VIDEO,
        {**TEXT, "c_concat": t(1, 32, 2, 8, 8), "clip_fea": CLIP_VISION, "reference_latent": t(1, 16, 8, 8)},
    ),
    "Wan causal": Case("WAN21_CausalAR_T2V", WAN, VIDEO, TEXT),
    "Wan VACE": Case(
        "WAN21_Vace",
        {**WAN, "vace_in_dim": 96, "vace_layers": 3, "num_layers": 6},
        VIDEO,
        {**TEXT, "vace_context": t(1, 1, 96, 2, 8, 8), "vace_strength": [1.0]},
    ),
    "Wan Camera": Case(
        "WAN22_Camera",
        {**WAN, "in_dim": 36},
        VIDEO,
        {**TEXT, "c_concat": t(1, 20, 2, 8, 8), "camera_conditions": t(1, 24, 2, 64, 64)},
        ("WAN21_Camera",),
    ),
    "Wan S2V": Case(
        "WAN22_S2V",
        {**WAN, "audio_dim": 32, "audio_inject_layers": [0, 2]},
        VIDEO,
        {**TEXT, "audio_embed": t(1, 25, 32, 8), "reference_latent": t(1, 16, 1, 8, 8)},
    ),
    "Wan HuMo": Case(
        "WAN21_HuMo",
        {**WAN, "in_dim": 36},
        VIDEO,
        {**TEXT, "c_concat": t(1, 20, 2, 8, 8), "audio_embed": t(1, 2, 8, 5, 1280)},
    ),
    "Wan Animate": Case(
        "WAN22_Animate",
        {**WAN, "in_dim": 36},
        VIDEO,
        {**TEXT, "c_concat": t(1, 20, 2, 8, 8), "clip_fea": CLIP_VISION, "pose_latents": t(1, 16, 1, 8, 8)},
    ),
    "Wan SCAIL": Case(
        "WAN21_SCAIL",
        {**WAN, "in_dim": 20},
        VIDEO,
        {**TEXT, "c_concat": t(1, 4, 2, 8, 8), "clip_fea": CLIP_VISION, "pose_latents": t(1, 20, 2, 4, 4)},
    ),
    "Hunyuan3D 2": Case(
        "Hunyuan3Dv2",
        {
            "in_channels": 16,
            "context_in_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 3,
        },
        (1, 16, 32),
        TEXT,
        ("Hunyuan3Dv2mini",),
    ),
    "Hunyuan3D 2.1": Case(
        "Hunyuan3Dv2_1",
        {
            "in_channels": 16,
            "context_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "depth": 4,
            "num_moe_layers": 2,
            "num_experts": 2,
            "guidance_cond_proj_dim": None,
        },
        (2, 16, 32),
        {"c_crossattn": t(2, 8, 32)},
    ),
    "HiDream": Case(
        "HiDream",
        {
            "attention_head_dim": 32,
            "axes_dims_rope": [16, 8, 8],
            "caption_channels": [32, 32],
            "max_resolution": [16, 16],
            "in_channels": 16,
            "llama_layers": [0, 1, 2, 3],
            "num_attention_heads": 2,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "num_layers": 2,
            "num_single_layers": 2,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": 32,
        },
        (1, 16, 8, 8),
        {**TEXT, "y": t(1, 32), "encoder_hidden_states_llama3": t(1, 4, 8, 32)},
    ),
    "ACE-Step": Case(
        "ACEStep",
        {
            "attention_head_dim": 32,
            "in_channels": 8,
            "inner_dim": 64,
            "max_height": 16,
            "max_position": 128,
            "max_width": 128,
            "mlp_ratio": 2.0,
            "num_attention_heads": 2,
            "num_layers": 3,
            "out_channels": 8,
            "patch_size": [16, 1],
            "rope_theta": 1000000.0,
            "speaker_embedding_dim": 16,
            "text_embedding_dim": 32,
            "ssl_encoder_depths": [2, 2],
            "ssl_latent_dims": [32, 32],
            "lyric_encoder_vocab_size": 50,
            "lyric_hidden_size": 1024,
        },
        (1, 8, 16, 16),
        {**TEXT, "speaker_embeds": t(1, 16), "lyric_token_idx": t(1, 8, below=50), "lyrics_strength": 1.0},
    ),
    "OmniGen 2": Case(
        "Omnigen2",
        {
            "axes_dim_rope": [8, 12, 12],
            "axes_lens": [64, 64, 64],
            "ffn_dim_multiplier": None,
            "hidden_size": 64,
            "in_channels": 16,
            "multiple_of": 32,
            "norm_eps": 1e-05,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "out_channels": None,
            "patch_size": 2,
            "text_feat_dim": 32,
            "timestep_scale": 1000.0,
        },
        (1, 16, 8, 8),
        {**TEXT, "num_tokens": 8, "ref_latents": [t(1, 16, 4, 4)]},
    ),
    "StableAudio": Case(
        "StableAudio",
        AUDIO,
        (1, 16, 32),
        {**TEXT, "global_embed": t(1, 32)},
        state=seconds,
    ),
    "Stable Audio 3": Case(
        "StableAudio3",
        {**AUDIO, "global_cond_type": "adaLN", "global_cond_shared_embed": True, "timestep_features_type": "learned"},
        (1, 16, 32),
        {**TEXT, "global_embed": t(1, 32)},
        state=seconds,
    ),
    "CogVideoX": Case(
        "CogVideoX_T2V",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "time_embed_dim": 32,
            "num_layers": 3,
            "in_channels": 16,
            "text_embed_dim": 32,
            "max_text_seq_length": 8,
            "use_rotary_positional_embeddings": True,
        },
        VIDEO,
        TEXT,
        ("CogVideoX_I2V", "CogVideoX_Inpaint"),
    ),
    "LTX-2": Case(
        "LTXAV",
        {
            "in_channels": 16,
            "audio_in_channels": 128,
            "cross_attention_dim": 64,
            "audio_cross_attention_dim": 32,
            "attention_head_dim": 32,
            "audio_attention_head_dim": 16,
            "num_attention_heads": 2,
            "audio_num_attention_heads": 2,
            "caption_channels": 32,
            "num_layers": 3,
            "connector_attention_head_dim": 32,
            "connector_num_attention_heads": 1,
        },
        (1, 1, 1024),
        {"c_crossattn": t(1, 8, 64), "frame_rate": 25, "latent_shapes": [[1, 16, 2, 4, 4], [1, 8, 4, 16]]},
    ),
    "Z-Image pixel space": Case(
        "ZImagePixelSpace",
        {
            **LUMINA,
            "n_kv_heads": 4,
            "dim": 256,
            "n_heads": 4,
            "axes_dims": [16, 24, 24],
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 8,
            "patch_size": 4,
            "in_channels": 3,
            "decoder_in_channels": 48,
            "decoder_hidden_size": 32,
            "decoder_num_res_blocks": 2,
            "decoder_max_freqs": 4,
        },
        (1, 3, 16, 16),
        {**TEXT, "num_tokens": 8},
    ),
    "PixelDiT": Case(
        "PixelDiTT2I",
        PIXELDIT,
        (1, 3, 16, 16),
        TEXT,
    ),
    "PiD": Case(
        "PiD",
        {**PIXELDIT, "lq_latent_channels": 4, "lq_hidden_dim": 32, "lq_num_res_blocks": 1, "lq_interval": 2},
        (1, 3, 32, 32),
        {**TEXT, "lq_latent": t(1, 4, 2, 2), "degrade_sigma": t(1)},
    ),
    "Wan Animate 2": Case(
        "WAN_Animate2",
        {**WAN, "in_dim": 36},
        VIDEO,
        {**TEXT, "c_concat": t(1, 20, 2, 8, 8), "clip_fea": CLIP_VISION, "pose_latents": t(1, 16, 1, 8, 8)},
    ),
    "Wan SCAIL 2": Case(
        "WAN21_SCAIL2",
        {**WAN, "in_dim": 20, "mask_in_dim": 28},
        VIDEO,
        {**TEXT, "c_concat": t(1, 4, 2, 8, 8), "clip_fea": CLIP_VISION, "pose_latents": t(1, 20, 2, 4, 4)},
    ),
    "WanDancer": Case(
        "WAN22_WanDancer",
        {**WAN, "in_dim": 36, "audio_inject_layers": [0, 2], "music_dim": 32, "music_heads": 2, "music_latent_dim": 32},
        VIDEO,
        {**TEXT, "c_concat": t(1, 20, 2, 8, 8), "clip_fea": CLIP_VISION, "audio_embed": t(1, 8, 35)},
    ),
    "ACE-Step 1.5": Case(
        "ACEStep15",
        {
            "in_channels": 48,
            "hidden_size": 64,
            "text_hidden_dim": 32,
            "timbre_hidden_dim": 16,
            "audio_acoustic_hidden_dim": 16,
            "num_dit_layers": 3,
            "num_lyric_layers": 1,
            "num_timbre_layers": 1,
            "num_tokenizer_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 32,
            "intermediate_size": 64,
            "fsq_dim": 64,
            "encoder_hidden_size": 64,
            "encoder_intermediate_size": 64,
            "encoder_num_heads": 2,
        },
        (1, 16, 20),
        {**TEXT, "lyric_embed": t(1, 8, 32), "refer_audio": t(1, 16, 20), "is_covers": False},
    ),
    "Boogu-Image": Case(
        "Boogu",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_double_stream_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 32,
            "axes_dim_rope": (8, 12, 12),
            "axes_lens": (64, 64, 64),
            "instruction_feat_dim": 32,
        },
        (1, 16, 8, 8),
        {**TEXT, "num_tokens": 8, "ref_latents": [t(1, 16, 4, 4)]},
    ),
    "Mage-Flow": Case(
        "MageFlow",
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        (1, 16, 4, 4),
        {**TEXT, "ref_latents": [t(1, 16, 2, 2)]},
    ),
    "JoyImage": Case(
        "JoyImage",
        {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "text_dim": 32,
            "mlp_width_ratio": 2.0,
            "num_layers": 3,
            "rope_dim_list": [8, 12, 12],
        },
        (1, 16, 1, 8, 8),
        TEXT,
    ),
    "Ideogram 4": Case(
        "Ideogram4",
        {
            "in_channels": 16,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "intermediate_size": 64,
            "adaln_dim": 32,
            "llm_features_dim": 32,
            "mrope_section": (4, 6, 6),
        },
        (1, 16, 4, 4),
        {**TEXT, "attention_mask": t(1, 8, ones=True)},
    ),
    "Krea 2": Case(
        "Krea2",
        {
            "features": 256,
            "tdim": 32,
            "txtdim": 64,
            "heads": 2,
            "kvheads": 1,
            "multiplier": 2,
            "layers": 3,
            "channels": 16,
            "txtlayers": 2,
            "txtheads": 2,
            "txtkvheads": 2,
        },
        (1, 16, 8, 8),
        {"c_crossattn": t(1, 8, 128), "ref_latents": [t(1, 16, 4, 4)]},
    ),
    "Lens": Case(
        "Lens",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "enc_hidden_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "selected_layer_index": (0, 1),
        },
        (1, 16, 4, 4),
        {"c_crossattn": t(1, 8, 64), "attention_mask": t(1, 8, ones=True)},
    ),
    "Kandinsky 5": Case(
        "Kandinsky5",
        {
            "in_text_dim": 32,
            "in_text_dim2": 32,
            "time_dim": 32,
            "model_dim": 128,
            "ff_dim": 128,
            "visual_embed_dim": 132,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
        },
        VIDEO,
        {**TEXT, "y": t(1, 32), "c_concat": t(1, 17, 2, 8, 8)},
        ("Kandinsky5Image",),
    ),
    "ERNIE-Image": Case(
        "ErnieImage",
        {
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": 32,
            "rope_axes_dim": (16, 24, 24),
        },
        (1, 16, 4, 4),
        TEXT,
    ),
    "Qwen-Image": Case("QwenImage", QWEN, (1, 16, 1, 8, 8), QWEN_INPUTS),
    "Qwen-Image-Edit": Case("QwenImage", QWEN, (1, 16, 1, 8, 8), {**QWEN_INPUTS, "ref_latents": [t(1, 16, 1, 4, 4)]}),
    "Qwen-Image with control": Case(
        "QwenImage", QWEN, (1, 16, 1, 8, 8), {**QWEN_INPUTS, "control": {"input": [t(1, 16, 64)] * 3}}
    ),
}

UNTRIED = {
    "Anima": "its blocks are those of Cosmos Predict 2, and its text adapter alone has 135 million weights",
    "MiniMaxMusic3": "its size is fixed, at 2 billion weights",
    "MiniMaxH3": "one forward of it needs a prompt's tokens and both latents, packed by its own nodes",
    "HiDreamO1": "its size is that of the language model which it is made of",
    "SeedVR2": "it needs windows of a whole video",
    "TripoSplat": "its sequence has 8192 tokens",
    "Trellis2": "it computes on sparse voxels",
    "RT_DETR_v4": "it finds objects, and is not sampled",
    "SAM3": "it finds objects, and is not sampled",
    "SAM31": "it finds objects, and is not sampled",
    "DepthAnything3": "it finds depths, and is not sampled",
}
"""Classes of ``comfy.supported_models`` that have no case, and why."""
