"""Files of text encoders in the nodes: loaded, refused by name, planned by the page, saved and loaded again."""

import asyncio
import json
import logging
from contextlib import nullcontext

import comfy.sd
import folder_paths
import pytest
import torch
from fake_registrar import FakeRegistrar
from safetensors.torch import load_file, save_file
from there_and_back import Copied, move
from tiny_encoders import (
    CLIP_L,
    T5,
    TINY,
    dense_twin,
    for_comfyui,
    make_small,
    save,
    save_clip_l,
    save_t5,
    tekken,
    tokens_of,
)

from flux_nf4.encoders import load_encoders
from flux_nf4.nf4_loader.checkpoint.encoder_file import read_encoder_file
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models import streamed_encoders
from flux_nf4.nf4_loader.models.tokenizers import tokenizer_tensors
from flux_nf4.nf4_loader.saving.model_sources import sources_of_encoders
from flux_nf4.nf4_loader.saving.quantise import QuantSettings
from flux_nf4.nf4_loader.saving.save import save_quantised
from flux_nf4.nodes import NODE_CLASS_MAPPINGS
from flux_nf4.offload import file_map, pinning
from flux_nf4.offload.file_map import FileMapError
from flux_nf4.offload.host_memory import keep_host_memory
from flux_nf4.offload.plan import Residency
from flux_nf4.page.answers import answer_for
from flux_nf4.page.encoder_plan import encoder_other_bytes, encoder_sizes

QWEN3 = next(tiny for tiny in TINY if tiny.clip_type == "lumina2")
MISTRAL = TINY[0]
DUAL = {"l": [[(1, 1.0)] * 77], "t5xxl": [[(3, 1.0), (14, 1.2), (159, 1.0), (1, 1.0)]]}


@pytest.fixture
def qwen3(tmp_path, monkeypatch):
    """The file of a Qwen3 4B, in the folder that the nodes look into."""
    if not QWEN3.is_known:
        pytest.skip("this ComfyUI has no Qwen3 4B")
    make_small(monkeypatch, QWEN3)
    monkeypatch.setattr(folder_paths, "get_full_path", lambda _, name: str(tmp_path / name))
    model = save(QWEN3, tmp_path)
    return tmp_path / "model.safetensors", model


@pytest.fixture
def load():
    """A function: what *Load 4-bit Text Encoder (streamed)* gives."""
    node = NODE_CLASS_MAPPINGS["Load4BitTextEncoderStreamed"]()
    return lambda *given, **others: node.load_clip(*given, **others)[0]


def encoded(clip, tokens):
    with torch.inference_mode():
        return clip.encode_from_tokens(tokens).clone()


def test_the_node_reads_a_file_once_for_all_budgets(qwen3, load, clip_copies):
    with torch.inference_mode():  # as ComfyUI runs nodes
        first = load("model.safetensors", "lumina2")
    wanted = encoded(first, tokens_of(QWEN3.key))
    second = load("model.safetensors", "lumina2", vram_budget_gb=first.patcher.model_size() / 2**30)
    assert second.cond_stage_model is first.cond_stage_model
    assert torch.equal(encoded(second, tokens_of(QWEN3.key)), wanted)


def stock_of(model):
    """ComfyUI's own CLIP of the dense twin of a Qwen3 4B."""
    state = for_comfyui(QWEN3, dense_twin(model))
    return comfy.sd.load_text_encoder_state_dicts([state], clip_type=comfy.sd.CLIPType.LUMINA2)


@pytest.fixture
def dual(tmp_path, monkeypatch):
    """The files of a T5 in NF4 and a dense CLIP-L; transformers' T5, and ComfyUI's options for both."""
    monkeypatch.setattr("comfy.model_management.text_encoder_dtype", lambda *_, **__: torch.float32)
    monkeypatch.setattr(folder_paths, "get_full_path", lambda _, name: str(tmp_path / name))
    small = {"t5xxl_model_config": dict(T5, num_layers=2), "model_config": dict(CLIP_L)}
    small["clip_l_model_config"] = dict(CLIP_L)
    made = streamed_encoders.options_for
    monkeypatch.setattr(streamed_encoders, "options_for", lambda files: made(files) | small)
    save_clip_l(tmp_path)
    return save_t5(tmp_path), small


def test_t5_and_clip_l_of_two_files_are_loaded_in_either_order(dual, tmp_path, load, clip_copies):
    model, small = dual
    clip_l, t5 = load_file(tmp_path / "clip_l.safetensors"), dense_twin(model)
    stock = comfy.sd.load_text_encoder_state_dicts([clip_l, t5], clip_type=comfy.sd.CLIPType.FLUX, model_options=small)
    wanted = encoded(stock, DUAL)
    for names in (("t5/model.safetensors", "clip_l.safetensors"), ("clip_l.safetensors", "t5/model.safetensors")):
        clip = load(names[0], "flux", names[1])
        assert sum(isinstance(module, Linear4bit) for module in clip.cond_stage_model.modules()) == 12
        assert torch.equal(encoded(clip, DUAL), wanted)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: Flux\.1 needs two text encoders"):
        load("t5/model.safetensors", "flux")
    with pytest.raises(CheckpointError, match="type chroma has one text encoder: set the second"):
        load("t5/model.safetensors", "chroma", "t5/model.safetensors")
    with pytest.raises(CheckpointError, match="the same text encoder"):
        load("t5/model.safetensors", "flux", "t5/model.safetensors")


