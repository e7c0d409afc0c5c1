"""4-bit text encoders of transformers, streamed: the bits of ComfyUI's own on the dense twin, whatever is resident."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from tiny_encoders import TINY, dense_twin, for_comfyui, make_small, save, tokens_of

from flux_nf4.encoders import load_encoders, streamed_clip
from flux_nf4.nf4_loader.checkpoint.encoder_file import read_encoder_file
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.offload.comfyui.large_layers import HostEmbedding
from flux_nf4.offload.plan import Residency

KNOWN = [tiny for tiny in TINY if tiny.is_known]
each_tiny = pytest.mark.parametrize("tiny", KNOWN, ids=lambda tiny: f"{tiny.name} for {tiny.clip_type}")


def stock(tiny, state):
    """ComfyUI's own CLIP."""
    return comfy.sd.load_text_encoder_state_dicts(
        [for_comfyui(tiny, state)], clip_type=getattr(comfy.sd.CLIPType, tiny.clip_type.upper(), comfy.sd.CLIPType.SD3)
    )


def encoded(clip, tiny):
    with torch.inference_mode():
        return clip.encode_from_tokens(tokens_of(tiny.key), return_dict=True)


def same(got, wanted):
    assert wanted["cond"].std() > 0.01
    assert got.keys() == wanted.keys()
    return all(torch.equal(got[name], value) for name, value in wanted.items() if isinstance(value, torch.Tensor))


@each_tiny
def test_it_encodes_as_comfyui_on_the_dense_twin(tiny, tmp_path, monkeypatch, clip_copies):
    make_small(monkeypatch, tiny)
    wanted = encoded(stock(tiny, dense_twin(save(tiny, tmp_path, double_quant=tiny.layers > 30))), tiny)
    on_list = [*comfy.model_management.current_loaded_models]
    loaded = load_encoders([read_encoder_file(tmp_path)], tiny.clip_type)
    assert all(entry in on_list for entry in comfy.model_management.current_loaded_models)
    streamer = loaded.patcher.model.streaming.streamer
    assert any(isinstance(module, HostEmbedding) for module in loaded.cond_stage_model.modules())
    least = loaded.patcher.model_size()
    for budget in (least, (least + streamer.host_bytes) // 2, None):
        clip = streamed_clip(loaded, Residency(budget_bytes=budget), None)
        assert same(encoded(clip, tiny), wanted)
        streamed = len(streamer.plan.streamed)
        assert (streamed == len(streamer.blocks)) if budget == least else (budget is None) == (streamed == 0)


def with_lora(clip):
    """On every Linear of its first layer."""
    generator, lora = torch.Generator().manual_seed(3), {}
    for name, tensor in clip.patcher.model_state_dict().items():
        if tensor.dim() == 2 and name.endswith(".weight") and ".0." in name:
            path = f"text_encoders.{name.removesuffix('.weight')}"
            lora[f"{path}.lora_up.weight"] = torch.randn(tensor.shape[0], 4, generator=generator) / 10
            lora[f"{path}.lora_down.weight"] = torch.randn(4, tensor.shape[1], generator=generator) / 10
    assert len(lora) >= 14
    return comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.7)[1]


QWEN3 = next(tiny for tiny in TINY if tiny.clip_type == "lumina2")


@pytest.mark.skipif(not QWEN3.is_known, reason="this ComfyUI has no Qwen3 4B")
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_a_lora_is_comfyuis_on_the_dense_twin(double_quant, tmp_path, monkeypatch, clip_copies):
    make_small(monkeypatch, QWEN3)
    twin = stock(QWEN3, dense_twin(save(QWEN3, tmp_path, double_quant=double_quant)))
    plain = encoded(twin, QWEN3)
    wanted = encoded(with_lora(twin), QWEN3)
    assert not torch.equal(plain["cond"], wanted["cond"])
    loaded = load_encoders([read_encoder_file(tmp_path)], QWEN3.clip_type)
    for budget in (loaded.patcher.model_size(), None):
        clip = streamed_clip(loaded, Residency(budget_bytes=budget and 2 * budget), None)
        assert same(encoded(with_lora(clip), QWEN3), wanted)
        assert bool(clip.patcher.model.streaming.streamer.plan.streamed) == (budget is not None)
        assert same(encoded(clip, QWEN3), plain)


@pytest.mark.skipif(not QWEN3.is_known, reason="this ComfyUI has no Qwen3 4B")
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["fp4", "nf4"])
def test_fp4_and_shards_are_read_from_any_shard_of_transformers_folder(
    quant_type, double_quant, tmp_path, monkeypatch, clip_copies
):
    make_small(monkeypatch, QWEN3)
    model = save(QWEN3, tmp_path, double_quant=double_quant, quant_type=quant_type, shards="200KB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    wanted = encoded(stock(QWEN3, dense_twin(model)), QWEN3)
    for chosen in (shards[0], shards[-1], tmp_path):
        file = read_encoder_file(chosen)
        assert {weight.state.quant_type for weight in file.packed.values()} == {quant_type}
        loaded = load_encoders([file], QWEN3.clip_type)
        clip = streamed_clip(loaded, Residency(budget_bytes=loaded.patcher.model_size()), None)
        assert same(encoded(clip, QWEN3), wanted)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        read_encoder_file(shards[0])
