"""4-bit text encoders in memory: each file is read once, and streamed for all who use it. See `checkpoints`.

Who uses a file is who holds a CLIP that was made from it, or what `load_encoders` returns.
"""

import logging
from collections.abc import Sequence
from threading import Thread
from typing import Any
from weakref import WeakValueDictionary

import comfy.utils
import folder_paths
import torch
from torch import nn

from .checkpoints import as_far_as_there_is_ram, kept_in_file, why_read
from .memory import GIB
from .nf4_loader.checkpoint.encoder_file import EncoderFile
from .nf4_loader.checkpoint.errors import CheckpointError
from .nf4_loader.checkpoint.read_parts import read_parts
from .nf4_loader.linear.kernels import warm_up
from .nf4_loader.models.fill import parts_to_read
from .nf4_loader.models.mapped import InFile, bytes_of, parts_in_file
from .nf4_loader.models.streamed_encoders import BuiltEncoders, build_encoders
from .nf4_loader.models.transformers import materialise
from .offload.comfyui.block_lists import lists_of_encoders
from .offload.comfyui.clip import StreamedClip, StreamedEncoderPatcher, clip_with, stream_encoders
from .offload.comfyui.requires import require_comfyui
from .offload.comfyui.streaming import attach_streaming
from .offload.file_arena import map_blocks
from .offload.file_map import FileMapError
from .offload.plan import Residency

logger = logging.getLogger(__name__)

Key = tuple[tuple[tuple[str, int, int], ...], str, torch.device]
"""Name, time of change in ns and size in bytes of each file, the CLIP type, and the device."""

_clips: WeakValueDictionary[Key, StreamedClip] = WeakValueDictionary()


def load_encoders(files: Sequence[EncoderFile], clip_type: str) -> StreamedClip:
    """The text encoders of ``files`` as one CLIP, for `streamed_clip`. At least one of them is in 4 bits.

    Raises:
        CheckpointError: a file cannot be loaded, not for this type, or not into the RAM that is free.
        UnknownComfyUIError: this ComfyUI lacks what streaming needs.
    """
    require_comfyui()
    key = key_of_encoders(files, clip_type)
    clip = _clips.get(key)
    if clip is None:
        clip = _clips[key] = _read(files, build_encoders(files, clip_type, folder_paths.get_folder_paths("embeddings")))
    return clip


def streamed_clip(loaded: StreamedClip, residency: Residency, node_id: str | None) -> StreamedClip:
    """A CLIP with settings of its own.

    Raises:
        ValueError: the budget is too small.
    """
    clip = loaded.clone()
    clip.patcher.residency, clip.patcher.node_id = residency, node_id
    clip.patcher.require_budget()
    return clip


def key_of_encoders(files: Sequence[EncoderFile], clip_type: str) -> Key:
    """The identity of the files in their present state, and of the CLIP that is made of them."""
    paths = [path.resolve() for file in files for path in sorted({one.path for one in file.header.tensors.values()})]
    stats = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    return stats, clip_type, comfy.model_management.text_encoder_device()


def _read(files: Sequence[EncoderFile], built: BuiltEncoders) -> StreamedClip:
    model, theirs = built.clip.cond_stage_model, built.clip.patcher
    groups = lists_of_encoders(model)
    blocks = [block for group in groups.values() for block in group]
    in_file = _in_file(files, built, blocks, theirs.load_device)
    warming_up = Thread(target=warm_up, args=(theirs.load_device,))
    warming_up.start()
    try:
        attach_streaming(model, groups, map_blocks(blocks, in_file), patch_in_weights=True)
        materialise(model)
        _fill(model, built, in_file)
    except FileMapError as error:
        raise CheckpointError(error.path, error.problem) from error
    finally:
        warming_up.join()
    stream_encoders(model)
    model.nf4_catalogue, model.nf4_files = files[0], tuple(files)
    patcher = StreamedEncoderPatcher(model, theirs.load_device, theirs.offload_device)
    patcher.hook_mode, patcher.is_clip = theirs.hook_mode, True
    return clip_with(built.clip, patcher)


def _fill(model: Any, built: BuiltEncoders, in_file: InFile) -> None:
    in_ram = as_far_as_there_is_ram(model.streaming.streamer.file)
    to_read = sum(part.nbytes for tensor in built.weights.values() for part in tensor.parts) - bytes_of(in_file)
    progress = comfy.utils.ProgressBar(to_read + in_ram.bytes_to_bring_in)
    wanted = [
        part
        for linear, tensor in built.weights.items()
        for part in parts_to_read(linear, tensor, in_file.get(linear, ()))
    ]
    with in_ram.bringing_in() as brought_in, torch.inference_mode(False), torch.no_grad():
        read_parts(wanted, progress.update)
        brought_in.wait(progress.update)


def _in_file(
    files: Sequence[EncoderFile], built: BuiltEncoders, blocks: Sequence[nn.Module], device: torch.device
) -> InFile:
    """Decide which tensors stay in the files, and say so in the log.

    Raises:
        CheckpointError: the RAM does not hold what cannot stay in a file.
    """
    in_blocks = {module for block in blocks for module in block.modules()}
    packed = {linear: tensor for linear, tensor in built.weights.items() if linear in in_blocks}
    mappable: InFile = {linear: named for linear, tensor in packed.items() if (named := parts_in_file(linear, tensor))}
    why = why_read({entry.path for file in files for entry in file.header.tensors.values()}, device)
    needed = sum(tensor.ram_bytes for tensor in built.weights.values())
    needed += sum(tensor.nbytes for block in blocks for tensor in block.parameters() if not tensor.is_meta)
    in_file, needed = kept_in_file(files[0].path, mappable, needed, why)
    logger.info(
        "NF4: text encoder %s: %.2f GiB of its layers stay in the file, %.2f GiB are read into RAM%s",
        ", ".join(file.path.name for file in files),
        bytes_of(in_file) / GIB,
        needed / GIB,
        f" ({why})" if why and not in_file else "",
    )
    return in_file
