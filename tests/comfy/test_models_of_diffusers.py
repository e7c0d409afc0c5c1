"""Every family beyond Flux.1 from files that diffusers made: latents of stock ComfyUI on the dense twin, to the bit."""

import asyncio
import functools
import json
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import comfy.model_detection
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfyui_version
import describe
import folder_paths
import pytest
import quantise
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit as BnbLinear4bit
from models_of_diffusers import SMALL, dense_twin, sample, save_dense, save_quantised, use_small_defaults
from safetensors.torch import load_file, save_file

from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.config import true_in_config
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.require import require_transformer
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models.transformers import block_groups
from flux_nf4.nodes_saving import FluxNF4QuantiseSave
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.plan import Residency
from flux_nf4.offload.streamer import Streamer
from flux_nf4.page.answers import answer_for
from flux_nf4.page.file_plan import Measured, block_sizes


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


def stock_of(name, reference, model):
    """Stock ComfyUI's model of the same values as diffusers' quantised one, dense."""
    twin = dense_twin(SMALL[name], reference, _logical_shapes(model.model.diffusion_model))
    patcher = comfy.sd.load_diffusion_model_state_dict(twin)
    assert type(patcher.model) is type(model.model)
    assert patcher.model.get_dtype() == torch.float32
    return patcher


@pytest.fixture(scope="module")
def latents_of_stock(quantised):
    """A function: what stock ComfyUI makes of the quantised model of this name, on its dense twin, in so many steps."""

    @functools.cache
    def make(name, nested=False, steps=1):
        reference, folder = quantised(name, nested)
        latents = sample(stock_of(name, reference, load(folder)[1]), SMALL[name], steps)
        assert latents.std() > 0.01
        return latents

    return make


def _logical_shapes(transformer):
    """Of what a dense model has in its state dict, by the names of this ComfyUI."""
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    for name, module in transformer.named_modules():
        if isinstance(module, Linear4bit):
            shapes[f"{name}.weight"] = module.shape
    return shapes


@pytest.mark.parametrize("nested", [False, True], ids=["fp32 absmax", "nested absmax"])
def test_latents_are_those_of_stock_comfyui(small, nested, quantised, latents_of_stock, copies, monkeypatch):
    monkeypatch.setattr(StreamedModelPatcher, "staging_bytes", 1000)  # else it holds the whole model, and all stays
    _, folder = quantised(small, nested)
    catalogue, model = load(folder)
    wanted = latents_of_stock(small, nested, steps=2)
    kinds = catalogue.found.family.kinds
    for count in (0, 1, 99):
        patcher = streamed(model, Residency(tuple((kind, count) for kind in kinds)), None)
        assert torch.equal(sample(patcher, SMALL[small], steps=2), wanted), f"{count} of each kind"
        report = patcher.report()
        assert len(report.wanted) == (count * len(kinds) if count < 99 else len(report.kinds))


@pytest.mark.parametrize("nested", [False, True], ids=["fp32 absmax", "nested absmax"])
def test_what_is_packed_stays_packed_and_the_plan_from_the_header_is_that_of_the_model(small, nested, quantised):
    reference, folder = quantised(small, nested)
    catalogue, model = load(folder)
    transformer = model.model.diffusion_model
    packed = [module for module in transformer.modules() if isinstance(module, Linear4bit)]
    theirs = [module for module in reference.modules() if isinstance(module, BnbLinear4bit)]
    assert sum(len(module.shape) and module.shape[0] * module.shape[1] for module in packed) == sum(
        module.in_features * module.out_features for module in theirs
    )
    assert all(linear.is_one_weight for linear in packed)
    sizes = block_sizes(catalogue, transformer.dtype)
    assert [(size.kind, size.nbytes) for size in sizes] == [
        (size.kind, size.nbytes) for size in Streamer(block_groups(model.model)).sizes()
    ]


def test_it_is_read_however_it_is_named(small, quantised, latents_of_stock, tmp_path):
    _, folder = quantised(small)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    (index,) = folder.glob("*.index.json")
    (tmp_path / "transformer").symlink_to(folder)
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    one, prefixed = tmp_path / "one.safetensors", tmp_path / "prefixed.safetensors"
    save_file(tensors, one)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, prefixed)
    wanted = latents_of_stock(small)
    for path in (tmp_path, shards[0], shards[-1], index, one, prefixed):
        patcher = streamed(load(path)[1], Residency((), None), None)
        assert torch.equal(sample(patcher, SMALL[small]), wanted), path.name


