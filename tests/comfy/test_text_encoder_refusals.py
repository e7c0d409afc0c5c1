"""Text encoders of Flux.1 that are refused, and what is said then; and what looks like one of them and is taken."""

import checkpoint_layout as layout
import comfy.sd
import pytest
import torch
from encoders_of_flux import all_in_one, dense_reference
from safetensors.torch import load_file, save_file

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.models import transformers as flux
from flux_nf4.nf4_loader.models.text_encoders import load_dual_clip

pytestmark = pytest.mark.usefixtures("tiny_encoders")


def test_encoders_of_other_shapes_are_refused_with_the_files_name(t5, clip_l, tmp_path):
    _, path = t5()
    state = load_file(clip_l)
    state["text_model.final_layer_norm.weight"] = torch.ones(32).half()
    catalogue = read_catalogue(all_in_one(tmp_path / "flux.safetensors", state, load_file(path)))
    with pytest.raises(CheckpointError, match=r"(?s)^flux\.safetensors: ComfyUI does not take its .*VAE .*\[32\]"):
        flux.load_clip_and_vae(catalogue, [])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"decoder.conv_in.weight": (512,)}, r"ComfyUI does not take its text encoders or VAE \(IndexError: "),
        ({"decoder.conv_in.weight": None}, r"ComfyUI does not recognise its VAE\. "),
    ],
    ids=["of another shape", "missing"],
)
def test_a_vae_that_comfyui_does_not_take_is_refused(changed, said, t5, clip_l, tmp_path, monkeypatch):
    shapes = {name: shape for name, shape in (layout.vae() | changed).items() if shape is not None}
    monkeypatch.setattr(layout, "vae", lambda: shapes)
    catalogue = read_catalogue(all_in_one(tmp_path / "flux.safetensors", load_file(clip_l), load_file(t5()[1])))
    with pytest.raises(CheckpointError, match=rf"^flux\.safetensors: {said}"):
        flux.load_clip_and_vae(catalogue, [])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_ram_is_not_taken_for_a_damaged_file(error, t5, clip_l, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", fail)
    monkeypatch.setattr(comfy.sd, "load_state_dict_guess_config", fail)
    catalogue = read_catalogue(all_in_one(tmp_path / "flux.safetensors", load_file(clip_l), load_file(t5()[1])))
    for load in (lambda: load_dual_clip([clip_l, t5()[1]], []), lambda: flux.load_clip_and_vae(catalogue, [])):
        with pytest.raises(type(error)) as raised:
            load()
        assert raised.value is error


def test_a_clip_l_that_comfyui_does_not_take_is_refused(t5, clip_l, tmp_path):
    save_file(load_file(clip_l) | {"text_projection": torch.ones(4)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"ComfyUI does not take it with odd\.safetensors \(IndexError: "):
        load_dual_clip([tmp_path / "odd.safetensors", t5()[1]], [])


@pytest.mark.parametrize("name", ["encoder.block.0.layer.1.DenseReluDense.wo.weight", "shared.weight"])
@pytest.mark.parametrize("is_4bit", [True, False], ids=["nf4", "dense"])
def test_a_t5_without_one_of_its_tensors_is_refused(name, is_4bit, t5, clip_l, tmp_path):
    """ComfyUI computes with memory that nobody has filled."""
    model, path = t5()
    dense = dense_reference(model).half().state_dict()
    state = load_file(path) if is_4bit else {name: tensor.clone() for name, tensor in dense.items()}
    del state[name]
    if name == "shared.weight":
        state.pop("encoder.embed_tokens.weight", None)
    save_file(state, tmp_path / "t5.safetensors")
    said = rf"tensors of the text encoder are missing \(1\): {name}\. The file is incomplete"
    with pytest.raises(CheckpointError, match=rf"^t5\.safetensors: {said}"):
        load_dual_clip([clip_l, tmp_path / "t5.safetensors"], [])
    catalogue = read_catalogue(all_in_one(tmp_path / "flux.safetensors", load_file(clip_l), state))
    with pytest.raises(CheckpointError, match=rf"^flux\.safetensors: {said}"):
        flux.load_clip_and_vae(catalogue, [])


@pytest.mark.parametrize("is_4bit", [True, False], ids=["nf4", "dense"])
def test_the_embedding_of_a_t5_may_have_its_other_name(is_4bit, t5, clip_l, tmp_path):
    model, path = t5()
    dense = dense_reference(model).half().state_dict()
    state = load_file(path) if is_4bit else {name: tensor.clone() for name, tensor in dense.items()}
    expected = state.pop("shared.weight")
    state["encoder.embed_tokens.weight"] = expected.clone()
    save_file(state, tmp_path / "t5.safetensors")
    catalogue = read_catalogue(all_in_one(tmp_path / "flux.safetensors", load_file(clip_l), state))
    for clip in (load_dual_clip([clip_l, tmp_path / "t5.safetensors"], []), flux.load_clip_and_vae(catalogue, [])[0]):
        found = clip.cond_stage_model.t5xxl.transformer.shared.weight
        assert torch.equal(found.to(expected.dtype), expected)


def test_a_clip_l_without_one_of_its_tensors_is_refused(t5, clip_l, tmp_path):
    """It may lack its projection, which Flux does not look at."""
    state = load_file(clip_l)
    assert not any("text_projection" in name for name in state)
    state.pop("text_model.embeddings.position_embedding.weight")
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"^short\.safetensors: .*missing \(1\): .*position_embedding\.weight\."):
        load_dual_clip([tmp_path / "short.safetensors", t5()[1]], [])


def test_two_files_of_one_kind_are_refused(t5, clip_l):
    with pytest.raises(
        CheckpointError,
        match=r"same kind \(clip_l\) as clip_l\.safetensors in the other input: pick CLIP-L",
    ):
        load_dual_clip([clip_l, clip_l], [])


def test_a_file_that_is_no_text_encoder_is_refused(clip_l, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"^other\.safetensors: it is neither CLIP-L .* nor T5"):
        load_dual_clip([clip_l, tmp_path / "other.safetensors"], [])
