"""A ComfyUI MODEL that was loaded by another node, made a streamed one.

The streamed model has modules of its own, since hooks and records must not touch the MODEL that it came from: that one
may be sampled too. The values of both are in host memory once.

They are copied into records, even where ComfyUI has left them in a map of the file (packed weights of its quantised
formats, since 0.8). Its maps are private: to pin such pages, the system copies them. A shared map that may be written
to would write to the file. And of one that may only be read, as `file_map` makes it for our own models, any node that
changes a weight in place would end the process.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ... import families
from ...memory import GIB
from ..plan import Residency
from .block_lists import lists_of_blocks
from .node_names import OF_MODELS, Advice
from .patcher import StreamedModelPatcher
from .requires import UnknownComfyUIError, require_comfyui
from .streaming import attach_streaming

logger = logging.getLogger(__name__)

_ROOT = "streamed_by_flux_nf4"
"""The attribute of a dense model that holds its streamed model. Other settings use that again and copy nothing."""


@dataclass(frozen=True)
class Kind:
    """What differs between kinds of models.

    Attributes:
        patcher: The class of their patchers.
        lists_in: The blocks of a model by list; raises ValueError where it has none.
        attach: Makes a model with these blocks a streamed one; the last argument is called with the index of each block
            that has moved.
        advice: What errors name.
    """

    patcher: type[StreamedModelPatcher]
    lists_in: Callable[[Any], dict[str, list[nn.Module]]]
    attach: Callable[[Any, Mapping[str, list[nn.Module]], Callable[[int], None]], None]
    advice: Advice


def _attach(model: Any, lists: Mapping[str, list[nn.Module]], each: Callable[[int], None]) -> None:
    image_model = model.model_config.unet_config.get("image_model")
    attach_streaming(model, {families.kind_of(name, image_model): of for name, of in lists.items()}, each=each)


DIFFUSION_MODEL = Kind(StreamedModelPatcher, lists_of_blocks, _attach, OF_MODELS)


def stream_model(
    patcher: comfy.model_patcher.ModelPatcher,
    residency: Residency,
    node_id: str | None,
    kind: Kind = DIFFUSION_MODEL,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``patcher``, with its patches and options, that is streamed as ``residency`` says.

    Of a model that is streamed already only the settings change. In a ComfyUI that this cannot be done with it is
    ``patcher`` itself, and the log says why.

    Raises:
        ValueError: the model is not built of blocks, its tensors are of a kind that cannot be streamed, something is
            bound to its own modules, or the budget is too small.
    """
    try:
        require_comfyui()
    except UnknownComfyUIError as error:
        logger.error("Streaming: %s The model is not streamed: ComfyUI moves it as it moves others.", error)
        return patcher
    clone = patcher.clone() if isinstance(patcher, StreamedModelPatcher) else _adopt(patcher, kind)
    clone.residency, clone.node_id = residency, node_id
    clone.require_budget()
    return clone


def _adopt(patcher: comfy.model_patcher.ModelPatcher, kind: Kind) -> StreamedModelPatcher:
    _refuse_what_is_bound_to_modules(patcher, kind)
    root = patcher.model.__dict__.get(_ROOT)
    if root is None:
        kind.lists_in(patcher.model)  # refused before a file is read for it
        _unload(patcher)
    clone = _without_dynamic(patcher, root)
    if root is None:
        root = patcher.model.__dict__[_ROOT] = _make_root(clone, kind)
    clone.model, clone.parent = root.model, root
    # The clone has all that this class needs. Only what it shares with patchers of the class it had must be new.
    clone.__class__ = kind.patcher
    clone.backup, clone.object_patches_backup, clone.hook_backup = {}, {}, {}
    clone.backup_buffers, clone.pinned = {}, set()
    clone.take_own_model()
    clone.cached_patcher_init = _init_of_streamed(patcher, kind)
    clone.retry_with_less_resident()
    return clone


def _init_of_streamed(patcher: Any, kind: Kind) -> tuple[Any, tuple[Any, ...]] | None:
    """How ComfyUI loads the streamed model once more, for another GPU; None if it cannot load ``patcher`` again."""
    init = getattr(patcher, "cached_patcher_init", None)
    return (_stream_anew, (init, kind)) if init is not None else None


def _stream_anew(init: Sequence[Any], kind: Kind, **_: Any) -> StreamedModelPatcher:
    """Load the file of ``init`` (factory, arguments and perhaps an index) once more, and stream the model."""
    factory, arguments, *index = init
    # ComfyUIs that set ``init`` have factories with this argument. A model with dynamic VRAM cannot be adopted.
    loaded = factory(*arguments, disable_dynamic=True)
    return _adopt(loaded[index[0]] if index else loaded, kind)