class Vae:
    first_stage_model = torch.nn.Module()

    def get_sd(self):
        return {}


def test_what_is_in_4_bits_in_two_files_stays_so_in_an_all_in_one_file(dual, load, tmp_path, clip_copies):
    """All that bitsandbytes wrote is copied. A patched weight is saved as a dense one."""
    files = [load_file(tmp_path / name) for name in ("t5/model.safetensors", "clip_l.safetensors")]
    query, key = (f"encoder.block.1.layer.0.SelfAttention.{part}.weight" for part in "qk")
    clip, prefix = load("t5/model.safetensors", "flux", "clip_l.safetensors"), "text_encoders.t5xxl.transformer."
    assert clip.patcher.add_patches({f"t5xxl.transformer.{query}": ("diff", (torch.ones(128, 128),))})
    save_quantised(tmp_path / "made.safetensors", sources_of_encoders(clip, Vae()), QuantSettings())
    made = load_file(tmp_path / "made.safetensors")
    packed = {name for name in files[0] if ".weight." in name} | {key}
    assert len(packed) > 30
    for name in packed:
        if not name.startswith(query):
            assert torch.equal(made[prefix + name], files[0][name]), name
    assert [name for name in made if name.startswith(prefix + query)] == [prefix + query]
    assert made[prefix + query].shape == (128, 128)
    fc1 = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(made[f"text_encoders.clip_l.transformer.{fc1}"].float(), files[1][fc1].float())


def changed(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("norm.weight"), r"are missing \(1\): model.norm.weight"),
        (
            lambda state: state.update({"embed_tokens.weight": torch.ones(7, 320)}),
            r"ComfyUI does not take it .*embed_tokens.weight.* shape \(7, 320\); needed is \(400, 320\)",
        ),
        (
            lambda state: state.update({"layers.0.input_layernorm.weight": torch.ones(7)}),
            "ComfyUI does not take it .*size mismatch",
        ),
        (lambda state: state.update({"model.norm.weight": torch.ones(7)}), "is the same tensor of the model"),
        (lambda state: state.update({"layers.0.mlp.gate_proj.SCB": torch.ones(7)}), r"8-bit LLM\.int8"),
        (lambda state: state.update({"layers.0.mlp.gate_proj.comfy_quant": torch.ones(7)}), "CLIPLoader"),
        (lambda state: state.pop("layers.1.mlp.gate_proj.weight.absmax"), "'model?.*absmax' is not in the file|absmax"),
    ],
)
def test_a_damaged_file_is_refused_by_name(change, said, qwen3, load):
    changed(qwen3[0], change)
    with pytest.raises(CheckpointError, match=rf"(?s)^model\.safetensors: .*({said})"):
        load("model.safetensors", "lumina2")


def test_a_file_for_another_node_or_type_is_refused_with_the_right_one(qwen3, load, tiny_file, monkeypatch):
    path, model = qwen3
    with pytest.raises(CheckpointError, match="it is Qwen3 4B, which is for type flux2 or lumina2, not qwen_image"):
        load("model.safetensors", "qwen_image")
    save_file(dense_twin(model), path)
    with pytest.raises(CheckpointError, match=r"Qwen3 4B with dense weights.*'CLIPLoader'.*'Stream Text Encoder'"):
        load("model.safetensors", "lumina2")
    monkeypatch.setattr(folder_paths, "get_full_path", lambda *_: str(tiny_file))
    with pytest.raises(CheckpointError, match=r"transformer and no text encoder.*'Load Flux NF4 UNet \(streamed\)'"):
        load("tiny.safetensors", "lumina2")


def test_a_type_that_this_comfyui_lacks_is_refused(qwen3, load, monkeypatch):
    monkeypatch.setattr(streamed_encoders, "_knows", lambda path: "z_image" not in path)
    with pytest.raises(CheckpointError, match=r"This ComfyUI does not encode .* \(it has no .*z_image.te\): update"):
        load("model.safetensors", "lumina2")
    assert "lumina2" not in streamed_encoders.supported_types()