def test_describe_names_the_model_its_layout_and_its_blocks(small, quantised, monkeypatch, capsys):
    _, folder = quantised(small)
    monkeypatch.setattr("sys.argv", ["describe.py", str(folder), "--budget", "1"])
    describe.main()
    printed = capsys.readouterr().out.splitlines()
    catalogue = read_catalogue(folder)
    family = catalogue.found.family
    assert f"layout        diffusers, {len(list(folder.glob('*.safetensors')))} files" in printed
    assert f"model         {family.name}" in printed
    kinds = Counter(size.kind for size in block_sizes(catalogue, torch.float32))
    assert f"blocks        {', '.join(f'{count} {kind}' for kind, count in kinds.items())}" in printed
    for kind, count in kinds.items():
        assert any(line.startswith(f"  {kind}  ") and line.endswith(f"{count} of {count} stay") for line in printed)


def test_the_bar_gets_its_blocks(small, quantised):
    _, folder = quantised(small)
    question = answer_for(folder, "diffusion_models", Residency((), 10**8), Measured(0.001, 1.0))
    with ThreadPoolExecutor(1) as thread:  # Playwright, which other tests use, leaves a loop running in this one
        answer = json.loads(thread.submit(asyncio.run, question).result())
    sizes = block_sizes(read_catalogue(folder), torch.float32)
    assert [(block["kind"], block["nbytes"]) for block in answer["blocks"]] == [(s.kind, s.nbytes) for s in sizes]


@pytest.mark.parametrize("name", SMALL)
def test_a_comfyui_that_is_too_old_is_named_with_the_one_that_is_not(name, quantised, monkeypatch):
    _, folder = quantised(name)
    monkeypatch.setattr(comfyui_version, "__version__", "0.3.64")
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", lambda *_: None)
    since = {"Qwen-Image": None, "Ideogram 4": "0.24.0", "Krea 2": "0.26.0"}.get(name, "0.9.2")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    if since is None:
        assert "ComfyUI sees no model that it knows in it" in str(caught.value)
    else:
        assert f"which ComfyUI has from version {since} on. This is 0.3.64: update ComfyUI." in str(caught.value)


@pytest.mark.skipif(not hasattr(comfy.supported_models, "Flux2"), reason="this ComfyUI does not know FLUX.2")
def test_a_model_that_this_comfyui_cannot_make_is_one_that_it_is_too_old_for(quantised, monkeypatch):
    """FLUX.2 klein, to which ComfyUI before 0.9.2 gives the heads of dev."""
    _, folder = quantised("FLUX.2 klein")
    flux2 = comfy.supported_models.Flux2
    monkeypatch.setattr(comfyui_version, "__version__", "0.9.1")
    monkeypatch.setattr(flux2, "unet_extra_config", {**flux2.unet_extra_config, "num_heads": 48})
    with pytest.raises(CheckpointError, match=r"it is a Flux 2 model, which ComfyUI has from version 0\.9\.2 on"):
        load(folder)
    monkeypatch.setattr(comfyui_version, "__version__", "0.9.2")
    with pytest.raises(CheckpointError, match=r"ComfyUI makes no model of its shapes"):
        load(folder)


