"""A T5 in 4 bits, quantised and saved by transformers, through ComfyUI's own T5."""

import json

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_hooks import SetClipHooks
from comfy_extras.nodes_model_merging import CLIPAdd, CLIPMergeSimple, CLIPSave, CLIPSubtract
from encoder_sizes import CLIP_L, LAYERS, T5
from encoders_of_flux import all_in_one, dense_reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from there_and_back import Copied, move
from transformers import T5Config, T5EncoderModel

from flux_nf4.checkpoints import load_all_in_one
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.require import require_all_in_one
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models import text_encoders
from flux_nf4.nf4_loader.models import transformers as flux
from flux_nf4.nf4_loader.models.text_encoders import load_dual_clip
from flux_nf4.nf4_loader.saving.model_sources import sources_of_encoders
from flux_nf4.nodes import NODE_CLASS_MAPPINGS

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("tiny_encoders")


@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": True}, {"quant_type": "fp4"}, {"skip": ()}, {"skip": ("wo", "k"), "shards": "100KB"}],
    ids=["nf4", "nested", "fp4", "wo dense by transformers' own rule", "k dense, in shards"],
)
def test_a_t5_of_transformers_is_the_same_model(options, t5, clip_l):
    model, path = t5(**options)
    reference = dense_reference(model)
    clip = load_dual_clip([path, clip_l], [])
    ours = clip.cond_stage_model.t5xxl.transformer
    packed = {name: module for name, module in ours.named_modules() if isinstance(module, Linear4bit)}
    assert len(packed) == LAYERS * (7 - len(options.get("skip") or ("wo",)))
    assert all(bool(linear.parts[0].nested) == ("double_quant" in options) for linear in packed.values())
    for name, linear in packed.items():
        assert torch.equal(linear.dequantise(torch.float32), reference.get_submodule(name).weight), name
    tokens = torch.tensor([[3, 14, 159, 26, 5, 1]])
    with torch.no_grad():
        wanted = reference(tokens).last_hidden_state
        got = ours(tokens, None, dtype=torch.float32)[0]
    # ComfyUI has embedding and norms in fp16, whatever the file says.
    assert wanted.std() > 0.1
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=5e-3 * wanted.abs().max().item())


def test_biases_of_a_t5_are_added(t5, clip_l, tmp_path):
    """Of weights in 4 bits (q, v) and of dense ones (wo)."""
    model, path = t5()
    reference, state = dense_reference(model), load_file(path)
    for name, module in reference.named_modules():
        if name.endswith((".q", ".v", ".wo")):
            state[f"{name}.bias"] = torch.randn(module.out_features).half()
            module.bias = torch.nn.Parameter(state[f"{name}.bias"].float())
    save_file(state, tmp_path / "t5.safetensors")
    ours = load_dual_clip([tmp_path / "t5.safetensors", clip_l], []).cond_stage_model.t5xxl.transformer
    tokens = torch.tensor([[3, 14, 159, 26, 5, 1]])
    with torch.no_grad():
        wanted = reference(tokens).last_hidden_state
        got = ours(tokens, None, dtype=torch.float32)[0]
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=5e-3 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("name", "tensor", "answer"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.SCB", torch.ones(128), r"8-bit LLM\.int8"),
        ("encoder.block.0.layer.0.SelfAttention.o.qweight", torch.ones(4).int(), r"a nunchaku \(SVDQuant\) file"),
    ],
)
def test_a_t5_in_another_format_is_refused(name, tensor, answer, t5, clip_l, tmp_path):
    _, path = t5()
    save_file(load_file(path) | {name: tensor}, tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match=rf"^t5\.safetensors: of its text encoders: it.* {answer}"):
        load_dual_clip([tmp_path / "t5.safetensors", clip_l], [])


