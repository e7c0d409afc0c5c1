"""A text encoder in a native quantised format of ComfyUI's, streamed, with LoRA: as stock ComfyUI encodes with it.

ComfyUI has the formats since 0.8; where it has not, there is nothing to test.
"""

import json

import comfy.sd
import pytest
import torch
from native_files import has_formats
from tiny_encoders import TINY, dense_twin, for_comfyui, make_small, save, tokens_of

from flux_nf4.offload.comfyui.clip import StreamedClip, stream_clip
from flux_nf4.offload.plan import Residency

if not has_formats():
    pytest.skip("this ComfyUI has not all of the formats", allow_module_level=True)

from comfy_kitchen.tensor import QuantizedTensor

QWEN3 = next(tiny for tiny in TINY if tiny.clip_type == "lumina2")
FORMATS = {
    "fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "INT8": ("int8_tensorwise", "TensorWiseINT8Layout", {"is_weight": True, "per_channel": True}),
}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A dense Qwen3 4B by ComfyUI's names."""
    return dense_twin(save(QWEN3, tmp_path_factory.mktemp("qwen3")))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch, QWEN3)


@pytest.fixture(params=FORMATS)
def load(request, twin):
    """A function: ComfyUI's own CLIP of a fresh file in a format, whose Linears in layers are packed."""
    name, layout, arguments = FORMATS[request.param]

    def make():
        state = {}
        for key, value in for_comfyui(QWEN3, twin).items():
            weight = value.to(torch.bfloat16)
            if value.dim() == 2 and ".layers." in key:
                layer = key.removesuffix(".weight")
                state |= QuantizedTensor.from_float(weight, layout, **arguments).state_dict(key)
                said = json.dumps({"format": name}).encode()
                state[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
            else:
                state[key] = weight
        clip = comfy.sd.load_text_encoder_state_dicts([state], clip_type=comfy.sd.CLIPType.LUMINA2)
        packed = [key for key, value in clip.patcher.model.named_parameters() if isinstance(value, QuantizedTensor)]
        assert len(packed) == 7 * QWEN3.layers
        return clip

    return make


def with_lora(clip, strength=0.7):
    """For every large weight of the first layer."""
    generator, lora = torch.Generator().manual_seed(3), {}
    for key, weight in clip.patcher.model.named_parameters():
        if weight.dim() == 2 and ".layers.0." in key:
            rows, columns = weight.shape
            path = f"text_encoders.{key.removesuffix('.weight')}"
            lora[f"{path}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 10
            lora[f"{path}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 10
    assert len(lora) == 14
    return comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)[1]


def encoded(clip):
    with torch.no_grad():  # in inference mode stock ComfyUI cannot take a quantised weight back
        return clip.encode_from_tokens(tokens_of(QWEN3.key)).clone()


@pytest.fixture
def exact(twin):
    """What the dense encoder gives in fp32, without and with the LoRA."""
    clip = comfy.sd.load_text_encoder_state_dicts([for_comfyui(QWEN3, twin)], clip_type=comfy.sd.CLIPType.LUMINA2)
    return encoded(clip), encoded(with_lora(clip))


def off(found, expected):
    return (found - expected).norm() / expected.norm()


@pytest.mark.parametrize("budget", [0, None])
def test_it_encodes_as_stock_and_with_a_lora_no_less_exactly(budget, load, exact, clip_copies, caplog):
    """Stock rounds the input of a patched layer, too. Here the patched weight meets the input as it is."""
    stock = with_lora(load())
    plain, patched = encoded(load()), encoded(stock)
    ours = stream_clip(load(), Residency(), None)
    if budget is not None:
        ours = stream_clip(ours, Residency(budget_bytes=ours.patcher.model_size()), None)
    assert isinstance(ours, StreamedClip)
    assert torch.equal(encoded(ours), plain)
    assert bool(ours.patcher.model.streaming.streamer.plan.streamed) == (budget is not None)
    found = encoded(with_lora(ours))
    assert off(found, exact[1]) < 1.02 * off(patched, exact[1]) < 0.2 * off(plain, exact[1])
    for path, layer in stock.patcher.model.named_modules():
        if ".0." in path and isinstance(getattr(layer, "weight", None), QuantizedTensor):
            (patch,) = ours.patcher.model.get_submodule(path).weight_function
            weight = ours.patcher.model.get_submodule(path).weight.dequantize().float()
            share = (patch(weight) == layer.weight.dequantize()).float().mean()
            assert share > 0.7, "it is rounded to the format again, as stock does it; some values at random"
    assert torch.equal(encoded(ours), plain)
    assert "skipped" not in caplog.text
