"""What lies beside the transformer in a file is no reason to refuse it, and goes into no transformer's file."""

import json
import shutil

import gguf
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from saved_files import check, values, write_gguf

from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.header import read_header
from flux_nf4.nf4_loader.saving.quantise import QuantSettings
from flux_nf4.nf4_loader.saving.save import save_quantised
from flux_nf4.nf4_loader.saving.sources import sources_of_entries, sources_of_file


def save(source, path):
    save_quantised(path, sources_of_file(source, all_in_one=False), QuantSettings())
    return load_file(path)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    "beside",
    [
        {"global_step": torch.tensor([5])},
        {"step": torch.tensor(3), "is_ema": torch.tensor(True)},
        {"model_ema.decay": torch.tensor(0.9), "first_stage_model.decoder.conv_in.bias": torch.ones(4)},
    ],
    ids=["a step", "a step and a flag", "an EMA and a VAE"],
)
def test_what_trainers_leave_in_a_file_is_left_out_and_named(prefix, beside, tmp_path, caplog):
    save_file({prefix + name: tensor for name, tensor in values().items()} | beside, tmp_path / "trained.safetensors")
    check(save(tmp_path / "trained.safetensors", tmp_path / "made.safetensors"), values())
    assert f"{len(beside)} tensors do not belong to the transformer and are left out of the new file" in caplog.text
    for name in beside:
        assert name in caplog.text


def test_whole_numbers_where_a_weight_should_be_are_refused(tmp_path):
    tensors = values() | {"img_in.weight": torch.ones(256, 64, dtype=torch.int64)}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"^other\.safetensors: "):
        save(tmp_path / "other.safetensors", tmp_path / "made.safetensors")


def test_encoders_in_a_gguf_are_left_out_and_named(tmp_path, caplog):
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "flux")
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in values(torch.float32).items()}
    t5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    for name, tensor in (tensors | {t5: torch.ones(8, 8), "first_stage_model.a": torch.ones(4)}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = save(tmp_path / "whole.gguf", tmp_path / "made.safetensors")
    assert {name.split(".")[0] for name in made} == {name.split(".")[0] for name in values()}
    assert "2 tensors do not belong to the transformer" in caplog.text


def test_the_end_of_a_name_may_be_in_capitals(tmp_path):
    expected = write_gguf(tmp_path / "flux.gguf", gguf.GGMLQuantizationType.Q8_0)
    shutil.move(tmp_path / "flux.gguf", tmp_path / "FLUX.GGUF")
    check(save(tmp_path / "FLUX.GGUF", tmp_path / "made.safetensors"), expected)


def test_the_index_of_a_variant_is_taken(tmp_path):
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2, guidance_embeds=True
    ).bfloat16()
    model.save_pretrained(tmp_path / "v", variant="fp16", max_shard_size="4MB")
    (index,) = (tmp_path / "v").glob("*index*")
    assert save(index, tmp_path / "a.safetensors").keys() == save(tmp_path / "v", tmp_path / "b.safetensors").keys()


def test_a_header_larger_than_its_room_changes_nothing(tmp_path):
    shape = [0] + [10**18] * 63
    header = {f"vae.{n}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for n in range(50)}
    raw = json.dumps(header).encode()
    (tmp_path / "in.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"the file that was there")
    sources = sources_of_entries(read_header(tmp_path / "in.safetensors").tensors)
    with pytest.raises(CheckpointError, match=r"^out\.safetensors: its header takes .* Nothing was changed there"):
        save_quantised(out, sources, QuantSettings())
    assert out.read_bytes() == b"the file that was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]
