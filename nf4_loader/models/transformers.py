"""From a catalogue to ComfyUI's model of the transformer, CLIP and VAE."""

import contextlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.ldm.flux.layers
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfyui_version
import torch
from torch import nn
from torch.nn import functional

from ... import families
from ...memory import is_out_of_memory, is_out_of_ram
from ..checkpoint.catalogue import TEXT_ENCODERS_PREFIX, Catalogue
from ..checkpoint.config import told_by_config
from ..checkpoint.errors import DAMAGED, CheckpointError
from ..checkpoint.header import natural_key
from ..checkpoint.read_parts import read_entries
from ..checkpoint.require import require_no_missing
from ..linear.linear4bit import Linear4bit
from .text_encoders import (
    adopt_4bit,
    options_for,
    read_encoders,
    require_complete,
    require_computable,
    transformers_of,
)

logger = logging.getLogger(__name__)


class _Operations(comfy.ops.manual_cast):
    """ComfyUI's layers, for weights that are not packed."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            # With dynamic VRAM, ComfyUI makes a Linear without parameters unless this method is overridden.
            nn.Linear._load_from_state_dict(self, *args, **kwargs)


class _InPlaceSiLU(nn.SiLU):
    """Overwrites its input, where no gradient needs that."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.silu(input, inplace=not torch.is_grad_enabled())


def _gate_in_place(transformer: nn.Module) -> None:
    """Have FLUX.2's MLPs put ``silu(gate)`` where ``gate`` was, a part of a Linear's output that nothing else reads.

    At 1024x1024 this takes 162 MiB less in a single block of dev, where it was the peak of a forward."""
    gated: Any = getattr(comfy.ldm.flux.layers, "SiLUActivation", ())  # from before FLUX.2 ComfyUI has none
    for module in transformer.modules():
        if isinstance(module, gated):
            module.gate_fn = _InPlaceSiLU()


def build_transformer(catalogue: Catalogue) -> comfy.model_base.BaseModel:
    """Make ComfyUI's model for the file, every tensor of it on the meta device.

    The configuration is ComfyUI's own detection, run on meta tensors of the logical shapes. Packed weights
    become `Linear4bit`; the rest are ComfyUI's layers in the dtype it picks for this machine.

    Raises:
        CheckpointError: ComfyUI sees no model of a known family in it, or a layer is missing or has another shape.
    """
    config = _detected(catalogue)
    dtype = _inference_dtype(config, catalogue)
    management = comfy.model_management
    manual_cast = management.unet_manual_cast(
        dtype, management.get_torch_device(), list(config.supported_inference_dtypes)
    )
    config.set_inference_dtype(dtype, manual_cast)
    config.custom_operations = _Operations
    # Ordinary tensors, not inference ones: the streaming threads may run outside inference mode.
    with torch.inference_mode(False), torch.no_grad():
        with _refusing_what_comfyui_cannot_take(catalogue):
            model = config.get_model({}, "", device=torch.device("meta"))
        modules = _adopt_4bit_weights(model, catalogue, dtype)
        _gate_in_place(model.diffusion_model)
    model.device = management.unet_offload_device()
    _check_complete(model, modules, catalogue)
    return model


def model_dtype(catalogue: Catalogue) -> torch.dtype:
    """The dtype that `build_transformer` gives dense tensors.

    Raises:
        CheckpointError: ComfyUI sees no model of a known family in the file.
    """
    return _inference_dtype(_detected(catalogue), catalogue)


def _detected(catalogue: Catalogue) -> Any:
    """ComfyUI's configuration of the model."""
    state = {name: torch.empty(shape, device="meta") for name, shape in catalogue.logical_shapes.items()}
    state |= {name: torch.empty(0, device="meta") for name in told_by_config(catalogue)}
    with _refusing_what_comfyui_cannot_take(catalogue):
        config = comfy.model_detection.model_config_from_unet(state, "")
    found = getattr(config, "unet_config", {}).get("image_model")
    family = families.family_of_model(found)
    too_old = _why_comfyui_is_too_old(catalogue)
    if family is None or (too_old and catalogue.found is not None and family is not catalogue.found.family):
        seen = "no model that it knows" if found is None else repr(found)
        raise CheckpointError(
            catalogue.path, too_old or f"ComfyUI sees {seen} in it. This node loads only {families.names()}."
        )
    return config


