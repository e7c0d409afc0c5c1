"""Small models of diffusers, quantised and saved by diffusers itself, and their dense twins in ComfyUI's names.

A twin has bitsandbytes' own values. Where each value belongs is found by having diffusers' own converter take a state
dict apart whose values are their places, so that nothing here says twice what `families` says.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.sample
import comfy.sd
import comfy.supported_models
import diffusers
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit as BnbLinear4bit
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_krea2_transformer_checkpoint_to_diffusers,
)
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Small:
    """One small model.

    Attributes:
        model: diffusers' class.
        config: Its configuration.
        supported: ComfyUI's class in ``comfy.supported_models``.
        defaults: What ComfyUI does not find out from a file, but takes to be as in the large model.
        to_diffusers: From a state dict in ComfyUI's names to one in those of diffusers; may empty what it is given.
        text: The shape of what the text encoder gives.
        latent: The shape of a latent.
        skipped: Modules that are not quantised.
    """

    model: str
    config: Mapping[str, Any]
    supported: str
    text: tuple[int, ...]
    latent: tuple[int, ...]
    to_diffusers: Callable[[Tensors], Tensors]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        return hasattr(comfy.supported_models, self.supported)


def ideogram_to_diffusers(tensors: Tensors) -> Tensors:
    """As diffusers' ``_convert_non_diffusers_ideogram4_lora_to_diffusers`` splits LoRAs; it has no such function for
    checkpoints."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if ".attention.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                made[name.replace(".qkv.", f".to_{part}.")] = rows
        else:
            made[name.replace(".attention.o.", ".attention.to_out.0.")] = tensor
    return made


FLUX2 = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 1,
    "joint_attention_dim": 192,
    "timestep_guidance_channels": 256,
}
_FLUX2 = functools.partial(
    Small,
    "Flux2Transformer2DModel",
    supported="Flux2",
    text=(1, 6, 192),
    latent=(1, 128, 6, 4),
    to_diffusers=convert_flux2_transformer_checkpoint_to_diffusers,
    defaults={"num_heads": 1},
)
QWEN = {
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
IDEOGRAM = {
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "adaln_dim": 64,
    "llm_features_dim": 128,
    "mrope_section": (12, 10, 10),
}

SMALL = {
    "FLUX.2 dev": _FLUX2(config=FLUX2 | {"guidance_embeds": True}),
    "FLUX.2 klein": _FLUX2(config=FLUX2 | {"guidance_embeds": False}),
    "Qwen-Image": Small(
        "QwenImageTransformer2DModel",
        QWEN,
        "QwenImage",
        text=(1, 6, 64),
        latent=(1, 16, 1, 8, 4),
        to_diffusers=dict,
        defaults={name: value for name, value in QWEN.items() if name != "num_layers"},
        skipped=("transformer_blocks.0", "transformer_blocks.3", "img_in", "proj_out"),
    ),
    "Ideogram 4": Small(
        "Ideogram4Transformer2DModel",
        IDEOGRAM,
        "Ideogram4",
        text=(1, 6, 128),
        latent=(1, 128, 6, 4),
        to_diffusers=ideogram_to_diffusers,
        defaults={name: value for name, value in IDEOGRAM.items() if name != "num_layers"},
    ),
    "Krea 2": Small(
        "Krea2Transformer2DModel",
        {
            "num_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 1408,
            "text_hidden_dim": 320,
            "num_text_layers": 3,
            "text_intermediate_size": 896,
        },
        "Krea2",
        text=(1, 6, 3 * 320),
        latent=(1, 16, 1, 8, 4),
        to_diffusers=convert_krea2_transformer_checkpoint_to_diffusers,
    ),
}


def use_small_defaults(small: Small, patch: pytest.MonkeyPatch) -> None:
    """Have ComfyUI take ``small.defaults`` to be those of the large model."""
    supported = getattr(comfy.supported_models, small.supported)
    patch.setattr(supported, "unet_extra_config", {**supported.unet_extra_config, **small.defaults})


def shapes_of_diffusers(small: Small) -> dict[str, tuple[int, ...]]:
    """Of every tensor, in the names of diffusers."""
    with torch.device("meta"):
        model = getattr(diffusers, small.model)(**small.config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def save_dense(small: Small, folder: Any, seed: int = 0) -> None:
    """Have diffusers make the model, with random values, and save it in bf16."""
    torch.manual_seed(seed)
    model = getattr(diffusers, small.model)(**small.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 0.05 if parameter.dim() == 2 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * wide + (name.endswith(("norm_q.weight", "norm_k.weight"))))
    model.bfloat16().save_pretrained(folder)


def save_quantised(small: Small, dense: Any, folder: Any, *, nested: bool, quant_type: str = "nf4") -> torch.nn.Module:
    """Have diffusers quantise the saved model and save it again, in shards; returns diffusers' quantised model."""
    config = diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        llm_int8_skip_modules=list(small.skipped),
    )
    with pytest.MonkeyPatch.context() as patch:
        # diffusers wants to see a GPU; the rest of it runs without.
        patch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
        model = getattr(diffusers, small.model).from_pretrained(
            dense, quantization_config=config, torch_dtype=torch.bfloat16, device_map={"": "cpu"}
        )
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


def values_of(model: torch.nn.Module) -> Tensors:
    """The values of diffusers' quantised model in fp32, as bitsandbytes dequantises them, in the names of diffusers."""
    values = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, BnbLinear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            values[f"{name}.weight"] = bnb.dequantize_4bit(module.weight.data, state)
    return values


def dense_twin(small: Small, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """The same values in ComfyUI's names.

    Args:
        small: The model.
        model: diffusers' quantised model.
        shapes: Of ComfyUI's model.
    """
    places, first = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        places[name] = torch.arange(first, first + count).view(shape)
        first += count
    every = torch.full((first,), torch.nan)
    values = values_of(model)
    converted = small.to_diffusers(dict(places))
    assert converted.keys() == values.keys()
    for name, indices in converted.items():
        assert indices.shape == values[name].shape, name
        every[indices.reshape(-1)] = values[name].reshape(-1)
    assert not every.isnan().any()
    return {name: every[indices] for name, indices in places.items()}


def sample(patcher: Any, small: Small, steps: int = 1) -> torch.Tensor:
    """Latents of a small picture by ComfyUI's own sampling."""
    generator = torch.Generator().manual_seed(3)
    positive = [[torch.randn(small.text, generator=generator), {"pooled_output": None}]]
    latent = torch.zeros(small.latent)
    noise = comfy.sample.prepare_noise(latent, 5)
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher, noise, steps, 1.0, "euler", "simple", positive, positive, latent, seed=5
        ).clone()