def test_saved_from_stock_comfyui_it_has_the_names_of_its_model_and_the_values_of_bitsandbytes(
    small, quantised, tmp_path, monkeypatch
):
    """*Quantise and Save* on a dense MODEL, and the file loaded again."""
    reference, folder = quantised(small)
    dense = stock_of(small, reference, load(folder)[1])
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    FluxNF4QuantiseSave().save(dense, "saved", "output", "nf4", "fp32", "")
    (path,) = tmp_path.glob("*.safetensors")
    catalogue, model = load(path)
    assert catalogue.found.layout is catalogue.found.family.native
    state = dense.model.diffusion_model.state_dict()
    assert set(catalogue.transformer) == {
        re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", name) for name in state
    }
    packed = {name for name, tensor in catalogue.transformer.items() if tensor.weights4bit}
    linears = {name for name, m in dense.model.diffusion_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert packed == {f"{name}.weight" for name in linears}
    for name in packed:
        codes, quant_state = bnb.quantize_4bit(state[name], blocksize=64, quant_type="nf4")
        state[name] = bnb.dequantize_4bit(codes, quant_state)
    twin = comfy.sd.load_diffusion_model_state_dict(state)
    patcher = streamed(model, Residency((), None), None)
    assert torch.equal(sample(patcher, SMALL[small]), sample(twin, SMALL[small]))


@pytest.mark.parametrize("nested", [False, True], ids=["fp32 absmax", "nested absmax"])
def test_saved_from_diffusers_file_its_4bit_values_stay(
    small, nested, quantised, latents_of_stock, tmp_path, monkeypatch
):
    _, folder = quantised(small, nested)
    _, model = load(folder)
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    skipped = "transformer_blocks.0.*, transformer_blocks.3.*, img_in, proj_out" if SMALL[small].skipped else ""
    FluxNF4QuantiseSave().save(streamed(model, Residency(()), None), "saved", "output", "nf4", "fp32", skipped)
    (path,) = tmp_path.glob("*.safetensors")
    again = streamed(load(path)[1], Residency(()), None)
    assert torch.equal(sample(again, SMALL[small]), latents_of_stock(small, nested))


def test_the_two_models_of_ideogram_4_make_one_picture(quantised, monkeypatch, copies, tmp_path):
    """One for the prompt and one without, side by side in a pipeline's folder, both streamed: as stock ComfyUI."""
    small = SMALL["Ideogram 4"]
    if not small.is_known:
        pytest.skip("this ComfyUI has no Ideogram4")
    use_small_defaults(small, monkeypatch)
    monkeypatch.setattr(StreamedModelPatcher, "staging_bytes", 1000)
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    folders = [quantised("Ideogram 4")[1], tmp_path / "unconditional_transformer"]
    save_dense(small, tmp_path / "dense", seed=1)
    references = [quantised("Ideogram 4")[0], save_quantised(small, tmp_path / "dense", folders[1], nested=True)]
    models = [load(next(folder.glob("*.safetensors")))[1] for folder in folders]
    twins = [
        comfy.sd.load_diffusion_model_state_dict(
            dense_twin(small, reference, _logical_shapes(model.model.diffusion_model))
        )
        for reference, model in zip(references, models, strict=True)
    ]

    def latents(model, negative):
        generator = torch.Generator().manual_seed(3)
        positive = [[torch.randn(small.text, generator=generator), {}]]
        (guider,) = DualModelGuider.execute(model, positive, 4.0, negative).args
        noise = torch.randn(small.latent, generator=generator)
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.7, 0.0])
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros(small.latent), sampler, sigmas, seed=1).clone()

    wanted = latents(*twins)
    assert not torch.equal(wanted, latents(twins[0], twins[0]))
    ours = [streamed(model, Residency((("layers", 0),)), None) for model in models]
    assert torch.equal(latents(*ours), wanted)
    assert copies.nbytes > 0
    assert torch.equal(latents(ours[0], twins[1]), wanted), "one of stock ComfyUI beside one of ours"
    assert torch.equal(latents(twins[0], ours[1]), wanted), "one of ours beside one of stock ComfyUI"


def check_is_told(catalogue, patcher):
    """The file says that its input pictures have timestep 0, and so does the model, if this ComfyUI has that."""
    assert "__index_timestep_zero__" in catalogue.transformer
    transformer = patcher.model.diffusion_model
    assert getattr(transformer, "default_ref_method", "index_timestep_zero") == "index_timestep_zero"


def test_what_only_the_config_says_of_qwen_image_edit_2511_is_known_and_saved(tmp_path, monkeypatch):
    """Its tensors are those of the other Qwen-Images; ComfyUI is told by an empty tensor."""
    small = replace(SMALL["Qwen-Image"], config=SMALL["Qwen-Image"].config | {"zero_cond_t": True})
    use_small_defaults(small, monkeypatch)
    save_dense(small, tmp_path / "dense")
    save_quantised(small, tmp_path / "dense", tmp_path / "quantised", nested=False)
    _, model = load(tmp_path / "quantised")
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    FluxNF4QuantiseSave().save(streamed(model, Residency(()), None), "saved", "output", "nf4", "fp32", "")
    (by_node,) = tmp_path.glob("*.safetensors")
    by_command = tmp_path / "command.safetensors"
    for folder in ("dense", "quantised"):
        monkeypatch.setattr(sys, "argv", ["quantise", str(tmp_path / folder), str(by_command), "--force"])
        quantise.main()
        catalogue, again = load(by_command)
        check_is_told(catalogue, again)
    check_is_told(*load(by_node))
    check_is_told(catalogue, model)
    (tmp_path / "quantised" / "config.json").write_text("[" * 100_000)
    key = tmp_path / "quantised" / "config.json"
    assert true_in_config(key.parent) == frozenset()
    key.unlink()
    assert true_in_config(key.parent) == frozenset()
    key.write_text('{"zero_cond_t": true, "a": 1, "b": false}')
    assert true_in_config(key.parent) == {"zero_cond_t"}
