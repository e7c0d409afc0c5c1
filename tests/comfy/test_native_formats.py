"""A Flux in each of ComfyUI's native quantised formats, streamed: as in stock ComfyUI, and with a LoRA no worse.

ComfyUI has them since it brings comfy-kitchen (0.8; those of 4 and 8 bits with rotation since 0.33); on versions
without it there is nothing to test.
"""

import collections
import json

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.supported_models
import comfy.utils
import loras
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from native_files import has_formats
from tiny_flux import tiny_config

from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.plan import Residency

if not has_formats():
    pytest.skip("this ComfyUI has not all of the formats", allow_module_level=True)

from comfy_kitchen.exceptions import NoCapableBackendError
from comfy_kitchen.registry import registry
from comfy_kitchen.tensor import QuantizedTensor

CPU = torch.device("cpu")
DOUBLES, SINGLES = 2, 3
CONVROT = {"convrot": True, "convrot_groupsize": 256}
ROW = {"is_weight": True, "per_channel": True}
FORMATS = {
    "fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, {}),
    "MXFP8": ("mxfp8", "TensorCoreMXFP8Layout", {}, {}),
    "NVFP4": ("nvfp4", "TensorCoreNVFP4Layout", {}, {}),
    "INT8": ("int8_tensorwise", "TensorWiseINT8Layout", ROW, {}),
    "INT8 ConvRot": ("int8_tensorwise", "TensorWiseINT8Layout", ROW | CONVROT, CONVROT),
    "W4A4": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", {}, {"convrot_groupsize": 256}),
    "W4A8": ("asym_w4a8_int8", "AsymW4A8Int8Layout", {}, {"convrot_groupsize": 256}),
}


@pytest.fixture(scope="module")
def dense():
    """A stock patcher of a small Flux with random weights in fp32."""
    config = comfy.supported_models.Flux(tiny_config(DOUBLES, SINGLES))
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = config.get_model({}, "").requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


@pytest.fixture(scope="module")
def shapes(dense):
    """(out, in) of the Linears that get a LoRA: those in the blocks."""
    return loras.linear_shapes(dense.model)


def quantised(dense, shapes, kind):
    """The state dict of a file of ``dense`` in a format."""
    name, layout, arguments, more = FORMATS[kind]
    state = {key: value.to(torch.bfloat16) for key, value in dense.model.diffusion_model.state_dict().items()}
    for layer in shapes:
        weight = state.pop(f"{layer}.weight")
        state |= QuantizedTensor.from_float(weight, layout, **arguments).state_dict(f"{layer}.weight")
        said = json.dumps({"format": name, **more}).encode()
        state[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    return state


@pytest.fixture
def load_native(dense, shapes, monkeypatch):
    """A function: a stock patcher of a file in a format, as ComfyUI's own loader makes it."""

    def load(kind):
        state = quantised(dense, shapes, kind)

        def detected(*_, **__):
            config = comfy.supported_models.Flux(tiny_config(DOUBLES, SINGLES))
            config.quant_config = comfy.utils.detect_layer_quantization(state, "")
            return config

        monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", detected)
        return comfy.sd.load_diffusion_model_state_dict(dict(state))

    return load


@pytest.fixture
def latents(conditioning):
    """A function: what a patcher samples. In ``no_grad``, not inference mode: there stock ComfyUI cannot take a
    quantised weight back that was made outside of it."""

    def sample(patcher):
        noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 8, 8), 1)
        with torch.no_grad():
            return comfy.sample.sample(
                patcher, noise, 2, 1.0, "euler", "simple", conditioning(), conditioning(), torch.zeros(1, 16, 8, 8)
            ).clone()

    return sample


@pytest.fixture
def kernels(monkeypatch):
    """Counts the kernels of comfy-kitchen by name."""
    counted, choose = collections.Counter(), type(registry).get_implementation

    def counting(self, name, *args, **kwargs):
        counted[name] += 1
        return choose(self, name, *args, **kwargs)

    monkeypatch.setattr(type(registry), "get_implementation", counting)
    return counted


def counted_in(kernels, function, *args):
    kernels.clear()
    result = function(*args)
    return dict(kernels), result


def streamed(patcher, resident=1):
    return stream_model(patcher, Residency((("double", resident), ("single", resident))), None)


def patched_by(patcher, file, strength=1.0):
    return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]


