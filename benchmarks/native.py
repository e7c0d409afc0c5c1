"""ComfyUI's native quantised formats, by its own loader: as ComfyUI moves them, and streamed by this package."""

import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import Case
from comfy_model import ComfyModel, at_work
from family import Unavailable
from weights import Files, dense_tensors

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


def native_file(files: Files, kind: str) -> Path:
    """The blocks' matrices in a format, the rest in bf16; made once.

    Raises:
        Unavailable: this ComfyUI has no such formats.
    """
    if importlib.util.find_spec("comfy_kitchen") is None:
        raise Unavailable("needs a ComfyUI with comfy-kitchen (0.33 or later)")
    return files.made(f"flux-{kind}.safetensors", lambda path: _write(path, files.nf4(), kind))


class Native:
    """One file, loaded by ComfyUI; a setting is "automatic" (ComfyUI moves it) or "streamed"."""

    def __init__(self, files: Files, kind: str) -> None:
        import comfy.sd

        self._patcher = comfy.sd.load_diffusion_model(str(native_file(files, kind)))
        self._streamed: Any = None

    @contextmanager
    def at_work(self, setting: str, case: Case) -> Iterator[ComfyModel]:
        with at_work(self._streamed_once() if setting == "streamed" else self._patcher, case) as model:
            yield model

    def _streamed_once(self) -> Any:
        from flux_nf4.offload.comfyui.adopt import stream_model
        from flux_nf4.offload.plan import Residency

        if self._streamed is None:
            self._streamed = stream_model(self._patcher, Residency(), None)
        return self._streamed


def _write(path: Path, nf4: Path, kind: str) -> None:
    from safetensors.torch import save_file

    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue

    quantised = importlib.import_module("comfy_kitchen.tensor").QuantizedTensor  # which not every ComfyUI has
    name, layout, arguments, said = FORMATS[kind]
    mark = torch.tensor(list(json.dumps({"format": name, **said}).encode()), dtype=torch.uint8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state: dict[str, torch.Tensor] = {}
    for key, tensor in dense_tensors(read_catalogue(nf4), torch.bfloat16):
        if tensor.dim() != 2 or "_blocks." not in key or tensor.shape[1] % _GROUP:
            state[key] = tensor.contiguous()
            continue
        parts = quantised.from_float(tensor.to(device), layout, **arguments).state_dict(key)
        state |= {part: value.cpu().contiguous() for part, value in parts.items()}
        state[key.removesuffix("weight") + "comfy_quant"] = mark.clone()
    save_file(state, path)
