"""The plan from a file's header is the plan of the model that is loaded from it."""

import dataclasses
import json

import pytest
import torch
from checkpoint_layout import flux2_of_diffusers
from counted import plan_by_counts
from make_checkpoint import Recipe, make_checkpoint
from safetensors.torch import load_file, save_file
from sparse_checkpoint import make_sparse_checkpoint, make_sparse_shards
from tiny_blocks import DOUBLES, SINGLES

from flux_nf4.checkpoints import load_transformer
from flux_nf4.families import Family
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.require import require_transformer
from flux_nf4.nf4_loader.models.transformers import block_groups, build_transformer
from flux_nf4.offload.comfyui.modulation import modulation_in
from flux_nf4.offload.plan import STAGING_BYTES, Residency
from flux_nf4.offload.record import layout_of
from flux_nf4.offload.streamer import Streamer
from flux_nf4.page.file_plan import (
    Advice,
    Measured,
    advise,
    block_sizes,
    bytes_within,
    make_plan,
    more_bytes,
    other_bytes,
    predict_ms,
)

GIB = 1 << 30


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "flux1-dev-bnb-nf4-v2.safetensors"
    make_sparse_checkpoint(path)
    return read_catalogue(path)


@pytest.fixture(scope="module")
def blocks(full_size):
    return block_sizes(full_size, torch.bfloat16)


def in_no_order(sizes):
    return [dataclasses.replace(size, tiles=tuple(sorted(size.tiles))) for size in sizes]


def dense_layer(tensors):
    """One Linear of the file not packed, another without bias, as some tools leave them."""
    name = "model.diffusion_model.double_blocks.0.img_mod.lin.weight"
    for key in [key for key in tensors if key.startswith(name)]:
        del tensors[key]
    tensors[name] = torch.zeros(6 * 256, 256, dtype=torch.bfloat16)
    del tensors["model.diffusion_model.single_blocks.0.linear1.bias"]


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        ({}, None),
        ({"nested": True}, None),
        ({"quant_type": "fp4", "blocksize": 128}, None),
        ({"prefix": ""}, None),
        ({}, dense_layer),
    ],
    ids=["v2", "v1", "fp4", "no prefix", "partly dense"],
)
def test_sizes_are_those_of_the_loaded_model(recipe, change, tmp_path, tiny_config):
    path = tmp_path / "flux.safetensors"
    make_checkpoint(path, Recipe(double_blocks=DOUBLES, single_blocks=SINGLES, hidden=256, unet_only=True, **recipe))
    if change:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    catalogue = read_catalogue(path)
    model = build_transformer(catalogue)
    dtype = model.diffusion_model.dtype
    assert in_no_order(block_sizes(catalogue, dtype)) == in_no_order(
        Streamer(block_groups(model), without=_modulation_of(model)).sizes()
    )


def test_sizes_of_a_real_file_are_those_of_comfyuis_model(full_size):
    model = build_transformer(full_size)
    dtype = model.diffusion_model.dtype
    groups = block_groups(model)
    modulation = _modulation_of(model)
    layouts = [layout_of(block, modulation) for group in groups.values() for block in group]
    sizes = block_sizes(full_size, dtype)
    assert [size.kind for size in sizes] == ["double"] * 19 + ["single"] * 38
    assert [size.nbytes for size in sizes] == [layout.nbytes for layout in layouts]
    assert [size.small for size in sizes] == [layout.small.nbytes for layout in layouts]
    everything = [*model.diffusion_model.parameters(), *model.diffusion_model.buffers()]
    in_blocks = [t for group in groups.values() for block in group for t in [*block.parameters(), *block.buffers()]]
    outside = sum(t.nbytes for t in everything) - sum(t.nbytes for t in in_blocks)
    largest = max(layout_of(module).whole().tiles[0].nbytes for module in modulation if hasattr(module, "lin"))
    biases = sum(layout_of(module).small.nbytes for module in modulation if hasattr(module, "lin"))
    outputs = sum(module.out_features for module in modulation if hasattr(module, "out_features"))
    assert outputs == (19 * 2 * 6 + 38 * 3) * 3072
    assert other_bytes(full_size, dtype) == outside + 2 * largest + biases + 12 * outputs * dtype.itemsize


def _modulation_of(model):
    blocks = [block for group in block_groups(model).values() for block in group]
    return {module for layer in modulation_in(model, blocks) for module in layer.modules()}