@pytest.mark.parametrize("kind", FORMATS)
def test_streamed_is_as_in_stock_comfyui(kind, load_native, latents, copies):
    patcher = load_native(kind)
    expected = latents(patcher)
    for resident in (0, 1, DOUBLES):
        copies.nbytes = 0
        assert torch.equal(latents(streamed(patcher, resident)), expected)
        assert copies.nbytes > 0


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_leaves_the_multiplications_as_they_are(
    kind, load_native, dense, latents, shapes, copies, kernels, caplog
):
    file = loras.kohya(shapes, rank=16)

    def with_lora(patcher):
        return patched_by(patcher, file, 4.0)

    reference = latents(with_lora(dense))
    comfy.model_management.unload_all_models()
    patcher = load_native(kind)
    stock = latents(with_lora(patcher))
    comfy.model_management.unload_all_models()
    ours = streamed(patcher)
    without, plain = counted_in(kernels, latents, ours)
    patched = with_lora(ours)
    assert "skipped" not in caplog.text
    assert patched.patches.keys() == {f"diffusion_model.{name}.weight" for name in shapes}
    with_it, found = counted_in(kernels, latents, patched)
    assert sum(without.values()) > 0
    assert with_it == without

    def error(of):
        return ((of - reference).norm() / reference.norm()).item()

    assert error(found) < 0.9 * error(plain), "it has no effect"
    assert error(found) < error(stock), "the weight that stock ComfyUI quantises once more is nearer"


@pytest.mark.parametrize("kind", ["fp8", "INT8 ConvRot"])
def test_compiled_blocks_take_a_lora_too(kind, load_native, latents, shapes, copies):
    """As ComfyUI's own helper compiles them; the backend computes as torch does, but for the order of additions."""
    ours, file = streamed(load_native(kind)), loras.kohya(shapes, rank=16)
    plain, expected = latents(ours), latents(patched_by(ours, file))
    torch.compiler.reset()
    compiled = patched_by(ours, file)
    keys = ["diffusion_model.double_blocks.1", "diffusion_model.single_blocks.1"]
    set_torch_compile_wrapper(model=compiled, backend="eager", keys=keys)
    found = latents(compiled)
    assert compiled.model.streaming.streamer.whole_blocks
    assert (found - expected).norm() < 0.01 * (expected - plain).norm()
    assert torch.equal(latents(ours), plain)


def by_bypass(patcher, file):
    return comfy.sd.load_bypass_lora_for_models(patcher, None, file, 1.0, 0)[0]


def compiled(patcher, _):
    clone = patcher.clone()
    set_torch_compile_wrapper(model=clone, backend="eager", keys=["diffusion_model.single_blocks.0"])
    return clone


@pytest.mark.parametrize(("bind", "what"), [(by_bypass, "a LoRA by bypass"), (compiled, "torch.compile")])
def test_what_is_bound_to_layers_is_refused_and_the_model_stays(bind, what, load_native, latents, shapes, copies):
    patcher, file = load_native("INT8 ConvRot"), loras.kohya(shapes)
    before = latents(patcher)
    bound = bind(patcher, file)
    expected = latents(bound)
    with pytest.raises(ValueError, match=rf"has {what}.* Put the node Stream Model Blocks before the one"):
        streamed(bound)
    assert torch.equal(latents(bound), expected)
    assert torch.equal(latents(patcher), before)
    after = latents(bind(streamed(patcher), file))
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_a_lora_of_another_family_is_said_and_changes_nothing(load_native, latents, copies, caplog):
    ours = streamed(load_native("INT8 ConvRot"))
    expected = latents(ours)
    name = "lora_unet_down_blocks_1_attentions_0_proj_in"
    other = {f"{name}.lora_up.weight": torch.ones(64, 4), f"{name}.lora_down.weight": torch.ones(4, 64)}
    assert torch.equal(latents(patched_by(ours, other)), expected)
    assert any("Is the LoRA for a model of another family" in line for line in caplog.messages)


def test_a_format_without_a_kernel_here_is_said_and_the_model_goes_on(load_native, latents, copies, monkeypatch):
    ours = streamed(load_native("INT8 ConvRot"))
    expected = latents(ours)

    def refuse(self, name, *_, **__):
        raise NoCapableBackendError(name, {"eager": "compute capability 6.1"})

    with monkeypatch.context() as without:
        without.setattr(type(registry), "get_implementation", refuse)
        with pytest.raises(RuntimeError, match=r"comfy-kitchen [\d.]+ cannot compute .* on cpu .* 6\.1.* bf16"):
            latents(ours)
    assert torch.equal(latents(ours), expected)
