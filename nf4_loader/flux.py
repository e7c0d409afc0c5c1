"""From a catalogue to ComfyUI's Flux model, CLIP and VAE."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from safetensors import safe_open
from torch import nn

from .catalogue import TRANSFORMER_PREFIX, Catalogue
from .errors import CheckpointError
from .header import TensorEntry, natural_key
from .linear4bit import Linear4bit
from .patched_linear import PatchedLinear4bit
from .quant_state import CODES, NestedAbsmax, expand_nested_absmax
from .read import FileSlice, read_slices

logger = logging.getLogger(__name__)

_TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class _Operations(comfy.ops.manual_cast):
    """ComfyUI's layers for what is not packed."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            # With dynamic VRAM, ComfyUI makes a Linear without parameters unless this method is overridden.
            nn.Linear._load_from_state_dict(self, *args, **kwargs)


def build_flux(catalogue: Catalogue) -> comfy.model_base.Flux:
    """Make ComfyUI's model for the file, every tensor of it on the meta device.

    The configuration is ComfyUI's own detection, run on meta tensors of the logical shapes. Packed weights
    become `Linear4bit`; the rest are ComfyUI's layers in the dtype it picks for this machine.

    Raises:
        CheckpointError: ComfyUI does not see a Flux.1 model in it, or a layer is missing or has another shape.
    """
    shapes = catalogue.logical_shapes
    config = comfy.model_detection.model_config_from_unet(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, ""
    )
    found = getattr(config, "unet_config", {}).get("image_model")
    if found != "flux":
        raise CheckpointError(
            catalogue.path,
            f"ComfyUI sees {'no model that it knows' if found is None else repr(found)} in it, not Flux.1 "
            "(dev, schnell, Fill, Canny, Depth, Kontext, Krea). This node loads Flux.1 in 4 bits only.",
        )
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    management = comfy.model_management
    dtype = management.unet_dtype(model_params=numel, supported_dtypes=list(config.supported_inference_dtypes))
    manual_cast = management.unet_manual_cast(
        dtype, management.get_torch_device(), list(config.supported_inference_dtypes)
    )
    config.set_inference_dtype(dtype, manual_cast)
    config.custom_operations = _Operations
    # Ordinary tensors, not inference ones: the streaming threads may run outside inference mode.
    with torch.inference_mode(False), torch.no_grad():
        model = config.get_model({}, "", device=torch.device("meta"))
        _adopt_4bit_weights(model, catalogue, dtype)
    model.device = management.unet_offload_device()
    _check_complete(model, catalogue)
    return model


def _model_names(model: comfy.model_base.BaseModel, catalogue: Catalogue) -> dict[str, str]:
    """File name (without prefix) of each tensor by its name in this ComfyUI's ``diffusion_model``."""
    names = [*catalogue.weights4bit, *catalogue.dense]
    return model.model_config.process_unet_state_dict({name: name for name in names})


