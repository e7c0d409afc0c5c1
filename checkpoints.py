"""Checkpoints in memory: each file is read once, shared by all who use it, and gone with the last of them.

A file is in use as long as somebody holds a MODEL, CLIP or VAE made from it, or a result of `load_all_in_one` or
`load_transformer`.
"""

import gc
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from .nf4_loader.checkpoint.header import TensorEntry
from .nf4_loader.checkpoint.tensors import Weight4bit
from .nf4_loader.linear.kernels import warm_up
from .nf4_loader.models.fill import There, fill
from .nf4_loader.models.mapped import InFile, bytes_of, tensors_in_file
from .nf4_loader.models.transformers import block_groups, build_transformer, load_clip_and_vae, materialise
from .offload import pinning_ahead
from .offload.comfyui.encoders import leave_unpinned, leave_without_copies
from .offload.comfyui.modulation import modulation_in
from .offload.comfyui.patcher import StreamedModelPatcher
from .offload.comfyui.pins import pin_limit
from .offload.comfyui.requires import require_comfyui
from .offload.comfyui.streaming import Streaming, attach_streaming
from .offload.file_arena import FileArena, map_blocks, why_not_pinned
from .offload.file_map import FileMapError
from .offload.host_memory import give_back_host_memory
from .offload.pinning import pinned_by_all
from .offload.plan import Residency
from .offload.ram import free_ram_bytes

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")

Key = frozenset[tuple[str, int, int]]
"""Name, time of change in ns and size in bytes of each file that a checkpoint has."""

Place = tuple[Key, torch.device]
"""A checkpoint, and the device that ComfyUI computes on. Some packages change the device between loaders."""

_models: WeakValueDictionary[Place, StreamedModelPatcher] = WeakValueDictionary()
_clips: WeakValueDictionary[Place, comfy.sd.CLIP] = WeakValueDictionary()
_vaes: WeakValueDictionary[Place, comfy.sd.VAE] = WeakValueDictionary()


@dataclass(frozen=True)
class AllInOne:
    """The parts of an all-in-one file."""

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
    place = _place_of(catalogue)
    clip, vae = _clips.get(place), _vaes.get(place)
    if clip is not None and vae is not None:
        return AllInOne(load_transformer(catalogue), clip, vae)
    model = _models.get(place)
    others_bytes = sum(entry.nbytes for part in (catalogue.text_encoders, catalogue.vae) for entry in part.values())
    if model is None:
        model = _models[place] = _load(catalogue, place, others_bytes)
    else:
        require_ram(catalogue.path, others_bytes, _make_room(others_bytes))
    clip, vae = load_clip_and_vae(catalogue, folder_paths.get_folder_paths("embeddings"))
    leave_without_copies(clip.patcher)
    leave_without_copies(vae.patcher)
    leave_unpinned(clip.patcher)
    _clips[place], _vaes[place] = clip, vae
    return AllInOne(model, clip, vae)


def load_transformer(catalogue: Catalogue) -> StreamedModelPatcher:
    """The transformer of a checkpoint, for `streamed`.

    Raises:
        CheckpointError: it cannot be loaded, or not into the RAM that is free.
        UnknownComfyUIError: this ComfyUI lacks what streaming needs.
    """
    require_comfyui()
    place = _place_of(catalogue)
    model = _models.get(place)
    if model is None:
        model = _models[place] = _load(catalogue, place)
    return model


def streamed(loaded: StreamedModelPatcher, residency: Residency, node_id: str | None) -> StreamedModelPatcher:
    """A MODEL with settings of its own, and a model object of its own, which nodes may put state on.

    It is a clone of ``loaded``. When the clone goes, ComfyUI still knows ``loaded`` as the model on the device, and can
    unload it.

    Raises:
        ValueError: the budget is too small.
    """
    patcher = loaded.clone()
    patcher.take_own_model()
    patcher.residency, patcher.node_id = residency, node_id
    patcher.require_budget()
    return patcher


