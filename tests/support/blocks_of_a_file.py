"""A file whose blocks are pinned where they are."""

import torch
from file_parts import Part

from flux_nf4.offload.arena import PAGE
from flux_nf4.offload.file_arena import FileArena
from flux_nf4.offload.file_map import map_parts

DEVICE = torch.device("cuda", 0)
BLOCKS = 4
PAGES = 2 * PAGE
"""Of each block: its bytes begin and end inside of a page."""

ALL = BLOCKS * PAGES


def arena_of(file, registrar):
    tensors = [map_parts([Part(file, PAGE // 2 + index * PAGE, PAGE)]) for index in range(BLOCKS)]
    return FileArena(tensors, registrar)
