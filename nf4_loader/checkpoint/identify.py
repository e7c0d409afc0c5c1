"""What a safetensors file is that holds no 4-bit Flux transformer, and which loader is right for it."""

import re
from collections.abc import Callable, Iterable

from .header import Header, natural_key

_QUANT_STATE = ".quant_state.bitsandbytes__"


def what_else_it_is(header: Header, is_flux: bool) -> str:
    """Say what the file is and what to do with it, in sentences.

    Args:
        header: Of the file.
        is_flux: There is a Flux transformer in it, so that its weights are what is not in 4 bits.
    """
    names = list(header.tensors)
    answer = of_another_kind(names)
    if answer is not None:
        return answer
    if "tensor_names" in header.metadata or any("_qdata" in name for name in names):
        return (
            "its weights are quantised by torchao, not by bitsandbytes to NF4 or FP4. ComfyUI has no loader for it: "
            "pick an NF4 file, or an fp8 one with 'Load Diffusion Model'."
        )
    kind, loader = next((found for mark, *found in _OTHER_MODELS if any(re.search(mark, n) for n in names)), ("", ""))
    if any(name.endswith(".comfy_quant") for name in names):
        return (
            "its weights are in a format of ComfyUI's own ('.comfy_quant' tensors: fp8, NVFP4 or others), not NF4 or "
            f"FP4 of bitsandbytes. Load it with {loader if kind and not is_flux else _loader_of_dense(names)}, of a "
            "ComfyUI that is new enough."
        )
    if is_flux:
        return _dense_flux(header)
    is_4bit = any(_QUANT_STATE in name for name in names)
    if is_4bit and kind in (_CHROMA, _FLUX2):
        return (
            f"it is {kind}, in 4 bits of bitsandbytes. Of that model this node loads files in the names of Black "
            "Forest Labs ('double_blocks.0.*'), the transformer alone: pick such a one."
        )
    if is_4bit:
        sample = ", ".join(sorted(names, key=natural_key)[:3])
        return (
            f"it is a bitsandbytes 4-bit file, but not of a Flux model: {kind or 'it'} has no 'double_blocks.0.*' and "
            f"no 'single_transformer_blocks.0.*' (its first names: {sample}). This node loads Flux only: use "
            f"{_LOADERS_OF_4BIT.get(kind, 'a loader for that model')}."
        )
    if kind:
        return f"it is {kind}, not a Flux transformer in 4 bits. Load it with {loader}."
    return (
        "it holds no Flux transformer ('double_blocks.0.*' is missing), so it is no Flux checkpoint. Pick an NF4 "
        "or FP4 file such as flux1-dev-bnb-nf4-v2.safetensors."
    )


def of_another_kind(names: Iterable[str]) -> str | None:
    """What to do with a file of these tensors, if they are in a format that ComfyUI itself has no loader for, or are an
    addition to a model, which has blocks of the same names."""
    names = list(names)
    return next((answer for is_it, answer in _OTHER_KINDS if any(map(is_it, names))), None)


_NUNCHAKU = (
    "it is a nunchaku (SVDQuant) file, not bitsandbytes NF4 or FP4. Load it with 'Nunchaku FLUX DiT Loader' of the "
    "ComfyUI-nunchaku package."
)
_LLM_INT8 = (
    "its weights are 8-bit LLM.int8 of bitsandbytes ('.SCB' tensors), not NF4 or FP4. ComfyUI has no loader for it: "
    "pick an NF4 file, or an fp8 one with 'Load Checkpoint'."
)
_LORA = "it is a LoRA, not a checkpoint. Put it into models/loras and load it with 'LoraLoaderModelOnly' on the MODEL."
_CONTROLNET = (
    "it is a ControlNet, not a checkpoint. Put it into models/controlnet and load it with 'Load ControlNet Model'."
)
_IP_ADAPTER = (
    "it is an IP-adapter, not a checkpoint. Load it with the nodes of the package that it is made for, such as "
    "x-flux-comfyui, on the MODEL."
)

_OTHER_KINDS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda name: name.endswith((".qweight", ".wscales", ".wtscale")), _NUNCHAKU),
    (lambda name: name.endswith((".SCB", ".weight_format")), _LLM_INT8),
    (lambda name: bool(re.search(r"(^lora_|\.lora_|_lora\d*\.|\.lokr_|\.hada_|\.diff(_b)?$)", name)), _LORA),
    (lambda name: bool(re.search(r"(^|\.)controlnet_", name)), _CONTROLNET),
    (lambda name: bool(re.search(r"(^|\.)ip_adapter", name)), _IP_ADAPTER),
)

_CHROMA = "a Chroma model in the layout of diffusers"
_FLUX2 = "a Flux 2 model in the layout of diffusers"
_VAE, _VAE_LOADER = "a VAE", "'Load VAE'"
_OTHER_MODELS = (
    (r"(^|\.)joint_blocks\.0\.", "a Stable Diffusion 3 model", "'Load Checkpoint'"),
    (r"^distilled_guidance_layer\.", "a Chroma model in the layout of diffusers", "a loader for that model"),
    (
        r"^double_stream_modulation_img\.linear\.",
        "a Flux 2 model in the layout of diffusers",
        "a loader for that model",
    ),
    (r"^transformer_blocks\.0\.", "a model in the layout of diffusers", "a loader for that model"),
    (r"^(vae\.)?encoder\.down_blocks\.", _VAE, _VAE_LOADER),
    (r"(^|\.)(input_blocks|down_blocks)\.", "a Stable Diffusion or SDXL model", "'Load Checkpoint'"),
    (r"^model\.layers\.0\.", "a language model", "a loader for that model"),
    (r"(^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.", "a T5 text encoder", "'DualCLIPLoader' (type flux)"),
    (r"(^|\.)text_model\.encoder\.layers\.0\.", "a CLIP text encoder", "'DualCLIPLoader' (type flux)"),
    (r"(^|\.)decoder\.conv_in\.weight$", _VAE, _VAE_LOADER),
)

_LOADERS_OF_4BIT = {"a T5 text encoder": "'Load Flux NF4 Dual CLIP' (folder text_encoders) for it"}


def _dense_flux(header: Header) -> str:
    weight = next((entry for name, entry in header.tensors.items() if re.search(_A_LARGE_WEIGHT, name)), None)
    dtype = weight.dtype if weight else "unknown"
    if weight and (weight.dtype in ("U8", "I8") or len(weight.shape) != 2 or weight.shape[1] == 1):
        return (
            f"{weight.name} is packed ({dtype} of shape {weight.shape}) but no quant state "
            "('.weight.quant_state.bitsandbytes__nf4') says how to read it. The file was saved without it: "
            "download it again, or another one."
        )
    return (
        f"it is a Flux model with dense {dtype} weights: no tensor ends in '.weight.quant_state.bitsandbytes__nf4' or "
        f"'__fp4'. Load it with {_loader_of_dense(header.tensors)} and stream it with 'Stream Model Blocks', or make "
        "an NF4 file of it with 'Quantise Flux to NF4 and Save'."
    )


def _loader_of_dense(names: Iterable[str]) -> str:
    all_in_one = any(name.startswith("text_encoders.") for name in names)
    loader, folder = ("Load Checkpoint", "checkpoints") if all_in_one else ("Load Diffusion Model", "diffusion_models")
    return f"'{loader}' (folder {folder})"


_A_LARGE_WEIGHT = r"(double_blocks\.0\.img_attn\.qkv|single_transformer_blocks\.0\.proj_mlp)\.weight$"
