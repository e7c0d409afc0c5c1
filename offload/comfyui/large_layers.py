"""Large layers beside the blocks: the token embedding of a text encoder, and its output layer.

An embedding of Mistral 3 takes 1.3 GB, of which a prompt needs a few hundred rows; an output layer is used only to
write text. So they stay in host memory, unless all of the model has room on the device. An embedding looks its rows up
in host memory and brings only those to the device. A Linear of ComfyUI's brings its weight there when it is called.
With patches, a patched copy in host memory takes the weight's place, and the weight itself is not on the device.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from ..record import keep_in_place

LARGE_BYTES = 32 << 20


class LargeLayers:
    """The large layers of ``model`` that are in none of ``blocks``. From now on ``to`` leaves them where they are."""

    def __init__(self, model: nn.Module, blocks: Collection[nn.Module]) -> None:
        in_blocks = {module for block in blocks for module in block.modules()}
        self._host = {
            layer: layer.get_parameter("weight")
            for layer in model.modules()
            if layer not in in_blocks and _is_large(layer)
        }
        for layer in self._host:
            keep_in_place(layer)
            if isinstance(layer, nn.Embedding):
                layer.__class__ = type("HostEmbedding", (HostEmbedding, type(layer)), {})
        self._on_device: frozenset[nn.Module] = frozenset()

    @property
    def layers(self) -> Collection[nn.Module]:
        return self._host.keys()

    @property
    def device_bytes(self) -> int:
        """Bytes that they have on the device now."""
        return self.nbytes_of(self._on_device)

    def nbytes_of(self, layers: Iterable[nn.Module]) -> int:
        """Bytes that these of them have, or would have, on the device."""
        return sum(self._host[layer].nbytes for layer in layers)

    def bring_to(self, device: torch.device, layers: frozenset[nn.Module]) -> None:
        """Have a copy of these on ``device``, and of no others."""
        self._take_back(self._on_device - layers)
        try:
            for layer in layers - self._on_device:
                layer._parameters["weight"] = nn.Parameter(self._host[layer].to(device), requires_grad=False)
        except BaseException:
            self.take_back()
            raise
        self._on_device = layers

    def take_back(self) -> None:
        """Free the memory on the device. Idempotent."""
        self._take_back(self.layers)
        self._on_device = frozenset()

    def _take_back(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            layer._parameters["weight"] = self._host[layer]


class HostEmbedding(nn.Embedding):
    """Before a class of embeddings: looks the rows up where the weight is, and has the class compute with these."""

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.weight.device == input.device:
            return super().forward(input, *args, **kwargs)
        return self.look_up(input, *args, **kwargs)

    def look_up(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `forward`, with the rows that are needed brought from where the weight is."""
        weight = self.weight
        ids, places = torch.unique(input.to(weight.device), return_inverse=True)
        # By bytes: torch does not index every dtype that weights are kept in.
        rows = weight.detach().view(torch.uint8).index_select(0, ids.flatten()).view(weight.dtype)
        small = copy.copy(self)
        small.__dict__.pop("weight", None)  # a patched copy is there
        small._parameters = {**self._parameters, "weight": nn.Parameter(rows.to(input.device), requires_grad=False)}
        small.num_embeddings, small.padding_idx = len(rows), None
        return super(HostEmbedding, small).forward(places.to(input.device), *args, **kwargs)


def _is_large(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    if not isinstance(layer, (nn.Embedding, nn.Linear)) or weight is None or weight.nbytes < LARGE_BYTES:
        return False
    # Only what ComfyUI casts when it is called may be elsewhere, and only plain tensors have rows.
    return bool(getattr(layer, "comfy_cast_weights", False)) and type(weight) is nn.Parameter