@pytest.fixture(scope="module")
def scaled_t5(tmp_path_factory):
    """A T5 in ComfyUI's scaled fp8: its tensors, and those of its dense twin."""
    torch.manual_seed(0)
    # ComfyUI looks at the last of 24 layers to see what a T5 is made of.
    config = T5Config(**T5, num_layers=24, feed_forward_proj="gated-gelu", is_encoder_decoder=False)
    model = T5EncoderModel(config).half()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    scaled = dense | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for number, name in enumerate(f"{linear}.weight" for linear in linears):
        scale = torch.tensor(0.01 * (1 + number % 3))
        scaled[name] = (dense[name].float() / scale).to(torch.float8_e4m3fn)
        dense[name] = (scaled[name].float() * scale).half()
        scaled[name.removesuffix("weight") + "scale_weight"] = scale
    return scaled, dense


PROMPT = {"l": [[(1, 1.0)] * 77], "t5xxl": [[(3, 1.0), (14, 1.2), (159, 1.0), (1, 1.0)]]}


def test_a_t5_in_scaled_fp8_encodes_as_its_dense_twin(scaled_t5, clip_l, tmp_path):
    encoded = []
    for name, state in zip(("scaled", "dense"), scaled_t5, strict=True):
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        encoded.append(load_dual_clip([path, clip_l], []).encode_from_tokens(PROMPT))
    got, wanted = encoded
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-3 * wanted.abs().max().item())


FP8 = {"format": "float8_e4m3fn"}


def in_todays_format(state):
    """The scaled fp8 of ``state`` as ComfyUI has described it since 0.8."""
    layer = torch.tensor(list(json.dumps(FP8).encode()), dtype=torch.uint8)
    layers = [name.removesuffix("scale_weight") for name in state if name.endswith(".scale_weight")]
    return {name.replace("scale_weight", "weight_scale"): state[name] for name in state if name != "scaled_fp8"} | {
        f"{name}comfy_quant": layer.clone() for name in layers
    }


def test_a_t5_in_todays_format_of_comfyui_encodes_where_comfyui_reads_it(scaled_t5, clip_l, tmp_path):
    """From a file of its own, and inside an all-in-one file."""
    scaled, dense = scaled_t5
    save_file(dense, tmp_path / "dense.safetensors")
    wanted = load_dual_clip([tmp_path / "dense.safetensors", clip_l], []).encode_from_tokens(PROMPT)
    path = tmp_path / "t5.safetensors"
    save_file(in_todays_format(scaled), path)
    catalogue = read_catalogue(all_in_one(tmp_path / "flux.safetensors", load_file(clip_l), load_file(path)))
    for load in (lambda: load_dual_clip([path, clip_l], []), lambda: flux.load_clip_and_vae(catalogue, [])[0]):
        if hasattr(comfy.utils, "detect_layer_quantization"):
            got = load().encode_from_tokens(PROMPT)
            torch.testing.assert_close(got, wanted, rtol=0, atol=5e-3 * wanted.abs().max().item())
        else:
            with pytest.raises(CheckpointError, match=r"of ComfyUI's own .* Update ComfyUI .* 'DualCLIPLoader'"):
                load()


def test_a_t5_in_scaled_fp8_beside_4_bits_is_refused(t5, scaled_t5, clip_l, tmp_path):
    """In one file with them, and with a CLIP-L in 4 bits."""
    _, path = t5()
    in_4_bits = load_file(path)
    scale = next(name for name in scaled_t5[0] if name.endswith(".scale_weight"))
    mixed = in_4_bits | {"encoder.final_layer_norm.scale_weight": scaled_t5[0][scale]}
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(CheckpointError, match=r"^mixed\.safetensors: .*: a text encoder in ComfyUI's scaled fp8"):
        load_dual_clip([tmp_path / "mixed.safetensors", clip_l], [])
    catalogue = read_catalogue(all_in_one(tmp_path / "flux.safetensors", load_file(clip_l), mixed))
    with pytest.raises(CheckpointError, match=r"^flux\.safetensors: .*: a text encoder in ComfyUI's scaled fp8"):
        flux.load_clip_and_vae(catalogue, [])
    linear = "text_model.encoder.layers.0.mlp.fc1"
    packed = {
        name.replace("encoder.block.0.layer.0.SelfAttention.q", linear): tensor
        for name, tensor in in_4_bits.items()
        if name.startswith("encoder.block.0.layer.0.SelfAttention.q.")
    }
    save_file(load_file(clip_l) | packed, tmp_path / "clip_l.safetensors")
    save_file(scaled_t5[0], tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match=r"^t5\.safetensors: .*: a text encoder in ComfyUI's scaled fp8"):
        load_dual_clip([tmp_path / "t5.safetensors", tmp_path / "clip_l.safetensors"], [])