def _without_dynamic(patcher: Any, root: StreamedModelPatcher | None) -> Any:
    """A clone that ComfyUI does not move by dynamic VRAM.

    If it moves ``patcher`` so, the clone's model is that of ``root``, or is read from the file again.
    """
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return patcher.clone()
    if root is not None:
        return patcher.clone(disable_dynamic=True, model_override=root.get_clone_model_override())
    if patcher.cached_patcher_init is None:
        raise ValueError(
            "the loader of this MODEL does not tell ComfyUI how to load it without dynamic VRAM, so its blocks cannot "
            "be streamed. Load the file with a loader of ComfyUI's own (Load Diffusion Model, Load Checkpoint)."
        )
    return patcher.clone(disable_dynamic=True)


def _make_root(patcher: Any, kind: Kind) -> StreamedModelPatcher:
    """A streamed model with the values of the model of ``patcher``."""
    lists = kind.lists_in(patcher.model)
    _refuse_what_is_no_plain_tensor(lists, kind.advice)
    _say_what_is_short(lists)
    model = _with_own_modules(patcher.model)
    blocks = kind.lists_in(model)
    originals, streamed = ([block for of in each.values() for block in of] for each in (lists, blocks))
    kind.attach(model, blocks, lambda index: _share_host_memory(originals[index], streamed[index]))
    return kind.patcher(model, patcher.load_device, patcher.offload_device)


def _refuse_what_is_bound_to_modules(patcher: Any, kind: Kind) -> None:
    """The streamed model has other modules: what was made for those of ``patcher`` would compute beside it."""
    bound = [
        *(["a LoRA by bypass, or another injection"] if any(patcher.injections.values()) else []),
        *(["torch.compile"] if any("torch.compile" in keyed for keyed in patcher.wrappers.values()) else []),
        *(
            f"{type(patch).__name__} in the place of {key}"
            for key, patch in patcher.object_patches.items()
            if key.split(".")[0] == "diffusion_model" and isinstance(getattr(patch, "__self__", patch), nn.Module)
        ),
    ]
    if bound:
        raise ValueError(
            f"the model has {bound[0]}, made for layers that are not streamed. Put the node {kind.advice.stream} "
            "before the one that does that, right after the loader."
        )


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _refuse_what_is_no_plain_tensor(lists: Mapping[str, Sequence[nn.Module]], advice: Advice) -> None:
    for kind, blocks in lists.items():
        every = nn.ModuleList(blocks)
        for name, tensor in (*every.named_parameters(), *every.named_buffers()):
            if type(tensor) not in (torch.Tensor, nn.Parameter) and not is_traceable_wrapper_subclass(tensor):
                raise ValueError(
                    f"{kind}.{name} is a {type(tensor).__name__}, which only the package that made it can move. "
                    "Stream a model in bf16, fp16, fp8 or one of ComfyUI's own formats, or make a 4-bit file of this "
                    f"one (node: {advice.quantise}) and load it."
                )


def _say_what_is_short(lists: Mapping[str, Sequence[nn.Module]]) -> None:
    needed = sum(_nbytes(block) for blocks in lists.values() for block in blocks)
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > free:
        logger.warning(
            "Streaming: the blocks take %.1f GiB of RAM and %.1f GiB are free. Where their weights are still in the "
            "file, the system will swap, which is slow: close other programs, or load a smaller model.",
            needed / GIB,
            free / GIB,
        )


def _unload(patcher: Any) -> None:
    """Have ComfyUI take the model off the device, restore its weights without patches, and unpin them."""
    loaded = comfy.model_management.current_loaded_models
    for entry in [entry for entry in loaded if entry.model is not None and entry.model.is_clone(patcher)]:
        entry.model_unload()
        loaded.remove(entry)
    getattr(patcher, "unpin_all_weights", lambda: None)()


def _with_own_modules(model: nn.Module) -> Any:
    """A copy of ``model`` that shares its memory."""
    # The configuration is shared: deepcopy fails on it, because it has an answer to any attribute.
    memo: dict[int, Any] = {id(getattr(model, "current_patcher", None)): None}
    if hasattr(model, "model_config"):
        memo[id(model.model_config)] = model.model_config
    with torch.inference_mode(False), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            memo[id(tensor)] = _alias(tensor, tensor)
        return copy.deepcopy(model, memo)


def _share_host_memory(original: nn.Module, streamed: nn.Module) -> None:
    """Have the original block use the record of the streamed one: their values take memory once."""
    with torch.inference_mode(False), torch.no_grad():
        for path, module in original.named_modules():
            twin = streamed.get_submodule(path)
            for mine, theirs in ((module._parameters, twin._parameters), (module._buffers, twin._buffers)):
                pairs = [(key, old, theirs[key]) for key, old in mine.items()]
                mine.update({key: _alias(new, old) for key, old, new in pairs if old is not None and new is not None})


def _alias(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same memory, to be used in the place of ``like``."""
    if not is_traceable_wrapper_subclass(tensor):
        alias = tensor.detach()
        return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names}
    # When ComfyUI moves it, it detaches it. In inference mode torch allows that only for tensors made in that mode.
    with torch.inference_mode(like.is_inference()):
        alias = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, None)
    alias._is_param = isinstance(tensor, nn.Parameter)
    return alias
