"""NF4 as it is used without this package: bitsandbytes' own parameters, all in VRAM, or moved block by block.

Written anew from what the two node packs do, to be measured beside: comfyanonymous/ComfyUI_bitsandbytes_NF4 (a Linear
whose weight is a ``Params4bit``, all of it on the device) and MinusZoneAI/ComfyUI-FluxExt-MZ (forward hooks that move
the blocks of that model, by ``.to()``, in both directions).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import comfy.model_management
import comfy.model_patcher
import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from cases import Case
from comfy_model import ComfyModel, at_work
from family import Unavailable
from torch import nn
from torch.utils.hooks import RemovableHandle

_AT_A_TIME = 7


class BnbLinear(nn.Module):
    """A Linear on bitsandbytes' parameter, which takes its quant state along when it is moved."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        (how,), (tensors,) = linear.parts, linear.tensors
        code = get_4bit_type(how.quant_type, device="cpu")
        kind = {"blocksize": how.blocksize, "quant_type": how.quant_type}
        state = QuantState(absmax=tensors["absmax"], shape=torch.Size(how.shape), code=code, dtype=linear.dtype, **kind)
        if how.nested:
            nested, codes = tensors["nested_absmax"], tensors["nested_map"][0]
            state.nested, state.offset = True, tensors["nested_offset"][0]
            state.state2 = QuantState(absmax=nested, blocksize=how.nested[0].blocksize, code=codes, dtype=torch.float32)
        self.weight = bitsandbytes.nn.Params4bit(
            tensors["packed"].view(-1, 1),
            quant_state=state,
            compress_statistics=bool(how.nested),
            bnb_quantized=True,
            **kind,
        )
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bitsandbytes.matmul_4bit(x, self.weight.t(), bias=bias, quant_state=self.weight.quant_state)


class BnbModules:
    """Settings: "resident" and "moved"."""

    def __init__(self, path: Path) -> None:
        management = comfy.model_management
        self._patcher = comfy.model_patcher.ModelPatcher(
            _model(path), load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )

    @contextmanager
    def at_work(self, setting: str, case: Case) -> Iterator[ComfyModel]:
        if case.loras:
            raise Unavailable("ComfyUI patches no weight that is a Params4bit")
        hooks = _move_blocks(self._patcher) if setting == "moved" else []
        try:
            with at_work(self._patcher, case) as model:
                yield model
        finally:
            for hook in hooks:
                hook.remove()


def _model(path: Path) -> Any:
    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
    from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
    from flux_nf4.nf4_loader.models.fill import fill
    from flux_nf4.nf4_loader.models.transformers import build_transformer, materialise

    catalogue = read_catalogue(path)
    model = build_transformer(catalogue)
    materialise(model.diffusion_model)
    fill(model, catalogue, lambda _: None)
    for name, module in list(model.diffusion_model.named_modules()):
        if isinstance(module, Linear4bit):
            model.diffusion_model.set_submodule(name, BnbLinear(module))
    return model


def _move_blocks(patcher: Any) -> list[RemovableHandle]:
    """Before each 7th block computes: everything before it to the host, and it and the 6 after it to the device."""
    transformer, device = patcher.model.diffusion_model, patcher.load_device
    doubles, singles = transformer.double_blocks, transformer.single_blocks
    embedders = [transformer.img_in, transformer.time_in, transformer.vector_in, transformer.txt_in]
    if transformer.params.guidance_embed:
        embedders.append(transformer.guidance_in)

    def move(modules: Any, target: torch.device) -> None:
        for module in modules:
            module.to(target)

    def to_host(*groups: Any) -> None:
        for group in groups:
            move(group, torch.device("cpu"))
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def before_model(*_: Any) -> None:
        to_host(doubles)
        to_host(singles)
        move(embedders, device)

    def before_double(start: int) -> None:
        to_host(embedders, doubles[:start])
        move(doubles[start : start + _AT_A_TIME], device)

    def before_single(start: int) -> None:
        to_host(doubles)
        to_host(singles[:start])
        move(singles[start : start + _AT_A_TIME], device)

    hooks = [transformer.register_forward_pre_hook(before_model)]
    for blocks, before in ((doubles, before_double), (singles, before_single)):
        for start in range(0, len(blocks), _AT_A_TIME):
            hooks.append(blocks[start].register_forward_pre_hook(lambda *_, b=before, s=start: b(s)))
    return hooks
