"""Every family beyond Flux.1 from files that diffusers made: latents of stock ComfyUI on the dense twin, to the bit."""

import functools

import comfy.sd
import pytest
import torch
from models_of_diffusers import SMALL, dense_twin, sample, save_dense, save_quantised, use_small_defaults

from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.require import require_transformer
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.plan import Residency


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A function: diffusers' quantised model of this name, and the folder it is saved in."""

    @functools.cache
    def dense(name):
        folder = tmp_path_factory.mktemp("dense")
        save_dense(SMALL[name], folder)
        return folder

    @functools.cache
    def make(name, nested=False):
        folder = tmp_path_factory.mktemp("quantised")
        return save_quantised(SMALL[name], dense(name), folder, nested=nested), folder

    return make


@pytest.fixture(params=SMALL)
def small(request, monkeypatch):
    """The name of a small model that this ComfyUI has a class for."""
    found = SMALL[request.param]
    if not found.is_known:
        pytest.skip(f"this ComfyUI has no {found.supported}")
    use_small_defaults(found, monkeypatch)
    return request.param


def load(path):
    catalogue = read_catalogue(path)
    require_transformer(catalogue)
    return catalogue, load_transformer(catalogue)


@pytest.mark.parametrize("nested", [False, True], ids=["fp32 absmax", "nested absmax"])
def test_latents_are_those_of_stock_comfyui(small, nested, quantised, copies, monkeypatch):
    monkeypatch.setattr(StreamedModelPatcher, "staging_bytes", 1000)  # else it holds the whole model, and all stays
    reference, folder = quantised(small, nested)
    catalogue, model = load(folder)
    shapes = {name: tuple(value.shape) for name, value in _logical_state(model.model.diffusion_model).items()}
    stock = comfy.sd.load_diffusion_model_state_dict(dense_twin(SMALL[small], reference, shapes))
    assert type(stock.model) is type(model.model)
    assert stock.model.get_dtype() == torch.float32
    wanted = sample(stock, SMALL[small])
    assert wanted.std() > 0.01
    kinds = catalogue.found.family.kinds
    for count in (0, 1, 99):
        patcher = streamed(model, Residency(tuple((kind, count) for kind in kinds)), None)
        assert torch.equal(sample(patcher, SMALL[small]), wanted), f"{count} of each kind"
        report = patcher.report()
        assert len(report.wanted) == (count * len(kinds) if count < 99 else len(report.kinds))


def _logical_state(transformer):
    """What a dense model has in its state dict, by the names of this ComfyUI."""
    shapes = dict(transformer.named_parameters())
    for name, module in transformer.named_modules():
        if isinstance(module, Linear4bit):
            shapes[f"{name}.weight"] = module.weight
    return shapes
