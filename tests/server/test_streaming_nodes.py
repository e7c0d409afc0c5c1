"""The loaders and the streaming node in the real server: one read for all, the old names, other nodes in between."""

import copy
import json

import pytest
import torch
from comfy_server import link_model
from make_checkpoint import make_twin
from small_recipe import small_recipe

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
READ = "NF4: reading the transformer of"


@pytest.fixture(scope="module")
def twin(server, tmp_path_factory):
    """The dense twin of the server's checkpoint, transformer only: a file for stock ComfyUI."""
    path = tmp_path_factory.mktemp("twin") / "twin.safetensors"
    make_twin(path, small_recipe(unet_only=True), torch.float32)
    link_model(path, server.base, "diffusion_models")
    yield path.name
    path.unlink()
    server.free()


@pytest.fixture
def reads(server):
    """A function: how often a transformer was read since the test began."""
    server.free()
    before = server.log.read_text("utf-8").count(READ)
    return lambda: server.log.read_text("utf-8").count(READ) - before


def with_model(workflow, node, between=()):
    """The workflow with the sampler's model from ``node``, through the nodes ``between`` (type, inputs)."""
    made = copy.deepcopy(workflow)
    made["20"] = node
    last = "20"
    for number, (kind, inputs) in enumerate(between, 21):
        made[str(number)] = {"class_type": kind, "inputs": {**inputs, "model": [last, 0]}}
        last = str(number)
    made["6"]["inputs"]["model"] = [last, 0]
    return made


def test_other_integers_read_nothing_again(workflow, picture, reads):
    first = picture(workflow(seed=21))
    for double, single in ((0, 0), (1, 1), (3, 9)):
        assert picture(workflow(seed=21, double_blocks_cuda_size=double, single_blocks_cuda_size=single)) == first
    assert reads() == 1


def test_two_loaders_of_one_file_read_it_once(workflow, picture, reads, checkpoint):
    expected = picture(workflow(seed=22))
    other = {"class_type": "FluxNF4CheckpointLoaderStreamed", "inputs": {"ckpt_name": checkpoint.name}}
    both = with_model(workflow(seed=22), other)
    assert picture(both) == expected
    both["20"]["inputs"]["vram_budget_gb"] = 3.5
    assert picture(both) == expected
    assert reads() == 1


def test_after_free_the_file_is_read_again_and_the_picture_is_the_same(server, workflow, picture, reads):
    expected = picture(workflow(seed=23))
    server.free()
    assert picture(workflow(seed=23)) == expected
    assert reads() == 2


def test_the_budget_that_is_too_small_says_the_least(server, workflow, checkpoint):
    small = {"class_type": "FluxNF4CheckpointLoaderStreamed", "inputs": {"ckpt_name": checkpoint.name}}
    small["inputs"]["vram_budget_gb"] = 0.0001
    history = server.run(with_model(workflow(seed=24), small))
    (data,) = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
    assert "is too small: with every block streamed this model takes" in data["exception_message"]


def test_old_graphs_of_dense_models_run_and_give_stock_comfyuis_picture(workflow, picture, twin):
    plain = {"class_type": "UNETLoader", "inputs": {"unet_name": twin, "weight_dtype": "default"}}
    expected = picture(with_model(workflow(seed=25), plain))
    counts = {"double_blocks_cuda_size": 7, "single_blocks_cuda_size": 7}
    patched = with_model(workflow(seed=25), plain, [("MZ_Flux1PartialLoad_Patch", counts)])
    assert picture(patched) == expected
    loader = {"class_type": "MZ_Flux1UnetLoader_cpuDynOffload", "inputs": {**plain["inputs"], **counts}}
    assert picture(with_model(workflow(seed=25), loader)) == expected
    streamed = with_model(workflow(seed=25), plain, [("StreamModelBlocks", {"vram_budget_gb": 2.0})])
    assert picture(streamed) == expected
    assert picture(with_model(workflow(seed=26), plain)) != expected, "the seed must matter"
    assert picture(with_model(workflow(seed=25), plain)) == expected, "the model it came from is as it was"


def test_the_old_checkpoint_loader_has_the_originals_inputs(server):
    name = "MZ_Flux1CheckpointLoader_cpuDynOffload"
    info = json.loads(server.get(f"/object_info/{name}"))[name]
    assert list(info["input"]["required"]) == ["ckpt_name", "double_blocks_cuda_size", "single_blocks_cuda_size"]
    assert info["output"] == ["MODEL", "CLIP", "VAE"]


def test_a_streamed_model_goes_through_other_nodes_as_a_dense_one_does(workflow, picture, twin, checkpoint):
    chain = [
        ("ModelSamplingFlux", {"max_shift": 1.3, "base_shift": 0.4, "width": 128, "height": 64}),
        ("DifferentialDiffusion", {}),
        ("StreamModelBlocks", {"double_blocks": 1}),
    ]
    plain = {"class_type": "UNETLoader", "inputs": {"unet_name": twin, "weight_dtype": "default"}}
    ours = {"class_type": "FluxNF4CheckpointLoaderStreamed", "inputs": {"ckpt_name": checkpoint.name}}
    expected = picture(with_model(workflow(seed=27), plain, chain[:2]))
    assert picture(with_model(workflow(seed=27), ours, chain)) == expected
    assert picture(with_model(workflow(seed=27), ours)) != expected, "the nodes must matter"


def test_merging_is_refused_with_advice(server, workflow, checkpoint, twin):
    made = workflow(seed=28)
    made["30"] = {"class_type": "UNETLoader", "inputs": {"unet_name": twin, "weight_dtype": "default"}}
    inputs = {"model1": ["1", 0], "model2": ["30", 0], "ratio": 0.5}
    made["31"] = {"class_type": "ModelMergeSimple", "inputs": inputs}
    made["6"]["inputs"]["model"] = ["31", 0]
    history = server.run(made)
    (data,) = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
    assert "a streamed model cannot be merged with another" in data["exception_message"]
