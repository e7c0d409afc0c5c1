"""Files made to do harm, or by tools that nobody knows: refused in few words, which no terminal and no page obeys."""

import io
import json
import time
from pathlib import Path

import pytest
import torch
from packed_tensors import packed_tensors
from safetensors.torch import save_file
from sparse_file import write_sparse

from flux_nf4.nf4_loader.checkpoint import catalogue
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.header import natural_key, read_header
from flux_nf4.nf4_loader.checkpoint.require import require_transformer
from flux_nf4.nf4_loader.checkpoint.shards import read_checkpoint_header

QKV = "double_blocks.0.img_attn.qkv.weight"


def refusal(action, *arguments):
    with pytest.raises(CheckpointError) as caught:
        action(*arguments)
    return str(caught.value)


def load(path):
    require_transformer(read_catalogue(path))


def test_megabytes_of_metadata_are_read_as_safetensors_reads_them(tmp_path):
    tags = json.dumps({f"tag {number}": number for number in range(450_000)})
    save_file({"a": torch.ones(2)}, tmp_path / "trained.safetensors", metadata={"ss_tag_frequency": tags})
    header = read_header(tmp_path / "trained.safetensors")
    assert header.tensors.keys() == {"a"}
    assert header.metadata["ss_tag_frequency"] == tags


def test_more_tensors_than_any_model_has_are_refused_before_they_are_parsed(write_safetensors, monkeypatch):
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    raw = "{" + ",".join(entry.format(number) for number in range(50_001)) + "}"
    path = write_safetensors(raw.encode())
    monkeypatch.setattr(json, "loads", None)
    assert "its header lists more than 50,000 tensors" in refusal(read_header, path)


@pytest.mark.parametrize("name", ["a\x1b[2Jb.weight", "a\nb.weight", "a\x07.weight", "x" * 501])
def test_a_name_that_is_none_is_refused_and_shown_escaped(name, tmp_path):
    save_file({name: torch.ones(1)}, tmp_path / "crafted.safetensors")
    message = refusal(read_header, tmp_path / "crafted.safetensors")
    assert "this is no name of a tensor" in message
    assert message.isprintable()
    assert len(message) < 300


