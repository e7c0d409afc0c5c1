"""The tensors of what ComfyUI has loaded, to be saved: patches (LoRAs) are merged, the models stay as they are."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from ... import families
from ..checkpoint.catalogue import COMPANIONS, Catalogue
from ..checkpoint.errors import CheckpointError
from ..checkpoint.header import TensorEntry
from ..checkpoint.read_parts import TORCH_DTYPES
from ..checkpoint.tensors import TransformerTensor, Weight4bit
from .save import Source
from .sources import dequantised_gguf, sources_of_catalogue, sources_of_entries

_TRANSFORMER = "diffusion_model."


def sources_of_model(patcher: comfy.model_patcher.ModelPatcher) -> list[Source]:
    """The tensors of a MODEL of a known family, with its patches. If this package has loaded the model from a file,
    tensors without a patch are copied from the file, byte by byte.

    Raises:
        CheckpointError: the model is of no known family, or a tensor is in a form whose values are not known here.
    """
    family = families.family_of_model(patcher.model.model_config.unet_config.get("image_model"))
    if family is None:
        raise CheckpointError(
            Path(type(patcher.model).__name__), f"only models of {families.names()} can be saved in 4 bits."
        )
    catalogue: Catalogue | None = getattr(patcher.model, "nf4_catalogue", None)
    in_file = {source.name: source for source in sources_of_catalogue(catalogue)} if catalogue else {}
    sources: dict[str, Source] = dict(in_file)
    for key, (original, *patches) in key_patches_of(patcher, _TRANSFORMER).items():
        name = family.place(family.native, key.removeprefix(_TRANSFORMER)).name
        if name.endswith(COMPANIONS) or (name in in_file and not patches):
            continue
        require_values(patcher.model, key, original[0])
        source = source_of(name, key, original, patches)
        sources[name] = replace(source, is_embedding=name in family.embeddings)
    return list(sources.values())


def sources_of_encoders(clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> list[Source]:
    """The tensors of CLIP and VAE, by their names in an all-in-one file. If this package has loaded them from a file,
    tensors without a patch are copied from the file; of text encoders that it streams, those in 4 bits. Weights that
    have a scale are saved as dense ones.

    Raises:
        CheckpointError: a tensor is in a form whose values are not known here.
    """
    entries: Mapping[str, TensorEntry] = getattr(clip.cond_stage_model, "nf4_entries", {})
    if clip.patcher.patches and any(name.endswith(COMPANIONS) for name in entries):
        entries = {}  # a weight that is patched has its scale in it
    encoders = {source.name: source for source in sources_of_entries(entries)}
    in_4_bits = packed_in_files(clip.cond_stage_model)
    found = key_patches_of(clip.patcher, "")
    for key, (original, *patches) in found.items():
        if key.endswith(COMPANIONS) or (entries and not patches):
            continue
        require_values(clip.cond_stage_model, key, original[0])
        name = f"text_encoders.{key}"
        for packed in [other for other in encoders if other.startswith(f"{name}.")]:
            del encoders[packed]  # absmax and the like, if it was in 4 bits: merged, it is dense
        stored = in_4_bits.get(key.partition(".transformer.")[2])
        if stored is not None and not patches:
            copied = {name + entry.name.removeprefix(stored.name): entry for entry in stored.entries}
            encoders |= {source.name: source for source in sources_of_entries(copied)}
            continue
        is_scaled = f"{key.removesuffix('weight')}scale_weight" in found
        as_it_is = _is_fp8(original[0]) and not is_scaled and not patches
        encoders[name] = (
            stored_as_it_is(name, original[0]) if as_it_is else source_of(name, key, original, patches, is_layer=False)
        )
    sources = list(encoders.values())
    vae_entries: Mapping[str, TensorEntry] = getattr(vae.first_stage_model, "nf4_entries", {})
    if vae_entries:
        return sources + sources_of_entries(vae_entries)
    return sources + [stored_as_it_is(f"vae.{name}", tensor) for name, tensor in vae.get_sd().items()]


def packed_in_files(model: torch.nn.Module) -> dict[str, Weight4bit]:
    """The 4-bit weights in the files of ``model``, if it is text encoders that this package streams, by their names in
    the transformer of their text encoder. No two text encoders that go together have the same names."""
    return {name: weight for file in getattr(model, "nf4_files", ()) for name, weight in file.packed.items()}


_Original = tuple[torch.Tensor, Callable[..., torch.Tensor]]
"""A weight without its patches, and the function by which ComfyUI converts it."""


def source_of(
    name: str,
    key: str,
    original: _Original,
    patches: Sequence[Any],
    *,
    is_layer: bool = True,
    stored: TransformerTensor | None = None,
) -> Source:
    """The source of the tensor ``key`` of a model, to be saved as ``name`` with its patches; see `Source`."""
    weight, convert = original
    read = functools.partial(_merged, key, weight, convert, patches)
    return Source(name, _shape(weight), read, stored, is_layer)


def stored_as_it_is(name: str, tensor: torch.Tensor) -> Source:
    """The source of a tensor that is saved as it is, in any dtype."""
    return Source(name, tuple(tensor.shape), functools.partial(_as_it_is, tensor), is_layer=False)


def _as_it_is(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device)


def key_patches_of(patcher: comfy.model_patcher.ModelPatcher, prefix: str) -> dict[str, list[Any]]:
    """For each tensor of the model: the pair `_Original`, and its patches.

    ComfyUI's own method is used, because it knows where unpatched weights are kept (``backup`` and ``hook_backup``). It
    gets only tensors that exist: ComfyUI-GGUF also lists one that stands for the memory of dequantising a layer.
    """
    every = patcher.model_state_dict
    listed = {name: tensor for name, tensor in every(prefix).items() if _is_there(patcher.model, name)}
    patcher.model_state_dict = lambda *_: listed
    try:
        found: dict[str, list[Any]] = patcher.get_key_patches(prefix)
        return found
    finally:
        del patcher.model_state_dict


def _is_there(model: torch.nn.Module, key: str) -> bool:
    try:
        comfy.utils.get_attr(model, key)
    except AttributeError:
        return False
    return True


def require_values(model: torch.nn.Module, key: str, weight: torch.Tensor) -> None:
    """Check that the values of ``weight``, which is ``key`` of ``model``, are known here.

    Raises:
        CheckpointError: they are not; it says what it is.
    """
    if key.endswith(".pre_quant_scale"):
        found = "its layer multiplies its input by these numbers, which a 4-bit layer does not"
    elif not (_gguf_type(weight) is not None or _is_quantised(weight) or weight.dtype in TORCH_DTYPES.values()):
        found = f"a {type(weight).__name__} of {weight.dtype}, whose values only the loader's package knows"
    else:
        return
    raise CheckpointError(
        Path(type(model).__name__),
        f"{key}: {found}. Load the model from another file (bf16, fp8, GGUF, or NF4 with a node of this package), and "
        "save that.",
    )


def _shape(weight: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(weight, "tensor_shape", weight.shape))


def _merged(
    key: str, weight: torch.Tensor, convert: Callable[..., torch.Tensor], patches: Sequence[Any], device: torch.device
) -> torch.Tensor:
    values = _dense(weight, device)
    if _is_fp8(values):
        values = convert(values.float(), inplace=True).bfloat16()
    if not patches:
        return values
    merged = comfy.lora.calculate_weight(patches, values.to(torch.float32, copy=True), key)
    return merged.to(values.dtype)


def _is_fp8(weight: torch.Tensor) -> bool:
    """Whether its values, perhaps before scaling, are in fp8."""
    return not _is_quantised(weight) and weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def _is_quantised(weight: torch.Tensor) -> bool:
    """Whether it is in a format of ComfyUI's own, with its scales. Older ComfyUIs have no class for that."""
    return type(weight).__name__ == "QuantizedTensor"


def _gguf_type(weight: torch.Tensor) -> Any:
    return getattr(weight, "tensor_type", None)


def _dense(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The dense values of a weight of ComfyUI's, this package's or ComfyUI-GGUF's; bf16 if it is quantised."""
    kind = _gguf_type(weight)
    if kind is not None:
        raw = weight.detach().cpu().as_subclass(torch.Tensor)
        return dequantised_gguf(raw.numpy(), kind, _shape(weight)).to(device)
    if _is_quantised(weight):
        weight = weight.dequantize().bfloat16()
    return weight.detach().to(device).as_subclass(torch.Tensor)
