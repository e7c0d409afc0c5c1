"""Who is compared: what each is called, and which family runs it in which setting.

A family loads its weights once, in a process of its own, and runs each of its settings on them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from family import Family
from weights import Files


@dataclass(frozen=True)
class Options:
    """What a family is made from. ``gguf_pack`` is the user's copy of city96/ComfyUI-GGUF."""

    files: Files
    gguf_pack: Path | None = None


@dataclass(frozen=True)
class Contender:
    name: str
    family: str
    setting: str
    description: str


NF4_RESIDENT, NESTED_RESIDENT, DENSE_RESIDENT = "bnb-nf4", "bnb-nf4-v1", "comfy-bf16"

CONTENDERS = (
    Contender(
        NF4_RESIDENT, "bnb", "resident", "NF4 in bitsandbytes' own modules, all in VRAM (ComfyUI_bitsandbytes_NF4)"
    ),
    Contender("bnb-nf4-moved-7-7", "bnb", "moved", "the same, 7 blocks at a time moved by .to() (ComfyUI-FluxExt-MZ)"),
    Contender("streamed-0-0", "streamed", "0/0", "this package, no block stays"),
    Contender("streamed-7-7", "streamed", "7/7", "this package, 7 double and 7 single blocks stay"),
    Contender("streamed-12-24", "streamed", "12/24", "this package, 12 double and 24 single blocks stay"),
    Contender("streamed-auto", "streamed", "auto", "this package, as many blocks stay as there is room for"),
    Contender("streamed-resident", "streamed", "19/38", "this package, all in VRAM"),
    Contender("streamed-0-0-int8", "streamed", "0/0 int8", "this package, no block stays, int8 where faster"),
    Contender("streamed-resident-int8", "streamed", "19/38 int8", "this package, all in VRAM, int8 where faster"),
    Contender("streamed-0-0-compiled", "streamed", "0/0 compiled", "this package, no block stays, blocks compiled"),
    Contender("streamed-resident-compiled", "streamed", "19/38 compiled", "this package, all in VRAM, blocks compiled"),
    Contender(NESTED_RESIDENT, "bnb-v1", "resident", "NF4 with nested absmax (v1 files), as bnb-nf4"),
    *(
        Contender(f"streamed-v1{ending}", "streamed-v1", setting, f"this package, nested absmax (v1 files), {what}")
        for ending, setting, what in (
            ("-0-0", "0/0", "no block stays"),
            ("-resident", "19/38", "all in VRAM"),
            ("-resident-compiled", "19/38 compiled", "all in VRAM, blocks compiled"),
        )
    ),
    Contender(DENSE_RESIDENT, "comfy-bf16", "automatic", "ComfyUI's loader, bf16, in VRAM as far as it has room"),
    Contender("comfy-bf16-offloaded", "comfy-bf16", "offloaded", "the same, all weights offloaded"),
    Contender("comfy-fp8", "comfy-fp8", "automatic", "ComfyUI's loader, fp8 e4m3, in VRAM as far as it has room"),
    Contender("comfy-fp8-offloaded", "comfy-fp8", "offloaded", "the same, all weights offloaded"),
    *(
        Contender(f"comfy-{kind}{ending}", f"comfy-{kind}", setting, description)
        for kind, title in (("int8", "INT8 ConvRot"), ("w4a8", "W4A8"), ("nvfp4", "NVFP4"))
        for ending, setting, description in (
            ("", "automatic", f"ComfyUI's loader, {title}, in VRAM as far as it has room"),
            ("-streamed", "streamed", "the same through this package's Stream Model Blocks"),
        )
    ),
    Contender("gguf-q4", "gguf", "automatic", "ComfyUI-GGUF, Q4_0, in VRAM as far as it has room"),
    Contender("gguf-q4-offloaded", "gguf", "offloaded", "the same, all weights offloaded"),
    Contender("diffusers-nf4", "diffusers-nf4-resident", "", "diffusers, blocks in NF4, all in VRAM"),
    Contender(
        "diffusers-nf4-group",
        "diffusers-nf4-group",
        "",
        "diffusers, blocks in NF4, group offload by blocks, stream (0.7 GiB of absmax stay in VRAM, not in its peak)",
    ),
    Contender("diffusers-bf16-group", "diffusers-bf16-group", "", "diffusers, bf16, group offload by blocks, stream"),
)


def family_maker(name: str, options: Options) -> Callable[[], Family]:
    """What loads the weights of a family into this process, with all that it takes imported: only loading is left.

    The process must have ComfyUI (`inside_comfyui.import_package`). What is returned raises `Unavailable` where
    something that the family needs is not here.
    """
    files = options.files
    nf4 = functools.partial(files.nf4, nested=name.endswith("-v1"))
    if name in ("streamed", "streamed-v1"):
        import comfy.model_management
        from streamed import Streamed

        from flux_nf4.nf4_loader.linear.kernels import warm_up

        warm_up(comfy.model_management.get_torch_device())
        return functools.partial(Streamed, nf4())
    if name in ("bnb", "bnb-v1"):
        from bnb_modules import BnbModules

        return functools.partial(BnbModules, nf4())
    if name.startswith("diffusers-"):
        from diffusers_model import Diffusers

        _, weights, way = name.split("-")
        return functools.partial(Diffusers, files, way, is_nf4=weights == "nf4")
    if name in ("comfy-int8", "comfy-w4a8", "comfy-nvfp4"):
        from native import Native

        return functools.partial(Native, files, name.removeprefix("comfy-"))
    import stock

    if name == "gguf":
        return functools.partial(stock.gguf, files, options.gguf_pack)
    dtype = {"comfy-bf16": torch.bfloat16, "comfy-fp8": torch.float8_e4m3fn}[name]
    return functools.partial(stock.dense, files, dtype)
