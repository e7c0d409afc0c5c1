"""A tiny Flux in an NF4 file, loaded and sampled by ComfyUI in process."""

import copy
import functools
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.sample
import psutil
import pytest
import torch
from encoder_sizes import CLIP_L, LAYERS, T5
from make_checkpoint import Recipe, make_checkpoint
from prompts import prompt
from safetensors.torch import save_file
from tiny_blocks import DOUBLES, SINGLES
from tiny_flux import HIDDEN, detection_of
from transformers import PreTrainedTokenizerBase

from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.require import require_transformer
from flux_nf4.nf4_loader.models import text_encoders
from flux_nf4.nf4_loader.models import transformers as transformers_of_comfyui
from flux_nf4.nf4_loader.models.fill import fill
from flux_nf4.nf4_loader.models.transformers import build_transformer, materialise
from flux_nf4.offload import file_arena, host_memory, record
from flux_nf4.offload.comfyui import large_layers
from flux_nf4.offload.comfyui import streaming as streaming_module
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.copies import InlineCopies
from flux_nf4.offload.plan import Residency

CPU = torch.device("cpu")


class CountingCopies(InlineCopies):
    """Copies on the CPU "device"; ``nbytes`` is what they moved since it was set to 0."""

    def __init__(self):
        super().__init__(CPU)
        self.nbytes = 0

    def copy(self, pairs, **events):
        self.nbytes += sum(source.nbytes for _, source in pairs)
        super().copy(pairs, **events)


@pytest.fixture(autouse=True)
def _nothing_is_loaded():
    """ComfyUI's list of loaded models is as empty as when it starts."""
    yield
    comfy.model_management.current_loaded_models.clear()


@pytest.fixture(autouse=True)
def _ram_is_plenty():
    """As much as is asked for, whatever this machine has free. A test makes RAM short with `free_ram`."""
    # Not by the fixture monkeypatch: it would begin before all fixtures that replace names, and be undone after them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_memory, "SPARE_BYTES", 0)
        patch.setattr(file_arena, "_room_for_pins", lambda: 1 << 40)
        yield


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_of_comfyui_are_read_once(comfyui):
    """One has 150,000 words, which take half a second of each test that makes a CLIP."""
    read = PreTrainedTokenizerBase.from_pretrained.__func__

    @functools.cache
    def read_once(kind, path):
        tokenizer = read(kind, path)
        tokenizer.get_vocab = functools.cache(tokenizer.get_vocab)
        return tokenizer

    def from_pretrained(kind, path, **options):
        is_comfyuis = Path(path).resolve().is_relative_to(comfyui.resolve()) and not options
        return read_once(kind, path) if is_comfyuis else read(kind, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "from_pretrained", classmethod(from_pretrained))
        yield


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """A dev file with hidden size 256, which ComfyUI's detection of some versions does not take: see `load`."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    recipe = Recipe(double_blocks=DOUBLES, single_blocks=SINGLES, hidden=HIDDEN, unet_only=True)
    make_checkpoint(path, recipe)
    return path


@pytest.fixture(scope="session")
def flux_config():
    """A function: ComfyUI's configuration of a small Flux with so many blocks."""
    return lambda double, single: detection_of(double, single)()


@pytest.fixture
def tiny_config(monkeypatch):
    """ComfyUI "detects" the tiny model."""
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", detection_of(DOUBLES, SINGLES))


@pytest.fixture
def load(tiny_file, tiny_config):
    """A function: a fresh patcher of the tiny file with these block counts."""

    def make(double=0, single=0):
        catalogue = read_catalogue(tiny_file)
        model = load_transformer(catalogue)
        return streamed(model, Residency((("double", double), ("single", single))), node_id=None)

    return make


@pytest.fixture(scope="session")
def random_model(flux_config):
    """A dense model in stock ComfyUI with random weights, in the tiny model's shape."""
    config = flux_config(DOUBLES, SINGLES)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = config.get_model({}, "")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.fixture
def dense(random_model, flux_config):
    """A stock patcher of a copy of it, with a configuration of its own."""
    config = flux_config(DOUBLES, SINGLES)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = copy.deepcopy(random_model, {id(random_model.model_config): config})
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


