"""A ComfyUI MODEL that was loaded by another node, made a streamed one.

The streamed model has modules of its own, since hooks and records must not touch the MODEL that it came from: that one
may be sampled too. The values of both are in host memory once.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

from .contract import UnknownComfyUIError, require_comfyui
from .patcher import StreamedModelPatcher
from .streaming import Residency, attach_streaming

logger = logging.getLogger(__name__)

_KINDS = {"double_blocks": "double", "single_blocks": "single"}
"""What a `Residency` calls the blocks in these lists of Flux and its relatives; elsewhere it is the list's own name."""


_ROOT = "streamed_by_flux_nf4"
"""Where a dense model keeps its streamed one, so that other settings copy nothing again: both share their values."""


def stream_model(
    patcher: comfy.model_patcher.ModelPatcher, residency: Residency, node_id: str | None
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``patcher``, with its patches and options, that is streamed as ``residency`` says.

    Of a model that is streamed already only the settings change. In a ComfyUI that this cannot be done with it is
    ``patcher`` itself, and the log says why.

    Raises:
        ValueError: the model is not built of blocks, its tensors are of a kind that cannot be streamed, or the budget
            is too small.
    """
    try:
        require_comfyui()
    except UnknownComfyUIError as error:
        logger.error("Streaming: %s The model is not streamed: ComfyUI moves it as it moves others.", error)
        return patcher
    clone = patcher.clone() if isinstance(patcher, StreamedModelPatcher) else _adopt(patcher)
    clone.residency, clone.node_id = residency, node_id
    clone.require_budget()
    return clone


def _adopt(patcher: comfy.model_patcher.ModelPatcher) -> StreamedModelPatcher:
    is_dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    clone: Any = patcher.clone(disable_dynamic=True) if is_dynamic else patcher.clone()
    lists = _lists_of_blocks(clone.model)
    _refuse_what_is_no_plain_tensor(lists)
    root = clone.model.__dict__.get(_ROOT)
    if root is None:
        _unload(clone)
        root = clone.model.__dict__[_ROOT] = _make_root(clone, lists)
    clone.model, clone.parent = root.model, root
    # What another class's clone took over is right for this one, but for what it shares with patchers of that class.
    clone.__class__ = StreamedModelPatcher
    clone.backup, clone.object_patches_backup, clone.hook_backup = {}, {}, {}
    clone.retry_with_less_resident()
    return clone


def _make_root(patcher: Any, lists: Mapping[str, nn.ModuleList]) -> StreamedModelPatcher:
    """A streamed model of the same values as that of ``patcher``, which has these ``lists`` of blocks."""
    model = _with_own_modules(patcher.model)
    blocks = _lists_of_blocks(model)
    attach_streaming(model, {_KINDS.get(name, name): list(of) for name, of in blocks.items()})
    _share_host_memory(lists, blocks)
    return StreamedModelPatcher(model, patcher.load_device, patcher.offload_device)


def _lists_of_blocks(model: Any) -> dict[str, nn.ModuleList]:
    """The model's lists of blocks by name, in order of registration, which is that of use."""
    children = model.diffusion_model.named_children()
    lists = {name: child for name, child in children if isinstance(child, nn.ModuleList) and _nbytes(child)}
    if sum(map(_nbytes, lists.values())) < _nbytes(model.diffusion_model) / 2:
        raise ValueError(
            f"a {type(model).__name__} is not built of blocks one after the other, so its blocks cannot be streamed. "
            "Take this node out: ComfyUI moves such a model's parts by itself where VRAM is short."
        )
    return lists


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _refuse_what_is_no_plain_tensor(lists: Mapping[str, nn.Module]) -> None:
    for kind, blocks in lists.items():
        for name, tensor in (*blocks.named_parameters(), *blocks.named_buffers()):
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                raise ValueError(
                    f"{kind}.{name} is a {type(tensor).__name__}, which only the package that made it can move. "
                    "Stream a model in bf16, fp16 or plain fp8, or make a 4-bit file of this one (node: Quantise Flux "
                    "to NF4 and Save) and load that."
                )


def _unload(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Have ComfyUI take the model off the device and its patches out of the weights."""
    loaded = comfy.model_management.current_loaded_models
    for entry in [entry for entry in loaded if entry.model is not None and entry.model.is_clone(patcher)]:
        entry.model_unload()
        loaded.remove(entry)


def _with_own_modules(model: nn.Module) -> Any:
    """A copy of ``model`` that shares its memory."""
    # The configuration is nobody's own: it answers to any name, so that it cannot be copied.
    memo: dict[int, Any] = {id(model.current_patcher): None, id(model.model_config): model.model_config}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            memo[id(tensor)] = _alias(tensor)
        return copy.deepcopy(model, memo)


def _share_host_memory(original: Mapping[str, nn.Module], streamed: Mapping[str, nn.Module]) -> None:
    """Have the original's blocks use the records of the streamed ones: their values take memory once."""
    with torch.inference_mode(False), torch.no_grad():
        for name, blocks in original.items():
            for path, module in blocks.named_modules():
                twin = streamed[name].get_submodule(path)
                for mine, theirs in ((module._parameters, twin._parameters), (module._buffers, twin._buffers)):
                    mine.update({key: _alias(tensor) for key, tensor in theirs.items() if tensor is not None})


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    alias = tensor.detach()
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
