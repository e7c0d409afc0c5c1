"""What a family of models is: the names of its blocks, and the layouts in which tools write its tensors."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

Layers = Mapping[str, tuple[str, ...]]
"""Layers of ComfyUI's model, and the layers of a file whose rows, one below the other, make each."""

Shapes = Mapping[str, tuple[int, ...]]
"""Logical shapes of a transformer's tensors, by ComfyUI's names."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file goes: part ``part`` of the ``parts`` whose rows, one below the other, make ``name``.

    With ``halves_swapped`` the second half of all these rows comes first. With ``flattened`` the model has its values
    in one dimension.
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
        marks: Beginnings of names, without prefix, that are all in a file of this layout.
        sample: A large layer in the first block. Its dtype is that of a dense file.
        lists: Its lists of blocks (and other lists of modules whose names differ), and ComfyUI's name of each.
        layers: By ComfyUI's list of blocks ("" is what is in no block), the layers that have other names here, and the
            single tensors. Names that are not in it stay as they are.
        halves_swapped: Layers of ComfyUI's model whose two halves are the other way round in the file.
        flattened: Tensors of ComfyUI's model that have one dimension and more in the file.
        is_read: False where files of this layout are known but cannot be loaded.
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
        """By the file's list of blocks ("" is none) and layer or tensor: the place, its name without the block's."""
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
        """The place of a layer or tensor that has another name here."""
        if ("", name) in self._places:
            return self._places["", name]
        block = re.fullmatch(r"([\w.]+?)\.(\d+)\.(.+)", name)
        found = self._places.get((block[1], block[3])) if block else None
        return replace(found, name=f"{self.lists[block[1]]}.{block[2]}.{found.name}") if block and found else None


@dataclass(frozen=True)
class BlockTensor:
    """A tensor in a block: which list's block it is, and its name in there."""

    blocks: str
    index: int
    name: str


@dataclass(frozen=True)
class Modulation:
    """Layers in the blocks that see one small vector, the same for all blocks: their outputs can be known ahead.

    The vector is the sum of what the model's embedders give. One of them sees the timestep alone, the others see what
    a sampling does not change (guidance, pooled prompt). Names are those of ComfyUI's model.

    Attributes:
        layers: By list of blocks, the modules of a block that see nothing but the vector.
        timestep: The embedder of the timestep. The function ``embedding`` in the module of the model's class makes its
            input: of the timesteps and the width.
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
        lists: ComfyUI's lists of blocks in the order in which a forward runs them, and what the blocks of each are
            called: their kind.
        layouts: In which its files come; the first one has the names of ComfyUI's model.
        beside_blocks: Tensors in no block that every whole model has.
        renames: Ends of names that some tools write, and their ends in ComfyUI's model.
        variant: What describes one model within the family, from its shapes, such as "dev".
        embeddings: Weights of two dimensions that are no Linear's: they are never in 4 bits.
        told_by_config: What is true in the ``config.json`` of some models, and the empty tensor that tells ComfyUI so.
        since: The version of ComfyUI that first had this model, from its shapes; "" if all that we support have it.
        modulation: Layers whose outputs are computed ahead; None where the blocks have none.
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
        """Names of its lists of blocks, ComfyUI's and those of other layouts."""
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
        """The block that the tensor ``name`` of ComfyUI's model belongs to; None where it is in no block."""
        match = self._in_block.fullmatch(name)
        return BlockTensor(match["blocks"], int(match["index"]), match["name"]) if match else None

    def is_modulation(self, tensor: BlockTensor) -> bool:
        """Whether the layer of ``tensor`` is one whose outputs are computed ahead."""
        layers = self.modulation.layers if self.modulation is not None else {}
        return tensor.name.split(".")[0] in layers.get(tensor.blocks, ())