def _adopt_4bit_weights(model: comfy.model_base.BaseModel, catalogue: Catalogue, dtype: torch.dtype) -> None:
    modules = dict(model.diffusion_model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        bias = f"{path}.bias" in catalogue.dense
        weight = catalogue.weights4bit.get(f"{path}.weight")
        if weight is not None:
            state = weight.state
            expected = (module.out_features, module.in_features)
            if state.shape != expected:
                raise CheckpointError(
                    catalogue.path,
                    f"{path}.weight: its quant state says {state.shape}; this model needs {expected}. "
                    "The file is damaged or of another model.",
                )
            parent, _, name = path.rpartition(".")
            replacement = PatchedLinear4bit(
                state.shape, state.quant_type, state.blocksize, bias=bias, dtype=dtype, device=torch.device("meta")
            )
            setattr(modules[parent], name, replacement)
        elif not bias:
            module.bias = None  # type: ignore[assignment]


def _check_complete(model: comfy.model_base.BaseModel, catalogue: Catalogue) -> None:
    names = _model_names(model, catalogue)
    shapes = catalogue.logical_shapes
    wanted = _tensor_shapes(model.diffusion_model)
    missing = sorted(wanted.keys() - names.keys(), key=natural_key)
    if missing:
        raise CheckpointError(
            catalogue.path,
            f"tensors of the Flux transformer are missing ({len(missing)}): {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}. The file is incomplete: download it again.",
        )
    for name in wanted:
        if shapes[names[name]] != wanted[name]:
            raise CheckpointError(
                catalogue.path,
                f"{names[name]}: it has shape {shapes[names[name]]}; this model needs {wanted[name]}. "
                "The file is damaged or of another model.",
            )
    without_bias = [path for path, module in model.diffusion_model.named_modules() if _lacks_bias(module)]
    if without_bias and any(name.endswith(".bias") for name in wanted):
        logger.warning(
            "NF4: %s: %d layers have no bias, though others have: %s",
            catalogue.path.name,
            len(without_bias),
            ", ".join(without_bias[:4]),
        )
    unknown = sorted(names.keys() - wanted.keys(), key=natural_key)
    if unknown:
        logger.warning("NF4: %s: %d tensors not used: %s", catalogue.path.name, len(unknown), ", ".join(unknown[:4]))


def _lacks_bias(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Linear4bit) and module.bias is None


def _tensor_shapes(diffusion_model: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(parameter.shape) for name, parameter in diffusion_model.named_parameters()}
    for path, module in diffusion_model.named_modules():
        if isinstance(module, Linear4bit):
            shapes[f"{path}.weight"] = module.shape
    return shapes


def block_groups(model: comfy.model_base.BaseModel) -> dict[str, Sequence[nn.Module]]:
    """The transformer's blocks by kind, in the order in which a forward runs them."""
    diffusion_model = model.diffusion_model
    return {"double": list(diffusion_model.double_blocks), "single": list(diffusion_model.single_blocks)}


def materialise(module: nn.Module) -> None:
    """Give every tensor of ``module`` that is still on the meta device uninitialised host memory."""
    with torch.inference_mode(False), torch.no_grad():
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                if parameter.is_meta:
                    memory = torch.empty_like(parameter, device="cpu")
                    setattr(child, name, nn.Parameter(memory, requires_grad=False))
            for name, buffer in child.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(child, name, torch.empty_like(buffer, device="cpu"))


def transformer_bytes(catalogue: Catalogue) -> int:
    """Bytes of block and other transformer tensors that `fill` reads."""
    weights = catalogue.weights4bit.values()
    return sum(w.packed.nbytes + w.absmax.nbytes for w in weights) + sum(e.nbytes for e in catalogue.dense.values())


def transformer_ram(catalogue: Catalogue) -> int:
    """Bytes of host memory that the transformer takes once it is read, with nested absmax as fp32."""
    weights = catalogue.weights4bit.values()
    dense = sum(entry.nbytes for entry in catalogue.dense.values())
    return dense + sum(weight.packed.nbytes + 4 * weight.state.absmax_count for weight in weights)


def fill(model: comfy.model_base.BaseModel, catalogue: Catalogue, progress: Callable[[int], None]) -> None:
    """Read the transformer's tensors from the file into the host memory that ``model`` is bound to.

    Packed bytes and fp32 absmax go straight into place; nested absmax is expanded to fp32 and dense tensors of
    another dtype are converted on the way. ``progress`` gets byte counts that add up to `transformer_bytes`, less
    what the file has and the model does not.

    Raises:
        CheckpointError: the file ended early, could not be read, or has another code table than its type says.
    """
    direct: list[FileSlice] = []
    converted: list[tuple[FileSlice, torch.Tensor]] = []
    modules = dict(model.diffusion_model.named_modules())
    names = _model_names(model, catalogue)
    destinations = dict(model.diffusion_model.named_parameters())

    with torch.inference_mode(False), torch.no_grad():
        tables = _read_nested_tables(catalogue)
        for name, weight in catalogue.weights4bit.items():
            linear = modules.get(name.removesuffix(".weight"))
            if not isinstance(linear, Linear4bit):
                continue  # not of this model: `build_flux` has logged it
            direct.append(FileSlice(weight.packed.offset, linear.packed))
            if weight.state.nested is None:
                direct.append(FileSlice(weight.absmax.offset, linear.absmax))
            else:
                expand = functools.partial(_expand, weight.state.nested, linear.absmax, *tables[name])
                direct.append(FileSlice(weight.absmax.offset, _codes_of(linear.absmax), expand))
        for name, destination in destinations.items():
            entry = catalogue.dense[names[name]]
            if _torch_dtype(catalogue, entry) == destination.dtype:
                direct.append(FileSlice(entry.offset, destination))
            else:
                source = torch.empty(entry.shape, dtype=_torch_dtype(catalogue, entry))
                converted.append((FileSlice(entry.offset, source), destination))

        _check_code_tables(catalogue)
        read_slices(catalogue.path, [*direct, *(item for item, _ in converted)], progress)
        for item, destination in converted:
            destination.copy_(item.destination)


def _torch_dtype(catalogue: Catalogue, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in _TORCH_DTYPES:
        raise CheckpointError(
            catalogue.path,
            f"{entry.name}: a dense tensor of dtype {entry.dtype}; expected one of {', '.join(_TORCH_DTYPES)}. "
            "The file is damaged or was made by a tool that this node does not know.",
        )
    return _TORCH_DTYPES[entry.dtype]


def _read_small(catalogue: Catalogue, entries: Sequence[TensorEntry]) -> list[torch.Tensor]:
    tensors = [torch.empty(entry.shape, dtype=torch.float32) for entry in entries]
    slices = [FileSlice(entry.offset, tensor) for entry, tensor in zip(entries, tensors, strict=True)]
    read_slices(catalogue.path, slices, lambda _: None)
    return [tensor.view(-1) for tensor in tensors]


def _check_code_tables(catalogue: Catalogue) -> None:
    weights = list(catalogue.weights4bit.items())
    tables = _read_small(catalogue, [weight.quant_map for _, weight in weights])
    for (name, weight), table in zip(weights, tables, strict=True):
        if not torch.allclose(table, torch.tensor(CODES[weight.state.quant_type]), rtol=0, atol=1e-6):
            raise CheckpointError(
                catalogue.path,
                f"{name}.quant_map: it is not the {weight.state.quant_type} code table ({table.tolist()}). "
                "The file is damaged or was made by a tool that this node does not know.",
            )


def _read_nested_tables(catalogue: Catalogue) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """nested_absmax and nested_quant_map of each weight that has them."""
    nested = {name: weight for name, weight in catalogue.weights4bit.items() if weight.state.nested is not None}
    entries = [entry for weight in nested.values() for entry in (weight.nested_absmax, weight.nested_map) if entry]
    small = _read_small(catalogue, entries)
    return dict(zip(nested, zip(small[::2], small[1::2], strict=True), strict=True))


def _codes_of(absmax: torch.Tensor) -> torch.Tensor:
    """Where the uint8 codes of ``absmax`` are read to: its own first quarter, so that they take no other memory."""
    return absmax.view(torch.uint8)[: absmax.numel()]


def _expand(nested: NestedAbsmax, absmax: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> None:
    """Turn the codes in ``absmax`` into its fp32 values."""
    absmax.numpy()[:] = expand_nested_absmax(nested, _codes_of(absmax), scales, table).numpy()


def load_clip_and_vae(catalogue: Catalogue, embedding_directory: Sequence[str]) -> tuple[comfy.sd.CLIP, comfy.sd.VAE]:
    """Load the text encoders and the VAE of an all-in-one file through ComfyUI's own code.

    ComfyUI splits them off a state dict; the transformer in it is meta tensors, for its detection only. T5 gets
    as many layers as the file has.

    Raises:
        CheckpointError: ComfyUI does not recognise them.
    """
    shapes = catalogue.logical_shapes
    state = {TRANSFORMER_PREFIX + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with safe_open(catalogue.path, framework="pt") as file:
        state.update({name: file.get_tensor(name) for name in (*catalogue.text_encoders, *catalogue.vae)})
    options = {"t5xxl_model_config": {"num_layers": catalogue.t5_layers}}
    parts = comfy.sd.load_state_dict_guess_config(
        state, embedding_directory=list(embedding_directory), output_model=False, te_model_options=options
    )
    clip, vae = (parts[1], parts[2]) if parts else (None, None)
    if clip is None or vae is None:
        raise CheckpointError(
            catalogue.path,
            f"ComfyUI does not recognise its {'text encoders' if clip is None else 'VAE'}. The file is damaged or was "
            "made by a tool that this node does not know.",
        )
    return clip, vae
