"""Quantise and save, in the real server: an all-in-one file comes out as it went in, and the loader takes it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open


@pytest.fixture
def saving(workflow):
    """A function: a workflow that loads the checkpoint and saves its MODEL, with CLIP and VAE or without."""

    def make(all_in_one, **inputs):
        made = workflow()
        loader = next(key for key, node in made.items() if node["class_type"].startswith("MZ_"))
        inputs = {
            "model": [loader, 0],
            "filename_prefix": "checkpoints/saved",
            "folder": "output",
            "quant_type": "nf4",
            "absmax": "fp32",
            "keep_dense": "",
        } | inputs
        if all_in_one:
            inputs |= {"clip": [loader, 1], "vae": [loader, 2]}
        return {loader: made[loader], "90": {"class_type": "FluxNF4QuantiseSave", "inputs": inputs}}

    return make


@pytest.fixture
def saved(server):
    """A function: run a workflow that saves a file, which is gone after the test; returns its path."""
    paths = []

    def run(workflow):
        history = server.run(workflow)
        assert history["status"]["status_str"] == "success", history["status"]
        paths.append(Path(history["outputs"]["90"]["text"][0]))
        return paths[-1]

    yield run
    for path in paths:
        path.unlink()


def test_an_all_in_one_file_is_saved_as_it_was_loaded(saved, checkpoint, saving):
    path = saved(saving(all_in_one=True))
    with safe_open(checkpoint, "pt") as before, safe_open(path, "pt") as after:
        assert set(before.keys()) == set(after.keys())
        for name in list(before.keys()):
            assert torch.equal(
                *(file.get_tensor(name).contiguous().view(-1).view(torch.uint8) for file in (before, after))
            )
        assert after.metadata()["flux_nf4.source"] == checkpoint.name


def test_the_transformer_alone_is_saved_without_prefix_and_under_a_new_name_each_time(saved, saving):
    paths = [saved(saving(all_in_one=False, absmax=absmax)) for absmax in ("fp32", "nested")]
    assert paths[0] != paths[1]
    for path, nested in zip(paths, (False, True), strict=True):
        with safe_open(path, "pt") as file:
            assert "img_in.weight.absmax" in list(file.keys())
            assert ("img_in.weight.nested_absmax" in list(file.keys())) == nested
            assert not any(name.startswith(("text_encoders.", "vae.", "model.")) for name in list(file.keys()))


def test_a_file_for_a_models_folder_is_where_its_name_says(server, saved, saving):
    """Its first place has an older name; and the default prefix, for the output folder, begins with the folder's."""
    inputs = {"folder": "diffusion_models", "filename_prefix": "diffusion_models/flux1-nf4"}
    path = saved(saving(all_in_one=False, **inputs))
    assert path == server.base / "models" / "diffusion_models" / "flux1-nf4_00001_.safetensors"


def test_a_name_that_leaves_the_folder_is_refused(server, saving):
    history = server.run(saving(all_in_one=False, filename_prefix="../../escaped"))
    (error,) = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
    assert "filename_prefix ../../escaped leads out of this folder" in error["exception_message"]
    assert not list(server.base.parent.glob("escaped*"))


def test_clip_without_vae_is_refused(server, saving):
    asked = saving(all_in_one=True)
    del asked["90"]["inputs"]["vae"]
    history = server.run(asked)
    assert history["status"]["status_str"] == "error"
    (data,) = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
    assert "connect both CLIP and VAE for an all-in-one file, or neither" in data["exception_message"]
