"""A checkpoint in one file, in shards, or in a folder of diffusers: where its files are, and one header for all.

Formats: ``model-00001-of-00003.safetensors`` beside ``model.safetensors.index.json``, whose ``weight_map`` gives each
tensor's file; a pipeline's folder has the transformer's files in its folder ``transformer``.
https://huggingface.co/docs/huggingface_hub/package_reference/serialization
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .errors import CheckpointError, reason
from .header import Header, TensorEntry, object_without_duplicates, read_header

_INDEX = re.compile(r".+\.safetensors\.index(\.\w+)?\.json")
"""``model.safetensors.index.json``; of a variant in diffusers, ``model.safetensors.index.fp16.json``."""

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_MAX_INDEX_BYTES = 8_000_000
_AGAIN = "Download all files of this folder again, from one source."


def read_checkpoint_header(path: Path) -> Header:
    """Read and check the header of a checkpoint, whichever of these names it; no tensor is read.

    Args:
        path: A file, any one of its shards, their index, or a folder of diffusers (a pipeline or its transformer).

    Raises:
        CheckpointError: a file is missing, is not safetensors or is not consistent, or the files disagree.
    """
    found = _main_file(path) if path.is_dir() else path
    weight_map, files = _shards_of(found)
    headers = [read_header(file) for file in files]
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if name in tensors:
                other = tensors[name].path.name
                raise CheckpointError(header.path, f"{name}: it is in this shard and in {other}. {_AGAIN}")
            tensors[name] = entry
    _check_against_index(found, weight_map, tensors)
    return replace(headers[0], path=path, tensors=tensors)


def _main_file(folder: Path) -> Path:
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(folder, f"the folder cannot be read ({reason(error)}).") from error
    indices = [name for name in names if _INDEX.fullmatch(name)]
    files = indices or [name for name in names if name.endswith(".safetensors")]
    models = {match.group("stem", "count") if (match := _SHARD.fullmatch(name)) else name for name in files}
    if len(models) != 1:
        found = ", ".join(files[:4]) if files else "no .safetensors file"
        raise CheckpointError(
            folder, f"the folder should hold one model, as diffusers saves it; found {found}. Pick the model's file."
        )
    return folder / files[0]


def _shards_of(path: Path) -> tuple[Mapping[str, str], Sequence[Path]]:
    """The index's weight map, where there is an index, and the files of the checkpoint."""
    shard = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{shard['stem']}.safetensors.index.json") if shard else path
    if not _INDEX.fullmatch(index.name):
        return {}, [path]
    weight_map = _read_weight_map(index) if index.exists() or not shard else {}
    if shard and path.name not in weight_map.values():  # there is no index, or it is of another model in this folder
        count = int(shard["count"])
        names = [f"{shard['stem']}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        return {}, _present(path, names)
    return weight_map, _present(index, sorted(set(weight_map.values())))


def _present(owner: Path, names: Sequence[str]) -> list[Path]:
    files = [owner.with_name(name) for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            owner,
            f"{len(missing)} of the model's {len(files)} files are missing: {', '.join(missing[:4])}. Download them "
            "into the same folder.",
        )
    targets: dict[Path, str] = {}
    for file in files:
        other = targets.setdefault(file.resolve(), file.name)
        if other != file.name:
            raise CheckpointError(owner, f"{other} and {file.name} are one and the same file. {_AGAIN}")
    return files


def _read_weight_map(index: Path) -> Mapping[str, str]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {_MAX_INDEX_BYTES:,} bytes")
        document = json.loads(index.read_text("utf-8"), object_pairs_hook=object_without_duplicates)
    except OSError as error:
        raise CheckpointError(index, f"the index cannot be read ({reason(error)}). {_AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(index, f"the index is not readable as JSON ({error}). {_AGAIN}") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise CheckpointError(index, f"the index has no 'weight_map' from tensors to files. {_AGAIN}")
    for name in set(weight_map.values()):
        if not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise CheckpointError(
                index, f"the index names {name[:120]!r}, which is no .safetensors file of its own folder. {_AGAIN}"
            )
    return weight_map


def _check_against_index(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        entry = tensors.get(name)
        if entry is None or entry.path.name != file:
            found = "no shard has it" if entry is None else f"it is in {entry.path.name}"
            raise CheckpointError(path, f"{name}: the index says it is in {file}; {found}. {_AGAIN}")