def test_the_tokenizer_is_found_beside_the_file_or_asked_for(tmp_path, monkeypatch):
    make_small(monkeypatch, QWEN3)
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    save(MISTRAL, folder)
    file = read_encoder_file(folder / "model.safetensors")
    assert len({name.split(".")[2] for name in file.tensors if name.startswith("model.layers.")}) == 30
    assert not any(name.startswith(("vision", "multi", "lm_head")) for name in file.tensors)
    given = bytes(tokenizer_tensors(file, ())["tekken_model"].tolist())
    assert given == tekken()
    (folder / "tekken.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"(?s)the tokenizer of Mistral 3 is missing.*'tekken.json'.*'tokenizer.j"
    ):
        tokenizer_tensors(file, ())
    (tmp_path / "tokenizer").mkdir()
    byte_level = {chr(byte if byte > 32 else byte + 256): 20 + byte for byte in range(127)}
    special = [{"id": number, "content": f"<{number}>"} for number in range(20)]
    document = {"added_tokens": special, "model": {"vocab": byte_level | {"<0>": 0}}}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    found = json.loads(bytes(tokenizer_tensors(file, ())["tekken_model"].tolist()))
    wanted = json.loads(tekken())
    assert found["vocab"] == wanted["vocab"][:127]
    assert found["special_tokens"] == wanted["special_tokens"]
    assert found["config"] == {"default_vocab_size": 147, "default_num_special_tokens": 20}
    for bad in (
        "{",
        "[]",
        '{"added_tokens": []}',
        '{"added_tokens": [{"id": 1, "content": "a"}], "model": {"vocab": {}}}',
    ):
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(bad, "utf-8")
        with pytest.raises(CheckpointError, match=r"^tokenizer\.json: it is no tokenizer of Mistral 3"):
            tokenizer_tensors(file, ())


def test_the_page_plans_what_is_loaded(qwen3, clip_copies, monkeypatch):
    monkeypatch.setattr("flux_nf4.page.encoder_plan.LARGE_BYTES", 50_000)
    path, _ = qwen3
    file = read_encoder_file(path)
    loaded = load_encoders([file], "lumina2")
    streaming = loaded.patcher.model.streaming
    sizes = encoder_sizes(file, streamed_encoders.encoder_dtype(file))
    sort = [(size.kind, sorted(size.tiles), size.small) for size in streaming.streamer.sizes()]
    assert [(size.kind, sorted(size.tiles), size.small) for size in sizes] == sort
    logit_scale = 4  # a number of ComfyUI's own
    others = encoder_other_bytes(file, streamed_encoders.encoder_dtype(file))
    assert streaming.other_bytes == others + logit_scale
    answer = json.loads(asyncio.run(answer_for(path, "text_encoders", Residency(), None)))
    assert [block["kind"] for block in answer["blocks"]] == ["text"] * 3
    refused = json.loads(asyncio.run(answer_for(path, "diffusion_models", Residency(), None)))
    assert "'Load 4-bit Text Encoder (streamed)'" in refused["problem"]


@pytest.mark.parametrize("is_short", [False, True])
def test_where_ram_is_short_it_makes_room_and_stays_in_its_file(is_short, qwen3, load, clip_copies, free_ram, caplog):
    kept = torch.nn.Linear(2, 2)  # of another encoder: its RAM is its own while it is on the device
    keep_host_memory(kept)
    move(kept, "meta")
    free_ram(100_000 if is_short else 1 << 40)
    with caplog.at_level(logging.INFO):
        clip = load("model.safetensors", "lumina2")
    with pytest.raises(Copied) if is_short else nullcontext():
        move(kept, "cpu")
    file = clip.patcher.model.streaming.streamer.file
    said = [line for line in caplog.messages if "packed weights stay in the file" in line]
    (where,) = [line for line in caplog.messages if "text encoder model.safetensors: " in line]
    assert (len(said), bool(file.nbytes)) == (is_short, is_short)
    assert where.endswith(")") == (not is_short), "the reason to read them"
    assert torch.equal(encoded(clip, tokens_of(QWEN3.key)), encoded(stock_of(qwen3[1]), tokens_of(QWEN3.key)))


def test_a_file_that_cannot_be_brought_in_is_named(qwen3, load, clip_copies, monkeypatch):
    def fail(item, *_):
        raise FileMapError(item.file.path, "reading it failed")

    monkeypatch.setitem(pinning.REGISTRARS, "cpu", FakeRegistrar())
    monkeypatch.setattr(file_map, "_bring_in", fail)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: reading it failed"):
        load("model.safetensors", "lumina2")


def test_too_little_ram_for_what_has_to_be_read_is_an_error(qwen3, load, free_ram):
    free_ram(100)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: loading it takes .* of RAM; 0\.00 GiB are free"):
        load("model.safetensors", "lumina2")


@pytest.mark.parametrize("absmax", ["fp32", "nested"])
def test_what_is_quantised_and_saved_is_loaded_again(absmax, qwen3, load, tmp_path, monkeypatch, clip_copies):
    _, model = qwen3
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    stock = stock_of(model)
    wanted = encoded(stock, tokens_of(QWEN3.key))
    node = NODE_CLASS_MAPPINGS["QuantiseSaveTextEncoder"]()
    (path,) = node.save(stock, "text_encoders/saved", "output", "nf4", absmax, "")["ui"]["text"]
    again = load(path.removeprefix(str(tmp_path) + "/"), "lumina2")
    got = encoded(again, tokens_of(QWEN3.key))
    # Its weights have been in NF4 already, so that quantising them changes nothing but a nested absmax.
    assert torch.equal(got, wanted) == (absmax == "fp32")
    assert (got - wanted).norm() < 0.01 * wanted.norm()
    (copied,) = node.save(again, "text_encoders/copied", "output", "nf4", absmax, "")["ui"]["text"]
    first, second = load_file(path), load_file(copied)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
