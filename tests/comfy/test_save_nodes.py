"""What the node that saves models refuses before it has quantised anything, and what it says then."""

import errno
import os
from types import SimpleNamespace

import checkpoint_layout
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file
from saved_files import values

from flux_nf4 import nodes_saving
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.saving.model_sources import stored_as_it_is
from flux_nf4.nf4_loader.saving.quantise import QuantSettings
from flux_nf4.nf4_loader.saving.save import save_quantised
from flux_nf4.nodes import NODE_CLASS_MAPPINGS

BOTH = ("clip_l", "t5xxl")


@pytest.fixture
def model(tiny_config):
    return comfy.sd.load_diffusion_model_state_dict(values())


@pytest.fixture
def save(model, tmp_path, monkeypatch):
    """A function: *Quantise and Save* with such a CLIP and VAE. Gives the files that it has written."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(nodes_saving, "sources_of_model", lambda _: [])
    monkeypatch.setattr(nodes_saving, "sources_of_encoders", lambda *_: [])
    saved = []
    monkeypatch.setattr(nodes_saving, "save_quantised", lambda path, *_, **__: saved.append(path) or path.touch())
    node = NODE_CLASS_MAPPINGS["FluxNF4QuantiseSave"]()

    def run(clip, vae, prefix="made"):
        node.save(model, prefix, "output", "nf4", "fp32", "", clip, vae)
        return saved

    return run


def clip_of(*parts):
    model = torch.nn.Module()
    for part in parts:
        model.add_module(part, torch.nn.Linear(2, 2))
    return SimpleNamespace(cond_stage_model=model)


def vae_of(channels, dimensions):
    return SimpleNamespace(latent_channels=channels, latent_dim=dimensions)


def test_the_parts_of_flux_are_taken(save):
    assert len(save(clip_of(*BOTH), vae_of(16, 2))) == 1


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (("qwen3_4b",), "has no CLIP-L and no T5-XXL"),
        (("clip_l",), "has no T5-XXL"),
        (("t5xxl",), "has no CLIP-L"),
        (("clip_l", "clip_g", "t5xxl"), "has clip_g, too"),
    ],
)
def test_a_clip_of_another_model_is_refused_before_anything_is_quantised(parts, found, save):
    with pytest.raises(CheckpointError, match=rf"^made_\d+_\.safetensors: the CLIP {found}\. .*DualCLIPLoader"):
        save(clip_of(*parts), vae_of(16, 2))


@pytest.mark.parametrize(("channels", "dimensions"), [(128, 2), (4, 2), (16, 3)], ids=["FLUX.2", "SD 1.5", "Wan"])
def test_a_vae_of_another_model_is_refused_before_anything_is_quantised(channels, dimensions, save):
    found = rf"latents of {channels} channels and {dimensions} dimensions; Flux\.1's have 16 and 2"
    with pytest.raises(CheckpointError, match=rf"the VAE makes {found}\. .*ae\.safetensors"):
        save(clip_of(*BOTH), vae_of(channels, dimensions))


def test_the_vae_of_a_flux_file_is_taken(save):
    state = {name: torch.zeros(shape) for name, shape in checkpoint_layout.vae().items()}
    assert len(save(clip_of(*BOTH), comfy.sd.VAE(sd=state))) == 1


def test_whole_numbers_are_saved_as_they_are(tmp_path):
    """A BatchNorm in a VAE counts its batches."""
    norm = torch.nn.BatchNorm2d(2)
    norm.num_batches_tracked += 7
    counts = {kind: torch.tensor([0, 1]).to(kind) for kind in (torch.bool, torch.int8, torch.int16, torch.int32)}
    state = norm.state_dict() | {str(kind): count for kind, count in counts.items()}
    sources = [stored_as_it_is(name, tensor) for name, tensor in state.items()]
    save_quantised(tmp_path / "made.safetensors", sources, QuantSettings())
    made = load_file(tmp_path / "made.safetensors")
    assert made.keys() == state.keys()
    for name, tensor in state.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor)


def test_a_file_where_a_folder_should_be_is_said(save, tmp_path):
    (tmp_path / "taken").write_bytes(b"a file")
    with pytest.raises(CheckpointError, match=r"taken/made cannot be used there \(Not a directory\)") as raised:
        save(clip_of(*BOTH), vae_of(16, 2), "taken/made")
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_made_is_said(number, save, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(CheckpointError, match=rf"cannot be used there \({os.strerror(number)}\)") as raised:
        save(clip_of(*BOTH), vae_of(16, 2), "new/made")
    assert str(tmp_path) not in str(raised.value)