def _why_comfyui_is_too_old(catalogue: Catalogue) -> str:
    """If this ComfyUI is older than the file's model: a sentence that says so, and what to do; else ""."""
    if catalogue.found is None:
        return ""
    family, shapes = catalogue.found.family, catalogue.logical_shapes
    since, version = family.since(shapes), getattr(comfyui_version, "__version__", "")
    if not version or _numbers(version) >= _numbers(since):
        return ""
    model = f"{family.name} {family.variant(shapes)}".rstrip()
    return f"it is a {model} model, which ComfyUI has from version {since} on. This is {version}: update ComfyUI."


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _inference_dtype(config: Any, catalogue: Catalogue) -> torch.dtype:
    numel = sum(math.prod(shape) for shape in catalogue.logical_shapes.values())
    supported = list(config.supported_inference_dtypes)
    dtype: torch.dtype = comfy.model_management.unet_dtype(model_params=numel, supported_dtypes=supported)
    return dtype


@contextlib.contextmanager
def _refusing_what_comfyui_cannot_take(catalogue: Catalogue) -> Iterator[None]:
    """A context for code of ComfyUI's that uses unchecked shapes: whatever it raises becomes a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            catalogue.path,
            _why_comfyui_is_too_old(catalogue)
            or f"ComfyUI makes no model of its shapes ({type(error).__name__}: {error}). The file is damaged or of "
            "another model.",
        ) from error


def model_names(model: comfy.model_base.BaseModel, catalogue: Catalogue) -> dict[str, str]:
    """The catalogue's name of each tensor by its name in this ComfyUI's ``diffusion_model``."""
    return model.model_config.process_unet_state_dict({name: name for name in catalogue.transformer})


def _adopt_4bit_weights(
    model: comfy.model_base.BaseModel, catalogue: Catalogue, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Put a `Linear4bit` in the place of each Linear whose weight is packed. Returns all modules by name."""
    modules = dict(model.diffusion_model.named_modules())
    without_bias: list[str] = []
    for path, module in list(modules.items()):
        if not isinstance(module, nn.Linear):
            continue
        bias = f"{path}.bias" in catalogue.transformer
        if module.bias is not None and not bias:
            without_bias.append(path)
        tensor = catalogue.transformer.get(f"{path}.weight")
        if tensor is not None and tensor.weights4bit:
            expected = (module.out_features, module.in_features)
            if tensor.shape != expected:
                raise CheckpointError(
                    catalogue.path,
                    f"{path}.weight: its quant state says {tensor.shape}; this model needs {expected}. "
                    "The file is damaged or of another model.",
                )
            parent, _, name = path.rpartition(".")
            modules[path] = Linear4bit(tensor.held, bias=bias, dtype=dtype, device=torch.device("meta"))
            modules[parent]._modules[name] = modules[path]
        elif not bias:
            module.bias = None  # type: ignore[assignment]
    if without_bias and any(name.endswith(".bias") for name in catalogue.transformer):
        logger.warning(
            "NF4: %s: %d layers have no bias, though the model is made with one: %s",
            catalogue.path.name,
            len(without_bias),
            ", ".join(without_bias[:4]),
        )
    return modules


def _check_complete(model: comfy.model_base.BaseModel, modules: Mapping[str, nn.Module], catalogue: Catalogue) -> None:
    names = model_names(model, catalogue)
    shapes = catalogue.logical_shapes
    wanted = _tensor_shapes(modules)
    require_no_missing(catalogue.path, "the transformer", wanted.keys() - names.keys())
    for name in wanted:
        tensor = catalogue.transformer[names[name]]
        if tensor.weights4bit and not isinstance(modules.get(name.removesuffix(".weight")), Linear4bit):
            raise CheckpointError(
                catalogue.path,
                f"{names[name]}: it is packed in 4 bits, which only the weight of a Linear may be. The file is damaged "
                "or of another model.",
            )
        if shapes[names[name]] != wanted[name]:
            raise CheckpointError(
                catalogue.path,
                f"{names[name]}: it has shape {shapes[names[name]]}; this model needs {wanted[name]}. "
                "The file is damaged or of another model.",
            )
    buffers = dict(model.diffusion_model.named_buffers())
    unknown = sorted(names.keys() - wanted.keys() - buffers.keys(), key=natural_key)
    if unknown:
        logger.warning("NF4: %s: %d tensors not used: %s", catalogue.path.name, len(unknown), ", ".join(unknown[:4]))