def test_it_encodes_a_prompt_and_knows_its_size(t5, clip_l, monkeypatch):
    _, path = t5()
    clip = load_dual_clip([clip_l, path], [])
    tokens = {"l": [[(1, 1.0)] * 77], "t5xxl": [[(3, 1.0), (14, 1.0), (1, 1.0)]]}
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    assert cond.shape == (1, 3, T5["d_model"])
    assert pooled.shape == (1, CLIP_L["hidden_size"])
    assert cond.isfinite().all()
    packed = sum(m.packed_0.nbytes for m in clip.cond_stage_model.modules() if isinstance(m, Linear4bit))
    assert clip.patcher.model_size() > packed


def test_a_clip_l_under_openais_names_is_the_same_model(t5, clip_l, tmp_path):
    theirs, ours = load_file(clip_l), {"text_projection": torch.eye(CLIP_L["hidden_size"]).half()}
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    embeddings = "text_model.embeddings"
    ours["positional_embedding"] = theirs[f"{embeddings}.position_embedding.weight"]
    ours["token_embedding.weight"] = theirs[f"{embeddings}.token_embedding.weight"]
    for end in ("weight", "bias"):
        ours[f"ln_final.{end}"] = theirs[f"text_model.final_layer_norm.{end}"]
        for i in range(CLIP_L["num_hidden_layers"]):
            block, layer = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
            ours |= {f"{block}.{name}.{end}": theirs[f"{layer}.{other}.{end}"] for name, other in names.items()}
            parts = [theirs[f"{layer}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            ours[f"{block}.attn.in_proj_{end}"] = torch.cat(parts)
    save_file(ours, tmp_path / "ViT-L-14-text.safetensors")
    _, path = t5()
    loaded = [load_dual_clip([file, path], []) for file in (clip_l, tmp_path / "ViT-L-14-text.safetensors")]
    tokens = {"l": [[(1, 1.0)] * 77], "t5xxl": [[(3, 1.0), (14, 1.0), (1, 1.0)]]}
    (cond, pooled), (got_cond, got_pooled) = (clip.encode_from_tokens(tokens, return_pooled=True) for clip in loaded)
    assert torch.equal(got_cond, cond)
    assert torch.equal(got_pooled, pooled)
    assert not hasattr(loaded[1].cond_stage_model, "nf4_entries"), "a saved file would get names that nobody reads"


def test_text_encoders_and_vae_leave_a_device_without_copies(t5, clip_l, tmp_path, monkeypatch):
    _, path = t5()
    loaded = load_all_in_one(
        read_catalogue(all_in_one(tmp_path / "flux.safetensors", load_file(clip_l), load_file(path)))
    )
    monkeypatch.setattr("folder_paths.get_full_path", lambda _, name: str(name))
    (from_two_files,) = NODE_CLASS_MAPPINGS["FluxNF4DualCLIPLoader"]().load_clip(str(clip_l), str(path))
    monkeypatch.setattr(torch.nn.Module, "to", move)
    pinned = []
    monkeypatch.setattr(comfy.model_management, "pin_memory", pinned.append, raising=False)
    comfy_pins = hasattr(ModelPatcher, "pin_weight_to_device")
    for loaded_patcher in (loaded.clip.patcher, loaded.vae.patcher, from_two_files.patcher):
        patcher, model = loaded_patcher.clone(), loaded_patcher.model
        patcher.load_device = torch.device("meta")
        places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        weight = next(name for name, weight in model.named_parameters() if weight.dim() > 1)
        assert patcher.add_patches({weight: ("diff", (torch.ones(model.get_parameter(weight).shape),))}) == [weight]
        patcher.patch_model(patcher.load_device)
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        patcher.partially_unload(CPU, patcher.model_size() // 2)
        assert {tensor.is_meta for tensor in model.state_dict().values()} == {False, True}
        patcher.detach()
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
        assert bool(pinned) == (comfy_pins and loaded_patcher is loaded.vae.patcher)
        pinned.clear()
    loaded.clip.patcher.hook_backup["a weight"] = "its values before a hook"
    move(loaded.clip.patcher.model, "meta")
    with pytest.raises(Copied):
        move(loaded.clip.patcher.model, "cpu")


def test_an_all_in_one_file_may_be_in_shards(t5, clip_l, tmp_path):
    one, other = (tmp_path / f"flux-0000{number}-of-00002.safetensors" for number in (1, 2))
    all_in_one(one, load_file(clip_l), load_file(t5()[1]), vae_path=other)
    catalogue = read_catalogue(one)
    require_all_in_one(catalogue)
    _, vae = flux.load_clip_and_vae(catalogue, [])
    assert vae.get_sd().keys() == {name.removeprefix("vae.") for name in catalogue.vae}


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, {"quant_type": "fp4"}], ids=["nf4", "nested", "fp4"])
def test_a_t5_inside_an_all_in_one_file_encodes_as_its_dense_twin(options, t5, clip_l, tmp_path):
    model, path = t5(**options)
    stored = load_file(path)
    dense = {name: tensor for name, tensor in stored.items() if ".weight." not in name}
    dense |= {name: tensor.to(torch.float16) for name, tensor in dense_reference(model).state_dict().items()}
    prompt = {"l": [[(1, 1.0)] * 77], "t5xxl": [[(3, 1.0), (14, 1.2), (159, 1.0), (1, 1.0)]]}
    encoded = []
    for name, encoder in (("nf4", stored), ("dense", dense)):
        catalogue = read_catalogue(all_in_one(tmp_path / f"{name}.safetensors", load_file(clip_l), encoder))
        require_all_in_one(catalogue)
        assert catalogue.t5_layers == LAYERS
        clip, _ = flux.load_clip_and_vae(catalogue, [])
        packed = [module for module in clip.cond_stage_model.t5xxl.modules() if isinstance(module, Linear4bit)]
        assert len(packed) == (LAYERS * 6 if name == "nf4" else 0)
        encoded.append(clip.encode_from_tokens(prompt, return_pooled=True))
    (cond, pooled), (wanted, wanted_pooled) = encoded
    assert wanted.std() > 0.1
    # The twin's weights are rounded to fp16, which is what ComfyUI gives a dense T5.
    torch.testing.assert_close(cond, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    assert torch.equal(pooled, wanted_pooled)


class Vae:
    first_stage_model = torch.nn.Module()

    def get_sd(self):
        return {}


def test_it_is_saved_as_it_was_and_what_is_patched_is_merged(t5, clip_l):
    """Packed weights are copied; a patched one is saved as a dense one, without what was packed."""
    model, path = t5()
    clip = load_dual_clip([clip_l, path], [])
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    dense = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    patches = {
        key: ("diff", (torch.ones(128, 64 if key == dense else 128),)) for key in (dense, f"t5xxl.transformer.{query}")
    }
    assert set(clip.patcher.add_patches(patches)) == set(patches)
    sources = {source.name: source for source in sources_of_encoders(clip, Vae())}
    prefix = "text_encoders.t5xxl.transformer."
    with safe_open(path, "pt") as file:
        for name in list(file.keys()):
            if not name.startswith(query):
                assert sources[prefix + name].stored.parts[0].name == name
    assert [name for name in sources if name.startswith(prefix + query)] == [prefix + query]
    merged = sources[f"text_encoders.{dense}"].read(torch.device("cpu"))
    assert torch.equal(merged, (load_file(clip_l)[dense.partition("transformer.")[2]].float() + 1).half())
    merged = sources[prefix + query].read(torch.device("cpu")).float()
    torch.testing.assert_close(merged, dense_reference(model).state_dict()[query] + 1, rtol=0, atol=1e-2)


@pytest.fixture
def stock_clip(clip_l, tmp_path):
    """A function: CLIP as ComfyUI's own loader makes it of these tensors of a T5."""

    def load(t5):
        paths = [str(clip_l), str(tmp_path / "stock_t5.safetensors")]
        save_file(t5, paths[1])
        options = text_encoders.options_for({}, 24)
        return comfy.sd.load_clip(paths, clip_type=comfy.sd.CLIPType.FLUX, model_options=options)

    return load


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("loader", ["stock", "this package's"])
def test_a_scaled_t5_is_saved_so_that_it_reads_as_before(loader, patched, scaled_t5, stock_clip, clip_l, tmp_path):
    scaled, dense = scaled_t5
    save_file(scaled, tmp_path / "t5.safetensors")
    clip = stock_clip(scaled) if loader == "stock" else load_dual_clip([clip_l, tmp_path / "t5.safetensors"], [])
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    if patched:
        assert clip.patcher.add_patches({f"t5xxl.transformer.{query}": ("diff", (torch.ones(128, 128),))})
    sources = {source.name: source for source in sources_of_encoders(clip, Vae())}
    prefix = "text_encoders.t5xxl.transformer."
    read = {name.removeprefix(prefix): source.read(CPU) for name, source in sources.items() if name.startswith(prefix)}
    for name, value in dense.items():
        got = read[name].float()
        if f"{name.removesuffix('weight')}scale_weight" in read:
            got = got * read[f"{name.removesuffix('weight')}scale_weight"]
        torch.testing.assert_close(got, value.float() + (patched and name == query), rtol=1e-2, atol=1e-2)
    assert not any(name.endswith(("comfy_quant", "weight_scale", "input_scale")) for name in read)
    assert any(name.endswith("scale_weight") for name in read) == (loader != "stock" and not patched)


@pytest.mark.skipif(
    not hasattr(comfy.utils, "detect_layer_quantization"), reason="this ComfyUI does not read such files"
)
def test_a_t5_whose_formats_are_in_the_header_is_saved_as_a_dense_one(scaled_t5, clip_l, tmp_path):
    """The new file's header does not have them."""
    scaled, dense = scaled_t5
    stored = {name: tensor for name, tensor in in_todays_format(scaled).items() if not name.endswith("comfy_quant")}
    layers = {name.removesuffix(".weight_scale"): FP8 for name in stored if name.endswith(".weight_scale")}
    path = tmp_path / "t5.safetensors"
    save_file(stored, path, {"_quantization_metadata": json.dumps({"layers": layers})})
    clip = load_dual_clip([clip_l, path], [])
    sources = {source.name: source for source in sources_of_encoders(clip, Vae())}
    assert not any(name.endswith("weight_scale") for name in sources)
    for name, value in dense.items():
        read = sources[f"text_encoders.t5xxl.transformer.{name}"].read(CPU)
        torch.testing.assert_close(read.float(), value.float(), rtol=1e-2, atol=1e-2)


def test_a_stock_t5_in_plain_fp8_is_saved_as_it_is(scaled_t5, stock_clip):
    fp8 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in scaled_t5[1].items()}
    clip = stock_clip(fp8)
    sources = {source.name: source for source in sources_of_encoders(clip, Vae())}
    for name, tensor in fp8.items():
        held = comfy.utils.get_attr(clip.cond_stage_model, f"t5xxl.transformer.{name}")
        saved = sources[f"text_encoders.t5xxl.transformer.{name}"].read(CPU)
        assert saved.dtype == held.dtype
        assert torch.equal(saved.float(), tensor.float())
    assert saved.dtype == torch.float8_e4m3fn


# ComfyUI's nodes on a CLIP whose T5 is in 4 bits, against its dense twin


@pytest.fixture
def clips(t5, clip_l, tmp_path):
    """One with a T5 in 4 bits, its dense twin, and a dense one with other weights."""
    model, path = t5()
    twin = {n: t.clone() for n, t in dense_reference(model).state_dict().items() if "embed_tokens" not in n}
    generator = torch.Generator().manual_seed(3)
    other = {name: torch.randn(value.shape, generator=generator) / 10 for name, value in twin.items()}
    for name, state in (("twin", twin), ("other", other)):
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = (path, tmp_path / "twin.safetensors", tmp_path / "other.safetensors")
    return [load_dual_clip([clip_l, path], []) for path in paths]


def t5_lora():
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "block_0_layer_0_SelfAttention_q": (128, 128),
        "block_1_layer_1_DenseReluDense_wi_0": (256, 128),
        "block_1_layer_1_DenseReluDense_wo": (128, 256),
    }
    lora = {}
    for name, (rows, columns) in shapes.items():
        lora[f"lora_te2_encoder_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 5
        lora[f"lora_te2_encoder_{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 5
    return lora


def with_t5_lora(clip):
    return comfy.sd.load_lora_for_models(None, clip, t5_lora(), 0, 0.7)[1]


def with_hooks(clip, hooks):
    (hooked,) = SetClipHooks().apply_hooks(clip, schedule_clip=False, apply_to_conds=False, hooks=hooks)
    return hooked


ON_A_CLIP = {
    "LoRA": lambda clip, other: with_t5_lora(clip),
    "LoRA as a hook": lambda clip, other: with_hooks(clip, comfy.hooks.create_hook_lora(t5_lora(), 0, 0.7)),
    "LoRA and a hook": lambda clip, other: with_hooks(
        with_t5_lora(clip), comfy.hooks.create_hook_lora(t5_lora(), 0, -0.4)
    ),
    "model as LoRA": lambda clip, other: with_hooks(
        clip, comfy.hooks.create_hook_model_as_lora(None, weights_of(other), 0, 0.4)
    ),
    "its weights as another's LoRA": lambda clip, other: with_hooks(
        other, comfy.hooks.create_hook_model_as_lora(None, weights_of(clip), 0, 0.4)
    ),
    "merge": lambda clip, other: CLIPMergeSimple().merge(clip, other, 0.3)[0],
    "merge into another": lambda clip, other: CLIPMergeSimple().merge(other, clip, 0.3)[0],
    "merge of a patched one": lambda clip, other: CLIPMergeSimple().merge(other, with_t5_lora(clip), 0.3)[0],
    "sum": lambda clip, other: CLIPAdd().merge(clip, other)[0],
    "difference": lambda clip, other: CLIPSubtract().merge(clip, other, 0.5)[0],
}


def weights_of(clip):
    return comfy.hooks.get_patch_weights_from_model(clip.patcher)


def encoded(clip):
    return clip.encode_from_tokens(PROMPT).float()


@pytest.mark.parametrize("act", ON_A_CLIP.values(), ids=ON_A_CLIP)
def test_what_nodes_do_to_a_t5_in_4_bits_is_what_they_do_to_its_dense_twin(act, clips):
    ours, twin, other = clips
    plain, expected = encoded(twin), encoded(act(twin, other))
    assert (expected - plain).norm() / plain.norm() > 0.05, "it changes too little to prove anything"
    found = encoded(act(ours, other))
    assert (found - expected).norm() / expected.norm() < 5e-3
    again = encoded(ours)
    assert (again - plain).norm() / plain.norm() < 5e-3, "clones share their layers, and not their patches"


def test_a_t5_in_4_bits_is_saved_as_a_dense_one(clips, clip_l, tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path / "output"))
    ours, twin, _ = clips
    for clip, name in ((ours, "plain"), (with_t5_lora(ours), "patched")):
        CLIPSave().save(clip, name)
    files = {name: min((tmp_path / "output").glob(f"{name}_t5xxl*")) for name in ("plain", "patched")}
    for name, expected in (("plain", twin), ("patched", with_t5_lora(twin))):
        assert not any(key.endswith(("packed_0", "absmax_0")) for key in load_file(files[name]))
        found, wanted = encoded(load_dual_clip([files[name], clip_l], [])), encoded(expected)
        assert (found - wanted).norm() / wanted.norm() < 5e-3


def test_a_lora_is_taken_from_the_difference_of_two_in_4_bits(clips):
    """As LoraSave does: it reads the weights of what CLIPSubtract gives."""
    ours, _, _ = clips
    (difference,) = CLIPSubtract().merge(with_t5_lora(ours), ours, 1.0)
    comfy.model_management.load_models_gpu([difference.load_model()], force_patch_weights=True)
    state, lora = difference.patcher.model_state_dict(), t5_lora()
    start = "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora"
    wanted = 0.7 * lora[f"{start}_up.weight"] @ lora[f"{start}_down.weight"]
    found = state["t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"]
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=5e-3)