@pytest.mark.parametrize("recipe", [{}, {"nested": True}, {"prefix": ""}], ids=["v2", "v1", "no prefix"])
def test_the_plan_of_a_file_is_that_of_the_patcher(recipe, tmp_path, tiny_config, copies):
    path = tmp_path / "flux.safetensors"
    make_checkpoint(path, Recipe(double_blocks=DOUBLES, single_blocks=SINGLES, hidden=256, unet_only=True, **recipe))
    catalogue = read_catalogue(path)
    patcher = load_transformer(catalogue).clone()
    streaming, dtype = patcher.model.streaming, patcher.model.get_dtype()
    assert streaming.modulation is not None
    beside_transformer = sum(tensor.nbytes for tensor in patcher.model.model_sampling.buffers())
    others = other_bytes(catalogue, dtype)
    assert others == streaming.needed_bytes - beside_transformer
    assert more_bytes(catalogue, dtype) == streaming.modulation.more_bytes > 0
    assert sum(size.nbytes for size in block_sizes(catalogue, dtype)) < 0.8 * catalogue.transformer_ram
    patcher.staging_bytes = STAGING_BYTES
    patcher.residency = Residency(budget_bytes=(patcher.model_size() + streaming.other_bytes) // 2)
    made = make_plan(block_sizes(catalogue, dtype), others + beside_transformer, patcher.residency)
    assert made.resident == patcher.plan.resident
    least = streaming.needed_bytes + sum(size.nbytes for size in block_sizes(catalogue, dtype))
    for short in (0, 1):
        patcher.residency = Residency(budget_bytes=least + streaming.modulation.more_bytes - short)
        patcher.load(patcher.load_device)
        assert streaming.modulation.stays == (not short)
        figures = patcher.plan, others + beside_transformer, more_bytes(catalogue, dtype), patcher.residency
        half_of_ring = max(size.streamed for size in streaming.modulation.streamer.sizes(whole_blocks=True))
        not_there = streaming.modulation.kept_bytes + half_of_ring if short else 0
        assert bytes_within(*figures) == patcher.loaded_size() + not_there
    assert bytes_within(*figures[:3], Residency()) == least, "without a budget it takes what is free"


def test_counts_and_budget_are_understood_as_the_patcher_does(blocks):
    both = (("double", 7), ("single", 7))
    assert make_plan(blocks, 1000, Residency(both)) == plan_by_counts(blocks, dict(both))
    assert make_plan(blocks, GIB, Residency((), 3 * GIB)).device_bytes <= 2 * GIB
    assert make_plan(blocks, GIB, Residency(both, 2 * GIB)).device_bytes <= GIB
    one = make_plan(blocks, GIB, Residency((("double", 2),), 3 * GIB))
    assert sum(blocks[index].kind == "double" for index in one.resident) == 2
    with pytest.raises(ValueError, match="too small"):
        make_plan(blocks, 1000, Residency((), 1))


def test_without_a_budget_the_free_memory_decides_what_is_not_counted(blocks):
    assert make_plan(blocks, 1000, Residency(())) is None
    assert make_plan(blocks, 1000, Residency((("double", 7),))) is None


def test_the_prediction_is_what_was_measured(full_size, monkeypatch):
    """docs/measurements.md: 7/7 at 512x512 took 86.7 ms where all resident took 62.5, over a bus of 55 GB/s.

    The modulation was then streamed with its block in each forward.
    """
    monkeypatch.setattr(Family, "is_modulation", lambda *_: False)
    blocks = block_sizes(full_size, torch.bfloat16)
    plan = plan_by_counts(blocks, {"double": 7, "single": 7})
    compute, stall = predict_ms(plan, blocks, Measured(55.0, 62.5 / 57))
    assert compute == pytest.approx(62.5)
    assert compute + stall == pytest.approx(86.7, rel=0.02)


@pytest.mark.parametrize(
    ("counts", "measured", "code"),
    [
        ((19, 38), None, "all_resident"),
        ((7, 7), None, "not_measured"),
        ((7, 7), Measured(55.0, 3.1), "keeps_up"),
        ((7, 7), Measured(55.0, 0.7, is_pinned=False), "not_pinned"),
        ((7, 7), Measured(6.0, 1.1), "slow_link"),
        ((7, 7), Measured(25.0, 1.1), "bus_is_limit"),
    ],
)
def test_the_advice_is_about_what_is_wrong(counts, measured, code, blocks):
    plan = plan_by_counts(blocks, dict(zip(("double", "single"), counts, strict=True)))
    assert advise(plan, blocks, measured).code == code


def test_taking_the_advice_saves_what_it_says(blocks):
    measured = Measured(12.0, 1.1)
    plan = plan_by_counts(blocks, {})
    advice = advise(plan, blocks, measured)
    assert isinstance(advice, Advice)
    figures = advice.figures
    before = sum(predict_ms(plan, blocks, measured))
    better = plan_by_counts(blocks, {kind: advice.kept[kind] for kind in ("double", "single")})
    assert better.device_bytes <= plan.device_bytes + figures["gib"] * GIB
    assert 1 - sum(predict_ms(better, blocks, measured)) / before == pytest.approx(figures["percent"] / 100, abs=0.05)
    json.dumps(vars(advice))


@pytest.mark.parametrize(
    ("sizes", "variant", "counts", "mib"),
    [
        ((6144, 15360, 8, 48, True), "dev", (8, 48), (527, 263)),
        ((4096, 12288, 8, 24, False), "klein 9B", (8, 24), (234, 117)),
        ((3072, 7680, 5, 20, False), "klein 4B", (5, 20), (132, 66)),
    ],
)
def test_flux2_has_a_ring_of_its_two_largest_layers(sizes, variant, counts, mib, tmp_path):
    make_sparse_shards(tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors", flux2_of_diffusers(*sizes))
    catalogue = read_catalogue(tmp_path)
    require_transformer(catalogue)
    assert catalogue.found.family.variant(catalogue.logical_shapes) == variant
    blocks, others = block_sizes(catalogue, torch.bfloat16), other_bytes(catalogue, torch.bfloat16)
    assert [block.kind for block in blocks] == ["double"] * counts[0] + ["single"] * counts[1]
    assert {round(block.nbytes / (1 << 20)) for block in blocks} == set(mib)
    hidden = sizes[0]
    both = (9 + 4) * hidden * hidden * 9 // 16  # linear1 and linear2, codes and absmax
    plan = make_plan(blocks, others, Residency((("double", 0), ("single", 0))))
    assert max(sum(block.tiles) for block in blocks if block.kind == "single") == both
    assert plan.staging_bytes == max(both, STAGING_BYTES)
    assert others + plan.device_bytes < (0.7 if variant == "dev" else 0.5) * GIB
    assert variant != "klein 4B" or others + sum(block.nbytes for block in blocks) < 2.1 * GIB
