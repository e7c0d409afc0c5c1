"""What a family of models is: the names of its blocks, and the layouts in which tools write its tensors."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

Layers = Mapping[str, tuple[str, ...]]
"""By layer of ComfyUI's model, the layers of a file that make it, stacked row-wise in this order."""

Shapes = Mapping[str, tuple[int, ...]]
"""Logical shapes of a transformer's tensors, by ComfyUI's names."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file goes: number ``part`` of the ``parts`` tensors that are stacked row-wise to ``name``.

    With ``halves_swapped`` the file has the model's second half of these rows first. With ``flattened`` the model's
    tensor has one dimension.
    """

    name: str
    part: int = 0
    parts: int = 1
    halves_swapped: bool = False
    flattened: bool = False


@dataclass(frozen=True, eq=False)
class Layout:
    """The names that one tool gives the tensors of a family.

    Attributes:
        name: As `describe` shows it.
        marks: Beginnings of names, without prefix. A file has this layout if each of them begins one of its names.
        sample: A large layer in the first block. Its dtype counts as the dtype of a dense file.
        lists: The file's lists of blocks, and other lists of modules whose names differ, with ComfyUI's name of each.
        layers: Layers and single tensors that have other names here, by ComfyUI's list of blocks ("" for those in no
            block). All other names stay as they are.
        halves_swapped: Layers of ComfyUI's model whose two halves are in the other order in the file.
        flattened: Tensors that have one dimension in ComfyUI's model and several in the file.
        is_read: False if files of this layout are recognised but not loaded.
        is_comfyuis: Whether ComfyUI's own loaders take dense files of this layout.
    """

    name: str
    marks: tuple[str, ...]
    sample: str = ""
    lists: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Layers] = field(default_factory=dict)
    halves_swapped: frozenset[str] = frozenset()
    flattened: frozenset[str] = frozenset()
    is_read: bool = True
    is_comfyuis: bool = True

    @functools.cached_property
    def _places(self) -> dict[tuple[str, str], Place]:
        """By list of blocks in the file ("" for none) and name in the block: the place, with its name in the block."""
        theirs = {ours: name for name, ours in self.lists.items()} | {"": ""}
        return {
            (theirs[blocks], layer): Place(ours, part, len(parts), ours in self.halves_swapped, ours in self.flattened)
            for blocks, layers in self.layers.items()
            for ours, parts in layers.items()
            for part, layer in enumerate(parts)
        }

    def place(self, name: str) -> Place:
        """Where the tensor ``name`` (without prefix) goes."""
        layer, _, kind = name.rpartition(".")
        of_layer = self._renamed(layer) if kind in ("weight", "bias") else None
        if of_layer is not None:
            return replace(of_layer, name=f"{of_layer.name}.{kind}")
        return self._renamed(name) or Place(name)

    def _renamed(self, name: str) -> Place | None:
        """The place of a layer or tensor that has another name here; None if its name stays as it is."""
        if ("", name) in self._places:
            return self._places["", name]
        block = re.fullmatch(r"([\w.]+?)\.(\d+)\.(.+)", name)
        found = self._places.get((block[1], block[3])) if block else None
        return replace(found, name=f"{self.lists[block[1]]}.{block[2]}.{found.name}") if block and found else None


@dataclass(frozen=True)
class BlockTensor:
    """A tensor in block ``index`` of the list ``blocks``, and its ``name`` in the block."""

    blocks: str
    index: int
    name: str


@dataclass(frozen=True)
class Modulation:
    """Layers in the blocks whose only input is one small vector, the same for all blocks: they can be computed ahead.

    The vector is the sum of the outputs of the model's embedders. The input of one embedder is the timestep; the inputs
    of the others do not change during a sampling (guidance, pooled prompt). Names are those of ComfyUI's model.

    Attributes:
        layers: By list of blocks, the modules of a block whose only input is the vector.
        timestep: The embedder of the timestep.
        embedding: The function that makes its input from timesteps and width. It is in the module of the model's class.
        others: The other embedders.
    """

    layers: Mapping[str, tuple[str, ...]]
    timestep: str
    embedding: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Family:
    """Models of one architecture.

    Attributes:
        name: As people call it.
        image_models: What ComfyUI's detection calls it (``unet_config["image_model"]``).
        lists: ComfyUI's lists of blocks, in the order in which a forward runs them, and the kind of each list's blocks.
        layouts: The layouts of its files. The first one has the names of ComfyUI's model.
        beside_blocks: Tensors in no block that every complete model has.
        renames: Ends of names that some tools write, and the ends that ComfyUI's model has.
        variant: From the shapes of a model, its name within the family, such as "dev".
        embeddings: Weights of two dimensions that do not belong to a Linear. They are never in 4 bits.
        told_by_config: Settings that are true in the ``config.json`` of some models, each with the empty tensor from
            which ComfyUI's detection sees it.
        since: From the shapes of a model, the first version of ComfyUI that has it; "" if all supported ones have it.
        modulation: Layers whose outputs are computed ahead; None if there are none.
    """

    name: str
    image_models: frozenset[str]
    lists: Mapping[str, str]
    layouts: tuple[Layout, ...]
    beside_blocks: tuple[str, ...]
    renames: Mapping[str, str] = field(default_factory=dict)
    variant: Callable[[Shapes], str] = field(default=lambda _: "")
    embeddings: frozenset[str] = frozenset()
    told_by_config: Mapping[str, str] = field(default_factory=dict)
    since: Callable[[Shapes], str] = field(default=lambda _: "")
    modulation: Modulation | None = None

    @property
    def native(self) -> Layout:
        """The layout of ComfyUI's model."""
        return self.layouts[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.lists.values())

    @property
    def block_lists(self) -> frozenset[str]:
        """The names of its lists of blocks in all layouts."""
        return frozenset((*self.lists, *(theirs for layout in self.layouts for theirs in layout.lists)))

    def place(self, layout: Layout, name: str) -> Place:
        """Where the tensor ``name`` of a file in ``layout`` goes."""
        place = layout.place(name)
        for end, ours in self.renames.items():
            if place.name.endswith(end):
                return replace(place, name=place.name.removesuffix(end) + ours)
        return place

    @functools.cached_property
    def _in_block(self) -> re.Pattern[str]:
        return re.compile(rf"(?P<blocks>{'|'.join(map(re.escape, self.lists))})\.(?P<index>\d{{1,6}})\.(?P<name>.+)")

    def block_of(self, name: str) -> BlockTensor | None:
        """The tensor ``name`` of ComfyUI's model as part of its block; None if it is in no block."""
        match = self._in_block.fullmatch(name)
        return BlockTensor(match["blocks"], int(match["index"]), match["name"]) if match else None

    def is_modulation(self, tensor: BlockTensor) -> bool:
        """Whether the outputs of the layer that ``tensor`` belongs to are computed ahead."""
        layers = self.modulation.layers if self.modulation is not None else {}
        return tensor.name.split(".")[0] in layers.get(tensor.blocks, ())
