"""Parts of files, as a catalogue names them, and what a process has of files."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from flux_nf4.offload.file_map import map_parts


@dataclass(frozen=True)
class Part:
    path: Path
    offset: int
    nbytes: int


def mapped_copies(tensors):
    """Maps of these tensors (flat bytes) in a file that has them one after the other, and no name any more."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        parts, offset = [], 3  # nothing begins where a page does
        file.write(bytes(offset))
        for tensor in tensors:
            data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            padding = -offset % tensor.element_size()
            file.write(bytes(padding) + data)
            parts.append(Part(Path(file.name), offset + padding, len(data)))
            offset += padding + len(data)
        file.flush()
        return map_parts(parts)


def maps_of(path):
    """The lines of /proc/self/maps that are of the file."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]


def open_files(path):
    """Descriptors of this process for the file."""
    return [link for link in Path("/proc/self/fd").iterdir() if link.exists() and link.resolve() == path.resolve()]