@pytest.fixture
def read_model(tiny_config, monkeypatch):
    """A function: ComfyUI's model of a tiny file of any layout and depth, all of it read."""

    def read(path):
        catalogue = read_catalogue(path)
        require_transformer(catalogue)
        tiny = comfy.model_detection.model_config_from_unet()
        for key, name in (("depth", "double_blocks"), ("depth_single_blocks", "single_blocks")):
            tiny.unet_config[key] = len({n.split(".")[1] for n in catalogue.transformer if n.startswith(f"{name}.")})
        monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", lambda *_: tiny)
        model = build_transformer(catalogue)
        materialise(model.diffusion_model)
        read = []
        fill(model, catalogue, read.append)
        assert sum(read) == catalogue.transformer_bytes
        return model

    return read


@pytest.fixture
def copies(monkeypatch):
    """Makes patchers stream on the CPU, through the `CountingCopies` that this is."""
    counting = CountingCopies()
    # As many tiles for the tiny model as for the real one, and a ring that is smaller than a double block.
    monkeypatch.setattr(record, "SMALL_BYTES", 2048)
    monkeypatch.setattr(StreamedModelPatcher, "staging_bytes", 600_000)
    monkeypatch.setattr(StreamedModelPatcher, "_computes_from_host", False)
    monkeypatch.setattr(streaming_module, "copies_to", lambda device: counting)
    return counting


@pytest.fixture
def clip_copies(copies, monkeypatch):
    """As ``copies``, of text encoders. Their embeddings are large."""
    monkeypatch.setattr(large_layers, "LARGE_BYTES", 50_000)
    monkeypatch.setattr(StreamedModelPatcher, "staging_bytes", 100_000)
    return copies


@pytest.fixture
def free_ram(monkeypatch):
    """A function: has ComfyUI see this much free RAM (bytes), and no swap."""
    real = comfy.model_management.get_free_memory

    def set_to(nbytes):
        def get_free_memory(dev=None, torch_free_too=False):
            return real(dev, torch_free_too) if torch_free_too or dev != torch.device("cpu") else nbytes

        monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)

    monkeypatch.setattr(psutil, "swap_memory", lambda: type("Swap", (), {"free": 0}))
    return set_to


def sample(patcher, seed=1, steps=2, cfg=1.0, sampler="euler", positive=None, negative=None, latent=None, **options):
    """Latents of a small picture."""
    positive, negative = positive or prompt(), negative or prompt()
    latent = torch.zeros(1, 16, 8, 8) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher, noise, steps, cfg, sampler, "simple", positive, negative, latent, seed=seed, **options
        ).clone()


@pytest.fixture
def conditioning():
    """A function: what text encoders give for a prompt."""
    return prompt


@pytest.fixture(name="sample")
def sample_fixture():
    return sample


@pytest.fixture
def tiny_encoders(monkeypatch):
    """ComfyUI's text encoders are as small as those of `clip_l` and `t5`."""

    def options(weights, layers, made=text_encoders.options_for):
        found = made(weights, layers)
        found["t5xxl_model_config"] |= T5
        return found | {"model_config": dict(CLIP_L), "clip_l_model_config": dict(CLIP_L)}

    for module in (text_encoders, transformers_of_comfyui):
        monkeypatch.setattr(module, "options_for", options)


@pytest.fixture(scope="module")
def clip_l(tmp_path_factory):
    """A file of transformers' CLIP-L."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("clip_l") / "clip_l.safetensors"
    state = CLIPTextModel(CLIPTextConfig(**CLIP_L)).half().state_dict()
    if not any(name.startswith("text_model.") for name in state):
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A function: transformers' own quantised T5 and the file that transformers saved."""
    from transformers import BitsAndBytesConfig, T5Config, T5EncoderModel

    @functools.cache
    def make(quant_type="nf4", double_quant=False, skip=("wo",), shards="1GB"):
        torch.manual_seed(0)
        dense = tmp_path_factory.mktemp("dense")
        config = T5Config(**T5, num_layers=LAYERS, feed_forward_proj="gated-gelu", is_encoder_decoder=False)
        T5EncoderModel(config).bfloat16().save_pretrained(dense)
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            llm_int8_skip_modules=list(skip),
        )
        model = T5EncoderModel.from_pretrained(
            dense, quantization_config=quantisation, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        folder = tmp_path_factory.mktemp("t5")
        model.save_pretrained(folder, max_shard_size=shards)
        return model, min(folder.glob("*.safetensors"))

    return make
