"""A family that nobody has: one entry in the table, and loader, plan, bar, describe and streaming take it."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.sample
import comfy.supported_models_base
import describe
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flux_nf4 import families, nodes
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models.transformers import block_groups
from flux_nf4.nf4_loader.saving.quantise import QuantSettings, quantise
from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.plan import Residency
from flux_nf4.offload.streamer import Streamer
from flux_nf4.page.answers import answer_for
from flux_nf4.page.file_plan import Measured, block_sizes

WIDTH, LAYERS, REFINERS = 64, 5, 3

MADE_UP = families.Family(
    "Patchwork",
    frozenset({"patchwork"}),
    {"layers": "layer", "refiner": "refining"},
    (
        families.Layout("its makers", ("patch_in.", "layers.0.mix."), "layers.0.mix"),
        families.Layout(
            "diffusers",
            ("stitching.0.to_a.",),
            "stitching.0.to_a",
            {"stitching": "layers", "refining": "refiner"},
            {
                "": {"patch_in": ("embedder",), "patch_out": ("proj_out",)},
                "layers": {"mix": ("to_a", "to_b"), "back": ("back",)},
                "refiner": {"mix": ("to_out",)},
            },
        ),
    ),
    ("patch_in.weight", "patch_out.weight"),
)


class Layer(nn.Module):
    def __init__(self, wide, operations, **where):
        super().__init__()
        self.mix = operations.Linear(WIDTH, WIDTH * wide, **where)
        self.back = operations.Linear(WIDTH * wide, WIDTH, **where) if wide > 1 else nn.Identity()

    def forward(self, x):
        return x + self.back(torch.tanh(self.mix(x)))


class Patchwork(nn.Module):
    def __init__(self, layers, refiners, dtype=None, device=None, operations=nn, **_):
        super().__init__()
        self.dtype = dtype
        where = {"dtype": dtype, "device": device}
        self.patch_in = operations.Linear(16, WIDTH, **where)
        self.layers = nn.ModuleList(Layer(4, operations, **where) for _ in range(layers))
        self.refiner = nn.ModuleList(Layer(1, operations, **where) for _ in range(refiners))
        self.patch_out = operations.Linear(WIDTH, 16, **where)

    def forward(self, x, timestep, context, **_):
        x = self.patch_in(x.movedim(1, -1)) + timestep.view(-1, 1, 1, 1)
        for block in (*self.layers, *self.refiner):
            x = block(x)
        return self.patch_out(x).movedim(-1, 1)


class Config(comfy.supported_models_base.BASE):
    unet_config = {"image_model": "patchwork"}  # noqa: RUF012
    latent_format = comfy.latent_formats.Flux
    supported_inference_dtypes = [torch.float32]  # noqa: RUF012

    def get_model(self, state_dict, prefix="", device=None):
        return Model(self, comfy.model_base.ModelType.FLOW, device, Patchwork)


class Model(comfy.model_base.BaseModel):
    def extra_conds(self, **_):
        return {}


@pytest.fixture(autouse=True)
def _family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, MADE_UP))
    unet_config = {"image_model": "patchwork", "layers": LAYERS, "refiners": REFINERS}
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", lambda *_: Config(dict(unet_config)))


def quantised(tensors):
    """A file of these dense tensors: weights in NF4."""
    made = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            made |= {name + end: part for end, part in quantise(tensor, QuantSettings()).items()}
        else:
            made[name] = tensor
    return made


def dense_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"patch_in": (WIDTH, 16), "patch_out": (16, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.mix": (4 * WIDTH, WIDTH), f"layers.{i}.back": (WIDTH, 4 * WIDTH)}
    shapes |= {f"refiner.{i}.mix": (WIDTH, WIDTH) for i in range(REFINERS)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    return tensors | {
        f"{name}.bias": torch.randn(shape[0], generator=generator) * 0.1 for name, shape in shapes.items()
    }


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "patchwork.safetensors"
    save_file(quantised(dense_tensors()), path)
    monkeypatch.setattr(folder_paths, "get_full_path", lambda *_: str(path))
    return path


@pytest.fixture
def small_ring(monkeypatch):
    """Else it holds the whole model, and all blocks stay."""
    monkeypatch.setattr(StreamedModelPatcher, "staging_bytes", 1000)


def sample(patcher):
    positive = [[torch.zeros(1, 1, 8), {}]]
    latent = torch.zeros(1, 16, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher, noise, 2, 1.0, "euler", "simple", positive, positive, latent, seed=1
        ).clone()


def load(**inputs):
    return nodes.FluxNF4UNETLoaderStreamed().load_unet("patchwork.safetensors", **inputs)[0]


def test_the_loader_makes_its_model_with_4bit_layers(file):
    patcher = load()
    transformer = patcher.model.diffusion_model
    assert type(transformer) is Patchwork
    linears = {name for name, module in transformer.named_modules() if isinstance(module, Linear4bit)}
    assert linears == {name.removesuffix(".weight") for name, tensor in dense_tensors().items() if tensor.dim() == 2}
    assert patcher.report().kinds == ("layer",) * LAYERS + ("refining",) * REFINERS


def test_streamed_it_gives_what_it_gives_resident_and_what_dense_values_give(file, copies, small_ring):
    resident, streamed = load(), load()
    streamed.residency = Residency((("layer", 1), ("refining", 0)))
    expected = sample(resident)
    assert torch.equal(sample(streamed), expected)
    assert len(streamed.report().streamed) == LAYERS - 1 + REFINERS
    assert copies.nbytes > 0
    dense = Patchwork(LAYERS, REFINERS)
    linears = resident.model.diffusion_model.named_modules()
    weights = {f"{name}.weight": m.dequantise(torch.float32) for name, m in linears if isinstance(m, Linear4bit)}
    dense.load_state_dict(dense_tensors() | weights)
    x, step = torch.randn(1, 16, 4, 4), torch.tensor([0.5])
    with torch.no_grad():
        torch.testing.assert_close(resident.model.diffusion_model(x, step, None), dense(x, step, None))


def test_the_plan_from_the_header_is_that_of_the_loaded_model(file):
    model = load().model
    sizes = block_sizes(read_catalogue(file), torch.float32)
    assert [(size.kind, size.nbytes) for size in sizes] == [
        (size.kind, size.nbytes) for size in Streamer(block_groups(model)).sizes()
    ]


def test_the_bar_gets_its_kinds(file):
    question = answer_for(file, "diffusion_models", Residency((), 300_000), Measured(0.001, 1.0))
    with ThreadPoolExecutor(1) as thread:  # Playwright, which other tests use, leaves a loop running in this one
        answer = json.loads(thread.submit(asyncio.run, question).result())
    assert [block["kind"] for block in answer["blocks"]] == ["layer"] * LAYERS + ["refining"] * REFINERS
    assert answer["device_bytes"] <= 300_000


def test_describe_names_it_and_its_blocks(file, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["describe.py", str(file), "--budget", "1"])
    describe.main()
    printed = capsys.readouterr().out.splitlines()
    assert "layout        its makers, 1 file" in printed
    assert "model         Patchwork" in printed
    assert f"blocks        {LAYERS} layer, {REFINERS} refining" in printed
    assert f"  refining    {'█' * REFINERS}  {REFINERS} of {REFINERS} stay" in printed


def test_another_layout_of_it_is_joined(file):
    joined = read_catalogue(file).logical_shapes
    tensors = {}
    for name, tensor in dense_tensors().items():
        of, _, rest = name.partition(".")
        if of in ("layers", "refiner"):
            index, layer, kind = rest.split(".")
            theirs = {"layers": "stitching", "refiner": "refining"}[of]
            if (of, layer) == ("layers", "mix"):
                for part, half in zip("ab", tensor.chunk(2), strict=True):
                    tensors[f"{theirs}.{index}.to_{part}.{kind}"] = half.contiguous()
                continue
            tensors[f"{theirs}.{index}.{'to_out' if of == 'refiner' else layer}.{kind}"] = tensor
        else:
            tensors[f"{ {'patch_in': 'embedder', 'patch_out': 'proj_out'}[of] }.{rest}"] = tensor
    save_file(quantised(tensors), file)
    catalogue = read_catalogue(file)
    assert (catalogue.found.family, catalogue.found.layout.name) == (MADE_UP, "diffusers")
    assert catalogue.logical_shapes == joined
    assert len(load().model.diffusion_model.layers) == LAYERS


def test_a_dense_model_of_it_is_streamed_by_its_kinds(copies, small_ring):
    config = Config({"image_model": "patchwork", "layers": LAYERS, "refiners": REFINERS})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({})
    with torch.no_grad():
        model.diffusion_model.load_state_dict(dense_tensors())
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    expected = sample(patcher)
    streamed = stream_model(patcher, Residency((("layer", 2), ("refining", 1))), None)
    assert torch.equal(sample(streamed), expected)
    assert streamed.report().kinds == ("layer",) * LAYERS + ("refining",) * REFINERS
    assert len(streamed.report().wanted) == 3


def test_counts_of_other_kinds_are_said_to_be_ignored(file, caplog):
    load(double_blocks=4)
    assert "this model has no double blocks (it has: layer, refining), so their count is ignored" in caplog.text
