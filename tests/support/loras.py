"""LoRA files for a Flux model, with random factors, in the key layouts that trainers write."""

import torch
from random_lora import diffusers, kohya, linear_shapes, low_rank, of_diffusers, random

__all__ = ["adapters", "black_forest_labs", "diffusers", "generic", "kohya", "linear_shapes", "low_rank", "onetrainer"]
__all__ += ["random", "simpletuner", "xlabs"]


def generic(shapes, rank=4):
    """ComfyUI's own names."""
    return {
        f"diffusion_model.{name}.lora_{half}.weight": factor
        for name, shape in shapes.items()
        for half, factor in zip("BA", low_rank(name, shape, rank), strict=True)
    }


def _underscored(prefix, config, shapes, rank):
    file = {}
    for name, shape in of_diffusers(config, shapes):
        up, down = low_rank(name, shape, rank)
        key = f"{prefix}_{name.replace('.', '_')}"
        file |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(3.0)}
    return file


def onetrainer(config, shapes, rank=4):
    return _underscored("lora_transformer", config, shapes, rank)


def simpletuner(config, shapes, rank=4):
    return _underscored("lycoris", config, shapes, rank)


def xlabs(shapes, rank=4):
    """As XLabs' trainer names them. ComfyUI takes it where it reaches the last blocks of Flux, which a small model has
    not: that pair is only there for this."""
    hidden = shapes["double_blocks.0.img_attn.proj"][0]
    parts = {
        "img_attn.qkv": "qkv_lora1",
        "txt_attn.qkv": "qkv_lora2",
        "img_attn.proj": "proj_lora1",
        "txt_attn.proj": "proj_lora2",
        "linear1": "qkv_lora",
        "linear2": "proj_lora",
    }
    file = {}
    for name, shape in [
        *shapes.items(),
        ("single_blocks.37.linear1", (3 * hidden, hidden)),
        ("double_blocks.18.txt_attn.qkv", (3 * hidden, hidden)),
    ]:
        kind, index, part = name.split(".", 2)
        if part in parts:
            rows = 3 * hidden if part == "linear1" else shape[0]
            up, down = low_rank(name, (rows, shape[1]), rank)
            key = f"{kind}.{index}.processor.{parts[part]}"
            file |= {f"{key}.up.weight": up, f"{key}.down.weight": down}
    return file


def black_forest_labs(model, rank=4, columns=128):
    """As their Canny and Depth LoRA: every Linear and bias, the norms set, and a wider ``img_in``."""
    state = {name.removeprefix("diffusion_model."): tensor for name, tensor in model.state_dict().items()}
    file = {}
    for name, shape in linear_shapes(model, "").items():
        up, down = low_rank(name, (shape[0], columns) if name == "img_in" else shape, rank)
        file |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        file[f"{name}.lora_B.bias"] = random(f"{name}.bias", shape[0], scale=0.05)
    for name, tensor in state.items():
        if name.endswith(("_norm.scale", "_norm.weight")):
            file[f"{name.removesuffix('.weight').removesuffix('.scale')}.scale"] = 1 + random(
                name, *tensor.shape, scale=0.1
            )
    return file


def adapters(key, shape):
    """File contents of every kind of patch of the layer ``key`` that ComfyUI knows, but for plain LoRA, by kind."""
    rows, columns = shape

    def tensor(name, *size, scale=0.05):
        return random(f"{key}.{name}", *size, scale=scale)

    def named(alpha=None, **tensors):
        file = {f"{key}.{name.replace('__', '.')}": value for name, value in tensors.items()}
        return file if alpha is None else file | {f"{key}.alpha": torch.tensor(alpha)}

    up, down = low_rank(key, shape)
    lora = {"lora_up__weight": up, "lora_down__weight": down}
    hada = {
        "hada_w1_a": tensor("w1a", rows, 4, scale=0.3),
        "hada_w1_b": tensor("w1b", 4, columns, scale=0.3),
        "hada_w2_a": tensor("w2a", rows, 4, scale=0.2),
        "hada_w2_b": tensor("w2b", 4, columns),
    }
    return {
        "loha": named(alpha=2.0, **hada),
        "lokr": named(lokr_w1=tensor("w1", 8, 8), lokr_w2=tensor("w2", rows // 8, columns // 8)),
        "lokr of low rank": named(
            alpha=2.0,
            lokr_w1_a=tensor("w1a", 8, 2, scale=0.3),
            lokr_w1_b=tensor("w1b", 2, 8, scale=0.3),
            lokr_w2_a=tensor("w2a", rows // 8, 2, scale=0.3),
            lokr_w2_b=tensor("w2b", 2, columns // 8, scale=0.3),
        ),
        "glora": named(
            a1__weight=tensor("a1", columns, 4),
            a2__weight=tensor("a2", 4, columns),
            b1__weight=tensor("b1", rows, 4),
            b2__weight=tensor("b2", 4, columns),
        ),
        "oft": named(oft_blocks=tensor("oft", rows // 16, 16, 16)),
        "oft with a constraint": named(alpha=2.0, oft_blocks=tensor("oft", rows // 16, 16, 16)),
        "boft": named(alpha=0.5, oft_blocks=tensor("boft", 2, rows // 4, 4, 4), rescale=1 + tensor("r", rows, 1)),
        "dora": named(alpha=2.0, dora_scale=1 + tensor("dora", rows, 1), **lora),
        "dora on the input": named(alpha=2.0, dora_scale=1 + tensor("dora", 1, columns), **lora),
        "lora with a middle": named(lora_mid__weight=tensor("mid", 4, 4, 1, 1, scale=0.5), **lora),
        "difference": named(diff=tensor("diff", rows, columns), diff_b=tensor("diff_b", rows)),
        "norms": named(w_norm=tensor("w_norm", rows, columns), b_norm=tensor("b_norm", rows)),
        "set": named(set_weight=tensor("set", rows, columns)),
    }
