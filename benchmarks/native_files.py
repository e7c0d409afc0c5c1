"""Files in ComfyUI's native quantised formats, made by comfy-kitchen."""

import importlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_GROUP = 256
"""Columns that ConvRot rotates together: a layer whose width is no multiple of them stays in bf16."""

FORMATS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "int8": (
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        {"convrot": True, "convrot_groupsize": _GROUP, "is_weight": True, "per_channel": True},
        {"convrot": True, "convrot_groupsize": _GROUP},
    ),
    "w4a8": ("asym_w4a8_int8", "AsymW4A8Int8Layout", {}, {"convrot_groupsize": _GROUP}),
    "nvfp4": ("nvfp4", "TensorCoreNVFP4Layout", {}, {}),
}
"""By the family's name: ComfyUI's name of the format, comfy-kitchen's layout, its arguments, and what the file says."""


def has_formats() -> bool:
    """Whether this ComfyUI reads all of them (0.33 or later), and comfy-kitchen is there to make them."""
    if importlib.util.find_spec("comfy_kitchen") is None or importlib.util.find_spec("comfy.quant_ops") is None:
        return False
    known = getattr(importlib.import_module("comfy.quant_ops"), "QUANT_ALGOS", {})
    return all(name in known for name, *_ in FORMATS.values())


def write_native(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], kind: str) -> None:
    """Write these tensors of a Flux: the blocks' matrices in the format ``kind``, the rest as they are."""
    from safetensors.torch import save_file

    quantised = importlib.import_module("comfy_kitchen.tensor").QuantizedTensor  # which not every ComfyUI has
    name, layout, arguments, said = FORMATS[kind]
    mark = torch.tensor(list(json.dumps({"format": name, **said}).encode()), dtype=torch.uint8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state: dict[str, torch.Tensor] = {}
    for key, tensor in tensors:
        if tensor.dim() != 2 or "_blocks." not in key or tensor.shape[1] % _GROUP:
            state[key] = tensor.contiguous()
            continue
        parts = quantised.from_float(tensor.to(device), layout, **arguments).state_dict(key)
        state |= {part: value.cpu().contiguous() for part, value in parts.items()}
        state[key.removesuffix("weight") + "comfy_quant"] = mark.clone()
    save_file(state, path)