def _tensor_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        shapes |= {prefix + name: tuple(own.shape) for name, own in module._parameters.items() if own is not None}
        if isinstance(module, Linear4bit):
            shapes[f"{prefix}weight"] = module.shape
    return shapes


def block_groups(model: comfy.model_base.BaseModel) -> dict[str, Sequence[nn.Module]]:
    """The transformer's blocks by kind, in the order in which a forward runs them."""
    family = families.family_of_model(model.model_config.unet_config.get("image_model"))
    assert family is not None, "`build_transformer` has checked it"
    return {kind: list(model.diffusion_model.get_submodule(blocks)) for blocks, kind in family.lists.items()}


def materialise(module: nn.Module) -> None:
    """Give every tensor of ``module`` that is still on the meta device uninitialised host memory."""
    with torch.inference_mode(False), torch.no_grad():
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and parameter.is_meta:
                    memory = torch.empty_like(parameter, device="cpu")
                    child._parameters[name] = nn.Parameter(memory, requires_grad=False)
            for name, buffer in child._buffers.items():
                if buffer is not None and buffer.is_meta:
                    child._buffers[name] = torch.empty_like(buffer, device="cpu")


def load_clip_and_vae(catalogue: Catalogue, embedding_directory: Sequence[str]) -> tuple[comfy.sd.CLIP, comfy.sd.VAE]:
    """Load the text encoders and the VAE of an all-in-one file through ComfyUI's own code.

    ComfyUI splits them off a state dict; the transformer in it is meta tensors, for its detection only. T5 gets
    as many layers as the file has. Both remember where their tensors are in the file, as ``nf4_entries``.

    Raises:
        CheckpointError: ComfyUI does not recognise them, they have other shapes, or a tensor of an encoder is missing.
    """
    shapes = catalogue.logical_shapes
    state = {families.CHECKPOINT_PREFIX + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    encoders, packed = read_encoders(catalogue.path, catalogue.text_encoders)
    require_computable(catalogue.path, encoders, packed)
    weights = {name.removeprefix(TEXT_ENCODERS_PREFIX): weight for name, weight in packed.items()}
    state |= encoders
    state |= read_entries(catalogue.vae.values())
    try:
        parts = comfy.sd.load_state_dict_guess_config(
            state,
            embedding_directory=list(embedding_directory),
            output_model=False,
            te_model_options=options_for(weights, catalogue.t5_layers),
        )
    except Exception as error:  # ComfyUI's code looks at shapes that nobody has checked, and raises whatever comes
        if is_out_of_ram(error) or is_out_of_memory(error):
            raise
        raise CheckpointError(
            catalogue.path,
            f"ComfyUI does not take its text encoders or VAE ({type(error).__name__}: {error}). {DAMAGED}",
        ) from error
    clip, vae = (parts[1], parts[2]) if parts else (None, None)
    if clip is None or vae is None or vae.first_stage_model is None:
        not_recognised = "text encoders" if clip is None else "VAE"
        raise CheckpointError(catalogue.path, f"ComfyUI does not recognise its {not_recognised}. {DAMAGED}")
    for part, transformer in transformers_of(clip).items():
        given = {name.removeprefix(f"{TEXT_ENCODERS_PREFIX}{part}.") for name in encoders}
        require_complete(catalogue.path, transformer, given)
    adopt_4bit(clip, weights)
    clip.cond_stage_model.nf4_entries = dict(catalogue.text_encoders)
    vae.first_stage_model.nf4_entries = dict(catalogue.vae)
    return clip, vae
