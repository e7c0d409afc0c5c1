"""Models in ComfyUI's scaled fp8: a number beside each weight, which it is to be multiplied with."""

import comfy.model_detection
import comfy.sd
import comfy.utils
import torch


def in_scaled_fp8(tensors):
    """``tensors`` with every matrix in fp8, and a scale for each."""
    stored = dict(tensors, scaled_fp8=torch.zeros(0, dtype=torch.float8_e4m3fn))
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dim() == 2:
            scale = tensor.float().abs().max() / 448
            stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
    return stored


def load_scaled_fp8(stored, config, monkeypatch):
    """As ComfyUI loads it, which shall find ``config`` in it. Returns the patcher, and whether its biases are in fp8,
    too, without a scale: so before 0.8."""
    find_formats = getattr(comfy.utils, "detect_layer_quantization", None)

    def configuration(state, *_, **__):
        if find_formats is None:
            config.scaled_fp8 = state.pop("scaled_fp8").dtype
        else:
            config.quant_config = find_formats(state, "")
        return config

    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", configuration)
    return comfy.sd.load_diffusion_model_state_dict(stored), find_formats is None
