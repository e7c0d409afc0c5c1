"""The tensors of the text encoders of a CLIP, each to be saved in a file of its own: patches (LoRAs) are merged."""

from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import torch
from torch import nn

from ...families.encoders import detect_encoder, encoder_name, encoder_names
from ..checkpoint.catalogue import COMPANIONS
from ..checkpoint.errors import CheckpointError
from ..checkpoint.tensors import TransformerTensor
from .model_sources import key_patches_of, packed_in_files, require_values, source_of, stored_as_it_is
from .save import Source


def sources_of_clip(clip: comfy.sd.CLIP) -> dict[str, list[Source]]:
    """The tensors of each text encoder, by what ComfyUI calls it (``t5xxl``), under the names of its transformer.

    What is in 4 bits in a file that this package has loaded is copied from there if it has no patch. Layers that are
    not used (of Mistral 3) are left out.

    Raises:
        CheckpointError: it is a text encoder that cannot be loaded in 4 bits, or a tensor is in a form whose values are
            not known here.
    """
    parts = [
        name for name, module in clip.cond_stage_model.named_modules() if isinstance(module, comfy.sd1_clip.SDClipModel)
    ]
    tokenizer = {name: data for name, data in clip.tokenizer.state_dict().items() if isinstance(data, torch.Tensor)}
    found = {part: _sources_of(clip, part) for part in parts}
    if len(found) == 1:
        for sources in found.values():
            sources.extend(stored_as_it_is(name, tensor) for name, tensor in tokenizer.items())
    return found


def _sources_of(clip: comfy.sd.CLIP, part: str) -> list[Source]:
    model, prefix = clip.cond_stage_model, f"{part}.transformer."
    packed = packed_in_files(model)
    sources: list[Source] = []
    for key, (original, *patches) in key_patches_of(clip.patcher, prefix).items():
        if key.endswith(COMPANIONS):
            continue
        name = encoder_name(key.removeprefix(prefix))
        if name is None or not original[0].numel():  # what ComfyUI has made room for, and the file did not have
            continue
        require_values(model, key, original[0])
        is_layer = isinstance(model.get_submodule(key.rpartition(".")[0]), nn.Linear) and _is_in_a_list(name)
        stored = TransformerTensor((packed[name],)) if name in packed and not patches else None
        sources.append(source_of(name, key, original, patches, is_layer=is_layer, stored=stored))
    encoder = detect_encoder({source.name: source.shape for source in sources})
    if encoder is None:
        raise CheckpointError(
            Path(type(model).__name__), f"only {encoder_names()} can be saved in 4 bits: no node would load it."
        )
    return [source for source in sources if encoder.is_read(source.name)]


def _is_in_a_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))
