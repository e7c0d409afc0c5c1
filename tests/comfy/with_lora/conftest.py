"""A Flux of few blocks in an NF4 file, its dense twin in stock ComfyUI, and a way to compare the two with a LoRA."""

import copy

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import loras
import pytest
import torch
from make_checkpoint import Recipe, make_checkpoint, make_twin

from flux_nf4.nf4_loader.linear import matmul

RECIPE = Recipe(double_blocks=2, single_blocks=3, hidden=256, unet_only=True)


@pytest.fixture(scope="session")
def config(flux_config):
    return flux_config(RECIPE.double_blocks, RECIPE.single_blocks)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "few-blocks.safetensors"
    make_checkpoint(path, RECIPE)
    return path


@pytest.fixture
def tiny_config(monkeypatch, flux_config):
    make = flux_config
    monkeypatch.setattr(
        comfy.model_detection, "model_config_from_unet", lambda *_: make(RECIPE.double_blocks, RECIPE.single_blocks)
    )


def stock_model(config, twin, recipe=RECIPE):
    """The dense twin, made as the file ``twin``, in stock ComfyUI, in fp32."""
    make_twin(twin, recipe, torch.float32)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    model.load_model_weights(comfy.utils.load_torch_file(str(twin)), "model.diffusion_model.")
    return model


@pytest.fixture(scope="session", name="stock_model")
def stock_model_fixture():
    return stock_model


@pytest.fixture(scope="session")
def twin_model(tiny_file, config):
    """The same model in stock ComfyUI."""
    return stock_model(config, tiny_file.with_name("twin.safetensors"))


@pytest.fixture
def copied_twin(twin_model):
    """A function: a copy of it, for tests that stream it or change its weights."""
    config = twin_model.model_config  # which some versions cannot copy
    return lambda: copy.deepcopy(twin_model, {id(config): config})


@pytest.fixture
def twin(twin_model):
    """A stock patcher of the dense twin."""
    cpu = torch.device("cpu")
    yield comfy.model_patcher.ModelPatcher(twin_model, load_device=cpu, offload_device=cpu)
    comfy.model_management.unload_all_models()  # which takes the patches off the weights


@pytest.fixture(scope="session")
def shapes(twin_model):
    """(out, in) of every Linear in the blocks."""
    return loras.linear_shapes(twin_model)


def with_lora(patcher, file, strength=1.0):
    """What the node LoraLoaderModelOnly gives."""
    return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]


@pytest.fixture(name="with_lora")
def with_lora_fixture():
    return with_lora


@pytest.fixture
def compare(load, twin, sample):
    """A function: the relative difference of ours with a LoRA and stock ComfyUI's, after checking that it has effect.

    ``apply`` is what is done to either patcher, and returns the patched one.
    """

    def compare(apply, patcher=None):
        plain, expected = sample(twin, steps=1), sample(apply(twin), steps=1)
        effect = (expected - plain).norm() / plain.norm()
        assert effect > 0.005, f"the patch changes too little to prove anything: {effect}"
        found = sample(apply(patcher or load()), steps=1)
        return ((found - expected).norm() / expected.norm()).item()

    return compare


@pytest.fixture
def layer_output():
    """A function: what a layer of a patched model computes from a fixed input."""

    def run(patcher, name):
        comfy.model_management.load_models_gpu([patcher])
        layer = patcher.model.get_submodule(name)
        input = loras.random(name, 2, 3, layer.in_features)
        with torch.inference_mode():
            return layer(input).clone()

    return run


@pytest.fixture(params=["few rows", "many rows"])
def either_way(request, monkeypatch):
    """The branch is added to the matmul's output, or the matmul to the branch."""
    monkeypatch.setattr(matmul, "_MANY_ROWS", 1 if request.param == "many rows" else 10**9)