def test_what_an_index_says_is_shown_escaped(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone\x1b[2J.safetensors"}}))
    message = refusal(read_checkpoint_header, index)
    assert "gone\\x1b[2J.safetensors" in message
    assert message.isprintable()


def test_no_error_names_a_folder(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    messages = [
        refusal(read_header, tmp_path / "gone.safetensors"),
        refusal(read_header, tmp_path / "a.safetensors"),
        refusal(read_checkpoint_header, tmp_path / "gone.safetensors.index.json"),
        refusal(read_checkpoint_header, tmp_path / "model-00001-of-00002.safetensors"),
        refusal(read_checkpoint_header, tmp_path / "a.safetensors"),
    ]
    assert not any(str(tmp_path) in message for message in messages)


@pytest.mark.parametrize("fails", ["open", "read"])
def test_a_disk_that_fails_at_a_quant_state_is_an_error_without_a_folder(fails, tmp_path, monkeypatch):
    path = tmp_path / "flux.safetensors"
    write_sparse(path, packed_tensors(QKV, (96, 64), "nf4", 64))
    header = read_checkpoint_header(path)
    monkeypatch.setattr(catalogue, "read_checkpoint_header", lambda _: header)
    failing = FailingFile(path, "rb")

    def opened(self, *_, **__):
        if fails == "open":
            raise OSError(5, "Input/output error", str(self))
        return failing

    monkeypatch.setattr(Path, "open", opened)
    assert refusal(read_catalogue, path) == (
        "flux.safetensors: reading it failed (Input/output error). Check the disk, then try again."
    )


class FailingFile(io.FileIO):
    """A file on a disk that fails."""

    def readinto(self, buffer):
        raise OSError(5, "Input/output error")


def test_blocks_beyond_any_model_are_refused(tmp_path):
    tensors = packed_tensors(QKV, (96, 64), "nf4", 64)
    tensors |= {f"double_blocks.{number}.a.b": ("F16", (4,), None) for number in range(20_000)}
    write_sparse(tmp_path / "crafted.safetensors", tensors)
    began = time.thread_time()
    message = refusal(load, tmp_path / "crafted.safetensors")
    assert "it has 20,000 blocks; no Flux.1 model has more than 500" in message
    assert time.thread_time() - began < 20, "seconds, not minutes"


def test_a_number_of_thousands_of_digits_is_no_block(tmp_path):
    digits = "1" * 400
    tensors = packed_tensors(QKV, (96, 64), "nf4", 64) | {f"double_blocks.{digits}.a.b": ("F16", (4,), None)}
    write_sparse(tmp_path / "crafted.safetensors", tensors)
    catalogue = read_catalogue(tmp_path / "crafted.safetensors")
    assert catalogue.found.family.block_of(f"double_blocks.{digits}.a.b") is None
    assert natural_key(f"a.{'2' * 5000}") > natural_key("a.10")


# Files that other tools make


def dense(*names):
    return {name: torch.ones(8, 8).bfloat16() for name in names}


CHROMA = dense(QKV, "distilled_guidance_layer.in_proj.weight")
FLUX2 = dense("double_stream_modulation_img.linear.weight", "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight")
QWEN = dense(
    "txt_norm.weight",
    *(f"transformer_blocks.0.{name}.weight" for name in ("attn.add_q_proj", "img_mod.1", "img_mlp.net.0.proj")),
)
HUNYUAN = dense(
    "double_blocks.0.img_attn_qkv.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight"
)


@pytest.mark.parametrize(
    ("tensors", "says", "never"),
    [
        (CHROMA, ("it is a Chroma model with dense BF16", "'Quantise Flux to NF4 and Save'"), "commands/quantise.py"),
        (FLUX2, ("it is a Flux 2 model with dense BF16", "in the names of diffusers: make an NF4"), "Load Diffusion"),
        (QWEN, ("it is a Qwen-Image model with dense BF16", "'Load Diffusion Model'", "'Quantise Flux"), "command"),
        (HUNYUAN, ("it is a HunyuanVideo model with dense", "'Stream Model Blocks'."), "NF4 file"),
        (
            dense("single_transformer_blocks.0.proj_mlp.weight", "distilled_guidance_layer.in_proj.weight"),
            ("it is a Chroma model in the layout of diffusers, dense",),
            "NF4 file",
        ),
        (
            dense(f"model.diffusion_model.model.diffusion_model.{QKV}"),
            ("names of its Flux.1 transformer begin with 'model.diffusion_model.model.diffusion_model.'",),
            "T5",
        ),
        (dense(f"net.{QKV}", "encoder.block.0.layer.0.SelfAttention.q.weight"), ("begin with 'net.'",), "T5"),
    ],
    ids=[
        "Chroma",
        "FLUX.2 of diffusers",
        "Qwen-Image",
        "HunyuanVideo",
        "Chroma of diffusers",
        "a doubled prefix",
        "another prefix",
    ],
)
def test_the_advice_is_for_the_model_that_it_is(tensors, says, never, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    message = refusal(load, tmp_path / "model.safetensors")
    for fragment in says:
        assert fragment in message
    assert never not in message


def test_a_shard_of_a_dense_model_is_sent_to_what_takes_its_folder(tmp_path):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    layers = [f"single_transformer_blocks.0.{layer}.weight" for layer in ("attn.to_q", "attn.to_k", "attn.to_v")]
    save_file(dense("single_transformer_blocks.0.proj_mlp.weight", *layers), tmp_path / names[0])
    save_file(dense("proj_out.weight"), tmp_path / names[1])
    message = refusal(load, tmp_path / names[0])
    assert "one of the shards of a dense Flux.1 model" in message
    assert "commands/quantise.py" in message
    assert "Load Diffusion Model" not in message


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_the_index_of_a_variant_is_one(index, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.fp16-00001-of-00001.safetensors")
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "model.fp16-00001-of-00001.safetensors"}}))
    for path in (tmp_path / index, tmp_path):
        assert read_checkpoint_header(path).tensors.keys() == {"a"}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_what_trainers_leave_beside_a_model_is_no_part_of_it(prefix, tmp_path):
    tensors = packed_tensors(prefix + QKV, (96, 64), "nf4", 64)
    beside = {"first_stage_model.decoder.conv_in.bias", "model_ema.decay", "cond_stage_model.a.weight"}
    tensors |= dict.fromkeys(beside, ("F32", (4,), None)) | {"vae.a": ("F32", (1,), None)}
    write_sparse(tmp_path / "trained.safetensors", tensors)
    catalogue = read_catalogue(tmp_path / "trained.safetensors")
    assert catalogue.transformer.keys() == {QKV}
    assert catalogue.others.keys() == beside
    assert catalogue.vae.keys() == {"vae.a"}
