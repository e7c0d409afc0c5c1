"""Checkpoints in memory: each file is read once, shared by all who use it, and gone with the last of them.

Who uses a file is who holds a MODEL, CLIP or VAE made from it, or what `load_all_in_one` and `load_transformer` return.
"""

import gc
import logging
from dataclasses import dataclass
from threading import Thread
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import psutil
import torch

from .memory import GIB
from .nf4_loader.checkpoint.catalogue import Catalogue
from .nf4_loader.checkpoint.errors import CheckpointError
from .nf4_loader.linear.kernels import warm_up
from .nf4_loader.models.fill import fill
from .nf4_loader.models.mapped import Mapped, map_packed
from .nf4_loader.models.transformers import block_groups, build_flux, load_clip_and_vae, materialise
from .offload.comfyui.encoders import leave_unpinned, leave_without_copies
from .offload.comfyui.patcher import StreamedModelPatcher
from .offload.comfyui.requires import require_comfyui
from .offload.comfyui.streaming import attach_streaming
from .offload.host_memory import give_back_host_memory
from .offload.plan import Residency

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")

Key = frozenset[tuple[str, int, int]]
"""Name, time of change in ns and size in bytes of each file that a checkpoint has."""

_models: WeakValueDictionary[Key, StreamedModelPatcher] = WeakValueDictionary()
_clips: WeakValueDictionary[Key, comfy.sd.CLIP] = WeakValueDictionary()
_vaes: WeakValueDictionary[Key, comfy.sd.VAE] = WeakValueDictionary()


@dataclass(frozen=True)
class AllInOne:
    """What one file holds."""

    model: StreamedModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE


def load_all_in_one(catalogue: Catalogue) -> AllInOne:
    """The transformer, ready to be streamed, the text encoders and the VAE of a file.

    Raises:
        CheckpointError: the file cannot be loaded, or not into the RAM that is free.
        UnknownComfyUIError: this ComfyUI lacks what streaming needs.
    """
    require_comfyui()
    key = key_of(catalogue)
    model, clip, vae = _models.get(key), _clips.get(key), _vaes.get(key)
    if clip is None or vae is None:
        gc.collect()  # an earlier model that only cycles keep alive must not count against this one
        new = build_flux(catalogue) if model is None else None
        mapped = _mapped_where_ram_is_short(new, catalogue, with_others=True)
        clip, vae = load_clip_and_vae(catalogue, folder_paths.get_folder_paths("embeddings"))
        leave_without_copies(clip.patcher)
        leave_without_copies(vae.patcher)
        leave_unpinned(clip.patcher)
        model = _read(new, catalogue, mapped) if new is not None else model
    assert clip is not None
    assert vae is not None
    model = load_transformer(catalogue) if model is None else model
    _models[key], _clips[key], _vaes[key] = model, clip, vae
    return AllInOne(model, clip, vae)


def load_transformer(catalogue: Catalogue) -> StreamedModelPatcher:
    """The transformer of a checkpoint, for `streamed`.

    Raises:
        CheckpointError: it cannot be loaded, or not into the RAM that is free.
        UnknownComfyUIError: this ComfyUI lacks what streaming needs.
    """
    require_comfyui()
    key = key_of(catalogue)
    model = _models.get(key)
    if model is None:
        gc.collect()
        new = build_flux(catalogue)
        mapped = _mapped_where_ram_is_short(new, catalogue, with_others=False)
        model = _models[key] = _read(new, catalogue, mapped)
    return model


def streamed(loaded: StreamedModelPatcher, residency: Residency, node_id: str | None) -> StreamedModelPatcher:
    """A MODEL with settings of its own.

    It is a clone: when it goes, ComfyUI takes ``loaded`` for what it has on the device, and can still unload that.

    Raises:
        ValueError: the budget is too small.
    """
    patcher = loaded.clone()
    patcher.residency, patcher.node_id = residency, node_id
    patcher.require_budget()
    return patcher


def key_of(catalogue: Catalogue) -> Key:
    """What tells its files, as they are now, from others."""
    paths = {entry.path.resolve() for entry in catalogue.header.tensors.values()}
    return frozenset((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)


def _read(model: comfy.model_base.BaseModel, catalogue: Catalogue, mapped: Mapped) -> StreamedModelPatcher:
    attach_streaming(model, block_groups(model), mapped)
    materialise(model.diffusion_model)
    left = _bytes_of(mapped)
    progress = comfy.utils.ProgressBar(catalogue.transformer_bytes - left)
    in_ram = (catalogue.transformer_ram - left) / GIB
    logger.info("NF4: reading the transformer of %s, %.2f GiB", catalogue.path.name, in_ram)
    device = comfy.model_management.get_torch_device()
    warming_up = Thread(target=warm_up, args=(device,))
    warming_up.start()
    try:
        fill(model, catalogue, progress.update, mapped)
    finally:
        warming_up.join()
    offload_device = comfy.model_management.unet_offload_device()
    patcher = StreamedModelPatcher(model, load_device=device, offload_device=offload_device)
    patcher.cached_patcher_init = _read_again, (catalogue,)
    return patcher


def _read_again(catalogue: Catalogue, **_: Any) -> StreamedModelPatcher:
    """The same model in memory of its own: ComfyUI calls this for each further GPU that it shares a sampling with."""
    model = build_flux(catalogue)
    return _read(model, catalogue, _mapped_where_ram_is_short(model, catalogue, with_others=False))


def _mapped_where_ram_is_short(
    model: comfy.model_base.BaseModel | None, catalogue: Catalogue, *, with_others: bool
) -> Mapped:
    """What of ``model`` (None: it is in RAM) stays in the file: nothing where the free RAM holds it and the others.

    Raises:
        CheckpointError: the RAM holds not even the rest.
    """
    others = [entry for part in (catalogue.text_encoders, catalogue.vae) for entry in part.values()]
    needed = catalogue.transformer_ram if model is not None else 0
    needed += sum(entry.nbytes for entry in others) if with_others else 0
    free = comfy.model_management.get_free_memory(_CPU)
    if needed > free:
        give_back_host_memory()
        free = comfy.model_management.get_free_memory(_CPU)
    if needed <= free:
        return {}
    mapped = map_packed(model, catalogue) if model is not None else {}
    rest = needed - _bytes_of(mapped)
    if rest > free + psutil.swap_memory().free:
        raise CheckpointError(
            catalogue.path,
            f"loading it takes {rest / GIB:.2f} GiB of RAM; {free / GIB:.2f} GiB are free, and swap does not make up "
            "for it. Close other programs, free ComfyUI's models (Manager: Unload Models), or enlarge the swap or page "
            "file.",
        )
    if mapped:
        logger.warning(
            "NF4: %s takes %.2f GiB of RAM and %.2f GiB are free, so %.2f GiB of packed weights stay in the file and "
            "are read from there in every step. That is as slow as the disk where the system has no RAM left to keep "
            "them. Close other programs, or keep more blocks in VRAM.",
            catalogue.path.name,
            needed / GIB,
            free / GIB,
            _bytes_of(mapped) / GIB,
        )
    return mapped


def _bytes_of(mapped: Mapped) -> int:
    return sum(tensor.nbytes for named in mapped.values() for tensor in named.values())
