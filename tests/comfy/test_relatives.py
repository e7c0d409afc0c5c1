"""Flux 2 and Chroma in 4 bits: ComfyUI's own classes, and what their dense model computes."""

import dataclasses

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.model_detection
import comfy.supported_models
import pytest
import torch
from safetensors.torch import save_file

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.require import require_transformer
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models.fill import fill
from flux_nf4.nf4_loader.models.transformers import build_transformer, materialise
from flux_nf4.nf4_loader.saving.quantise import QuantSettings, quantise

COMMON = {
    "context_in_dim": 64,
    "hidden_size": 256,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
}
CHROMA = COMMON | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "mlp_ratio": 4.0,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "in_dim": 64,
    "out_dim": 256,
    "hidden_dim": 128,
    "n_layers": 2,
}
FLUX2 = COMMON | {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "mlp_ratio": 3.0,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "ops_bias": False,
    "vec_in_dim": None,
    "global_modulation": True,
    "mlp_silu_act": True,
    "guidance_embed": True,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}


NEWER = {"txt_ids_dims": [], "vec_in_dim": None}
"""What newer versions of ComfyUI find out beside these."""


def known(config, parameters):
    """``config`` with what this ComfyUI takes of `NEWER`."""
    fields = {field.name for field in dataclasses.fields(parameters)}
    return {name: value for name, value in NEWER.items() if name in fields} | config


def dense_model(kind, config):
    model = getattr(comfy.supported_models, kind)(dict(config))
    model.set_inference_dtype(torch.float32, None)
    return model.get_model({}, "")


@pytest.mark.parametrize(
    ("kind", "config", "channels", "marks"),
    [("Chroma", CHROMA, 16, "distilled_guidance_layer"), ("Flux2", FLUX2, 128, "double_stream_modulation_img")],
    ids=["Chroma", "Flux 2"],
)
@pytest.mark.parametrize("nested", [False, True], ids=["fp32 absmax", "nested absmax"])
def test_a_relative_computes_what_its_dense_model_does(kind, config, channels, marks, nested, tmp_path, monkeypatch):
    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    parameters = comfy.ldm.chroma.model.ChromaParams if kind == "Chroma" else comfy.ldm.flux.model.FluxParams
    config = known(config, parameters)
    dense = dense_model(kind, config).diffusion_model
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in dense.state_dict().items():
        value = torch.randn(value.shape, generator=generator) * (0.05 if value.dim() == 2 else 0.1) + (
            1.0 if name.endswith(".scale") else 0.0
        )
        if value.dim() == 2:
            tensors |= {name + end: tensor for end, tensor in quantise(value, QuantSettings(nested=nested)).items()}
        else:
            tensors[name] = value
    assert any(name.startswith(marks) for name in tensors)
    path = tmp_path / "relative.safetensors"
    save_file(tensors, path)
    detected = getattr(comfy.supported_models, kind)(dict(config))
    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", lambda *_: detected)
    catalogue = read_catalogue(path)
    require_transformer(catalogue)
    model = build_transformer(catalogue)
    materialise(model.diffusion_model)
    fill(model, catalogue, lambda _: None)
    ours = model.diffusion_model
    assert type(ours) is type(dense)
    linears = {name: module for name, module in ours.named_modules() if isinstance(module, Linear4bit)}
    assert len(linears) == sum(name.endswith(".absmax") for name in tensors)
    state = {name: value for name, value in tensors.items() if name in dense.state_dict()}
    state |= {f"{name}.weight": linear.dequantise(torch.float32) for name, linear in linears.items()}
    dense.load_state_dict(state)
    latent, text = torch.randn(1, channels, 8, 8, generator=generator), torch.randn(1, 5, 64, generator=generator)
    arguments = (latent, torch.tensor([0.7]), text)
    with torch.no_grad():
        wanted = dense(*arguments, guidance=torch.tensor([3.5]))
        got = ours(*arguments, guidance=torch.tensor([3.5]))
    assert wanted.std() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    gates = [module for module in ours.modules() if type(module).__name__ == "SiLUActivation"]
    assert len(gates) == (3 if kind == "Flux2" else 0)
    for gate in gates:
        check_gate(gate)


def check_gate(gate):
    """It gives the bits of ComfyUI's own, in the memory of its input where no gradient goes through."""
    stock = type(gate)()
    for dtype in (torch.float32, torch.bfloat16):
        layers_output = torch.randn(2, 7, 3 * 320, generator=torch.Generator().manual_seed(1)).to(dtype)
        before = layers_output.clone()
        with torch.inference_mode():
            got = gate(layers_output.split([320, 640], -1)[1])
            assert torch.equal(got, stock(before[..., 320:]))
        assert torch.equal(layers_output[..., 320:640], torch.nn.functional.silu(before[..., 320:640]))
        for others in (slice(320), slice(640, None)):
            assert torch.equal(layers_output[..., others], before[..., others])
    input = torch.randn(2, 8, requires_grad=True)
    gate(input * 2).sum().backward()
    wanted = torch.autograd.grad(stock(input * 2).sum(), input)[0]
    assert torch.equal(input.grad, wanted)
