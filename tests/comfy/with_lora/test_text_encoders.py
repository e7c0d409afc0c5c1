"""A LoRA on a T5 in 4 bits is at most as far from the exact result as on the dense twin in stock ComfyUI.

Exact is the twin in fp32, patched in fp32. Stock rounds each patched weight to the dtype that it holds the model in.
"""

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import CLIP_L, T5, dense_twin, save_clip_l, save_t5

from flux_nf4.encoders import load_encoders, streamed_clip
from flux_nf4.nf4_loader.checkpoint.encoder_file import read_encoder_file
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models import streamed_encoders, text_encoders
from flux_nf4.offload.plan import Residency

LAYERS = 24
"""ComfyUI knows a T5 by its 24th layer, and then takes the dtype of its last norm."""
SMALL = {"t5xxl_model_config": dict(T5, num_layers=LAYERS), "model_config": CLIP_L, "clip_l_model_config": CLIP_L}
PROMPT = {"l": [[(1, 1.0)] * 77], "t5xxl": [[(5 + 7 * i % 390, 1.0) for i in range(12)]]}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """ComfyUI's text encoders are as small as these."""
    for module in (text_encoders, streamed_encoders):
        made = module.options_for
        monkeypatch.setattr(module, "options_for", lambda *given, made=made: made(*given) | SMALL)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The folder of a CLIP-L and a T5 in 4 bits, and the T5's dense twin."""
    folder = tmp_path_factory.mktemp("encoders")
    save_clip_l(folder)
    return folder, dense_twin(save_t5(folder, LAYERS))


@pytest.fixture
def files(quantised, tmp_path):
    """A function: the files of CLIP-L, of the T5 with these dtypes of its dense tensors, and of its dense twin."""
    folder, twin = quantised

    def make(dense, norms):
        stored = load_file(folder / "t5/model.safetensors")
        named = {name: norms if "norm" in name else dense for name in twin if f"{name}.absmax" not in stored}
        assert len(named) == 2 + 1 + 3 * LAYERS, "embeddings, norms and wo"
        ours = stored | {name: stored[name].to(dtype) for name, dtype in named.items()}
        theirs = twin | {name: ours[name].to(norms) for name in named}
        for name, state in (("t5", ours), ("twin", theirs)):
            save_file(state, tmp_path / f"{name}.safetensors")
        return folder / "clip_l.safetensors", tmp_path / "t5.safetensors", tmp_path / "twin.safetensors"

    return make


def stock(clip_l, twin):
    return comfy.sd.load_text_encoder_state_dicts(
        [load_file(clip_l), load_file(twin)], clip_type=comfy.sd.CLIPType.FLUX, model_options=SMALL
    )


def exact(clip_l, twin, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("comfy.model_management.text_encoder_dtype", lambda *_, **__: torch.float32)
        state = {name: tensor.float() for name, tensor in load_file(twin).items()}
        return comfy.sd.load_text_encoder_state_dicts(
            [load_file(clip_l), state], clip_type=comfy.sd.CLIPType.FLUX, model_options=SMALL
        )


def dual_clip(clip_l, t5):
    return text_encoders.load_dual_clip([clip_l, t5], [])


def all_streamed(clip_l, t5):
    loaded = load_encoders([read_encoder_file(clip_l), read_encoder_file(t5)], "flux")
    return streamed_clip(loaded, Residency(budget_bytes=loaded.patcher.model_size()), None)


def all_resident(clip_l, t5):
    return streamed_clip(load_encoders([read_encoder_file(clip_l), read_encoder_file(t5)], "flux"), Residency(), None)


def with_lora(clip, layers):
    generator, lora = torch.Generator().manual_seed(2), {}
    for name, (rows, columns) in layers.items():
        for block in range(LAYERS):
            path = f"lora_te2_encoder_block_{block}_layer_{name}"
            lora[f"{path}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 20
            lora[f"{path}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 20
            lora[f"{path}.alpha"] = torch.tensor(3.0)
    return comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.7)[1]


def encoded(clip):
    with torch.inference_mode():
        return clip.encode_from_tokens(PROMPT).double()


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


ON = {
    "4-bit layers": {"0_SelfAttention_q": (128, 128), "1_DenseReluDense_wi_0": (256, 128)},
    "dense layers": {"1_DenseReluDense_wo": (128, 256)},
}
BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


@pytest.mark.parametrize(("dense", "norms"), [(BF16, BF16), (FP32, FP32), (BF16, FP32), (FP8, BF16)], ids=str)
def test_a_lora_is_no_less_exact_than_in_stock(dense, norms, files, monkeypatch, clip_copies):
    clip_l, t5, twin = files(dense, norms)
    theirs, true = stock(clip_l, twin), exact(clip_l, twin, monkeypatch)
    plain = encoded(true)
    wanted = {on: encoded(with_lora(true, layers)) for on, layers in ON.items()}
    bounds = {on: off(encoded(with_lora(theirs, layers)), wanted[on]) for on, layers in ON.items()}
    for load in (dual_clip, all_streamed, all_resident):
        ours = load(clip_l, t5)
        assert sum(isinstance(module, Linear4bit) for module in ours.cond_stage_model.modules()) == 6 * LAYERS
        for on, layers in ON.items():
            assert off(plain, wanted[on]) > 0.05, "it changes too little to prove anything"
            assert off(encoded(with_lora(ours, layers)), wanted[on]) <= bounds[on], (load.__name__, on)
