"""A file whose layers have their real size, in a server whose ComfyUI is as it comes.

With ``T5_LAYERS=24`` the files are whole and stock ComfyUI loads MODEL, CLIP and VAE of the dense twin; with fewer, the
twin's CLIP and VAE come from our node, since stock ComfyUI always builds 24 layers.
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import environment
import pytest
import torch
from comfy_server import ComfyServer, drop_package, link_model
from make_checkpoint import Recipe, forget_weights, make_checkpoint, make_twin

T5_LAYERS = int(os.environ.get("T5_LAYERS", "1"))
RECIPE = Recipe(t5_layers=T5_LAYERS)
NONE_STAYS = {"double_blocks": 0, "single_blocks": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An NF4 file and its dense twin; gone after the tests (they are large)."""
    folder = tmp_path_factory.mktemp("real_size")
    nf4, twin = folder / "nf4.safetensors", folder / "twin.safetensors"
    make_checkpoint(nf4, RECIPE)
    make_twin(twin, replace(RECIPE, unet_only=T5_LAYERS < 24), torch.float32)
    forget_weights()
    yield nf4, twin
    nf4.unlink()
    twin.unlink()


@pytest.fixture(scope="module")
def run(comfyui, files, workflow, stock, picture_of, tmp_path_factory):
    """Three pictures, the bytes streamed for one, and values and maxima of the progress bar while the file was read.

    The old node computes the first on the CPU, without streaming; the new one streams for the second; the third is the
    dense twin's.
    """
    nf4, twin = files
    base = tmp_path_factory.mktemp("comfyui")
    drop_package(environment.ROOT, base)
    shutil.copy(Path(__file__).parent / "helper_nodes.py", base / "custom_nodes")
    link_model(nf4, base, "checkpoints")
    link_model(twin, base, "checkpoints" if T5_LAYERS == 24 else "diffusion_models")
    progress = []

    def on_message(message):
        if message["type"] == "progress" and message["data"]["node"] == "1":
            progress.append((message["data"]["value"], message["data"]["max"]))

    def asked():
        return workflow(ckpt_name=nf4.name, steps=1, padded=True)

    def stream(is_on):
        inputs = {"is_on": is_on, "small": False}
        server.run({"1": {"class_type": "TestStreamOnCpu", "inputs": inputs}})

    streaming = asked()
    streaming["1"] = {"class_type": "FluxNF4CheckpointLoaderStreamed", "inputs": {"ckpt_name": nf4.name} | NONE_STAYS}
    with ComfyServer(comfyui, base, ("--cpu",)) as server:
        ours = picture_of(server, asked(), on_message)
        server.free()  # else two models are in RAM
        stream(True)
        streamed = picture_of(server, streaming)
        stream(False)
        nbytes = int(re.findall(r"TestStreamOnCpu: (\d+) bytes", server.log.read_text("utf-8"))[-1])
        server.free()
        dense = picture_of(server, stock(asked(), twin.name, T5_LAYERS == 24))
    return SimpleNamespace(ours=ours, streamed=streamed, nbytes=nbytes, dense=dense, progress=progress)


def test_the_picture_equals_that_of_the_dense_twin(run):
    assert len(set(run.ours[2])) > 50, "the picture is too plain to prove anything"
    assert run.ours == run.dense


def test_so_does_the_streamed_one(run):
    assert run.nbytes > 100e6, "one block of each kind"
    assert run.streamed == run.dense


def test_the_progress_bar_moves_while_the_file_is_read(run):
    values = [value for value, _ in run.progress]
    assert values == sorted(values)
    assert values[-1] == run.progress[-1][1]
    assert len(set(values)) > 1, "newer ComfyUI sends a message a tenth of a second, no more"