def key_of(catalogue: Catalogue) -> Key:
    """The identity of its files in their present state."""
    paths = {path.resolve() for path in {entry.path for entry in catalogue.header.tensors.values()}}
    return frozenset((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)


def _place_of(catalogue: Catalogue) -> Place:
    return key_of(catalogue), comfy.model_management.get_torch_device()


def _load(catalogue: Catalogue, place: Place, others_bytes: int = 0) -> StreamedModelPatcher:
    """The transformer, read into memory that leaves ``others_bytes`` of RAM for the other parts of the file."""
    model = build_transformer(catalogue)
    return _read(model, catalogue, _source_for(model, catalogue, place, others_bytes))


@dataclass(frozen=True)
class _Source:
    """Where the blocks of a model get their bytes.

    Attributes:
        in_file: The tensors that stay in the file.
        needed_bytes: RAM that what has to be read will take, the other parts of the file among it.
        twin: An equal model on another device, whose host memory has the other tensors. None: they are read.
    """

    in_file: InFile
    needed_bytes: int
    twin: Streaming | None = None


def _read(model: comfy.model_base.BaseModel, catalogue: Catalogue, source: _Source) -> StreamedModelPatcher:
    groups = block_groups(model)
    blocks = [block for group in groups.values() for block in group]
    device = comfy.model_management.get_torch_device()
    warming_up = Thread(target=warm_up, args=(device,))
    warming_up.start()
    try:
        parts = [*modulation_in(model, blocks), *blocks]
        mapped = map_blocks(parts, source.in_file)
        file = _file_of(parts, mapped)
        _pin_ahead(file, device, source.needed_bytes)
        in_ram = as_far_as_there_is_ram(file)
        with in_ram.bringing_in() as brought_in:  # while the rest of the model is made and read
            attach_streaming(model, groups, mapped, twin=source.twin)
            materialise(model.diffusion_model)
            to_read = catalogue.transformer_bytes - bytes_of(source.in_file)
            progress = comfy.utils.ProgressBar(to_read + in_ram.bytes_to_bring_in)
            fill(model, catalogue, progress.update, source.in_file if source.twin is None else _all_tensors(blocks))
            brought_in.wait(progress.update)
    except BaseException as error:
        pinning_ahead.stop()
        if isinstance(error, FileMapError):
            raise CheckpointError(error.path, error.problem) from error
        raise
    finally:
        warming_up.join()
    offload_device = comfy.model_management.unet_offload_device()
    patcher = StreamedModelPatcher(model, load_device=device, offload_device=offload_device)
    patcher.cached_patcher_init = _read_again, (catalogue,)
    return patcher


def _file_of(
    parts: Sequence[torch.nn.Module], mapped: Mapping[torch.nn.Module, Mapping[str, torch.Tensor]]
) -> FileArena:
    """All that is ``mapped``, in the order of ``parts``, in which the first forward needs them."""
    return FileArena(
        [[tensor for module in part.modules() for tensor in mapped.get(module, {}).values()] for part in parts]
    )


def as_far_as_there_is_ram(file: FileArena) -> FileArena:
    """``file``, to be brought in; an empty one where it does not fit into RAM, and is read as it is needed."""
    return file if file.bytes_to_bring_in <= free_ram() else FileArena(())


def _pin_ahead(file: FileArena, device: torch.device, needed_bytes: int) -> None:
    """Begin to pin ``file``, which takes about as long as everything else before the first forward.

    ``needed_bytes`` of RAM are left for the rest.
    """
    limit_bytes, _ = pin_limit(file.nbytes - file.pinned_bytes)
    file.pin_ahead(limit_bytes, device, needed_bytes)


def _read_again(catalogue: Catalogue, **_: Any) -> StreamedModelPatcher:
    """The same model once more: ComfyUI calls this for each further GPU that it shares a sampling with."""
    return _load(catalogue, _place_of(catalogue))


def _all_tensors(blocks: Sequence[torch.nn.Module]) -> There:
    modules = (module for block in blocks for module in block.modules())
    return {module: {*module._parameters, *module._buffers} for module in modules}


def _source_for(model: comfy.model_base.BaseModel, catalogue: Catalogue, place: Place, others_bytes: int) -> _Source:
    """Decide where the blocks of ``model`` get their bytes, and say so in the log.

    Raises:
        CheckpointError: the RAM does not hold the tensors that have to be read and ``others_bytes`` beside them.
    """
    twin = _twin_of(model, place)
    if twin is not None:
        require_ram(catalogue.path, others_bytes, _make_room(others_bytes))
        logger.info("NF4: %s is in use on another device: both share its host memory", catalogue.path.name)
        return _Source(tensors_in_file(model, catalogue) if twin.streamer.file.nbytes else {}, others_bytes, twin)
    reason = why_read((entry.path for part in catalogue.parts for entry in _entries(part)), place[1])
    in_all = catalogue.transformer_ram + others_bytes
    in_file, needed = kept_in_file(catalogue.path, tensors_in_file(model, catalogue), in_all, reason)
    _say_where(catalogue, place[1], in_file, reason)
    return _Source(in_file, needed)


def kept_in_file(path: Path, in_file: InFile, needed: int, why_read: str) -> tuple[InFile, int]:
    """Decide which tensors stay in the file ``path``, and make room in RAM for the others.

    Args:
        path: Of the file, for messages.
        in_file: Those that can stay there.
        needed: Bytes of RAM that it takes to read all tensors, these among them.
        why_read: Why these have to be read, too, if RAM is not short; "" if they need not be.

    Returns:
        Those that stay, and the bytes of RAM that the others take.

    Raises:
        CheckpointError: the RAM does not hold the others.
    """
    rest = needed - bytes_of(in_file)
    free = _make_room(needed if why_read else rest)
    if why_read and needed <= free:
        return {}, needed
    if why_read and in_file:
        _say_that_ram_is_short(path, needed, free, bytes_of(in_file))
    require_ram(path, rest, free)
    return in_file, rest


def _make_room(needed: int) -> int:
    """Free the RAM that no model in use needs, as far as ``needed`` bytes ask for it. Returns the bytes free then."""
    free = free_ram()
    if needed > free or pinned_by_all():
        gc.collect()  # free earlier models that only reference cycles keep alive
        free = free_ram()
    if needed > free:
        give_back_host_memory()
        free = free_ram()
    return free


def require_ram(path: Path, needed: int, free: int) -> None:
    """Raises `CheckpointError` if ``needed`` bytes for ``path`` do not fit into the ``free`` ones and the free swap."""
    if needed > free + psutil.swap_memory().free:
        raise CheckpointError(
            path,
            f"loading it takes {needed / GIB:.2f} GiB of RAM; {free / GIB:.2f} GiB are free, and swap does not make up "
            "for it. Close other programs, free ComfyUI's models (Manager: Unload Models), or enlarge the swap or page "
            "file.",
        )


def _twin_of(model: comfy.model_base.BaseModel, place: Place) -> Streaming | None:
    """The streaming of the same checkpoint in the same dtype on another device, whose arenas both can use."""
    same_files = (other for (key, _), other in list(_models.items()) if key == place[0])
    twins = (other.model for other in same_files if other.model.get_dtype() == model.get_dtype())
    return next((twin.streaming for twin in twins), None)


def why_read(paths: Iterable[Path], device: torch.device) -> str:
    """Why weights have to be read, as a clause; "" if ``device`` can copy them from the memory of these files."""
    limit, shortfall = pin_limit(0)
    if not limit:
        return shortfall.reason
    paths = dict.fromkeys(paths)
    return next(filter(None, (why_not_pinned(path, device) for path in paths)), "")


def _entries(part: Weight4bit | TensorEntry) -> Sequence[TensorEntry]:
    return part.entries if isinstance(part, Weight4bit) else (part,)


def _say_where(catalogue: Catalogue, device: torch.device, in_file: InFile, reason: str) -> None:
    in_ram = (catalogue.transformer_ram - bytes_of(in_file)) / GIB
    name = catalogue.path.name
    if in_file and not reason:
        logger.info(
            "NF4: %.2f GiB of the transformer of %s stay in the file, from whose memory %s copies them; reading %.2f "
            "GiB",
            bytes_of(in_file) / GIB,
            name,
            device,
            in_ram,
        )
    else:
        logger.info("NF4: reading the transformer of %s, %.2f GiB, into RAM: %s", name, in_ram, reason)


def _say_that_ram_is_short(path: Path, needed: int, free: int, in_file: int) -> None:
    logger.warning(
        "NF4: %s takes %.2f GiB of RAM and %.2f GiB are free, so %.2f GiB of packed weights stay in the file and "
        "are read from there each time they are needed. That is as slow as the disk where the system has no RAM left "
        "to keep them. Close other programs, or keep more of the model in VRAM.",
        path.name,
        needed / GIB,
        free / GIB,
        in_file / GIB,
    )


def free_ram() -> int:
    """Bytes of RAM that ComfyUI and the system count as free."""
    return min(int(comfy.model_management.get_free_memory(_CPU)), free_ram_bytes())
