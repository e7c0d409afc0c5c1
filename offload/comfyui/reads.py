"""What nodes read of a streamed model: its weights without patches, its patches, and its weights with them.

Streaming patches copies in each forward and leaves the weights as they are. Most nodes want them so. Those that make a
LoRA of a model want the patched values, for which ComfyUI has had two ways to ask.
"""

from typing import Any

import torch
from torch import nn

from .dense_patches import DensePatches, patched_copy
from .own_model import SharedModulesPatcher
from .weights import key_patches, weight_of


class ReadPatcher(SharedModulesPatcher):
    """The part of a streamed model's patcher that gives nodes weights to read."""

    patches: dict[str, list[Any]]

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        """ComfyUI's, with patches in the tensors of layers that ComfyUI does not cast: nodes read these here.

        A packed weight is made dense only when it is read."""
        state: dict[str, torch.Tensor] = super().model_state_dict(filter_prefix)
        for key in state.keys() & self.patches.keys():
            module, name = self._place_of(key)
            if hasattr(module, "dense_with"):
                dense = DensePatches(key, self.patches[key], module, as_if_it_fits=True)
                state[key] = _patched(dense, module, state[key], is_packed=name == "weight")
            elif not hasattr(module, "comfy_cast_weights"):
                state[key] = patched_copy(state[key], key, self.patches[key], module, state[key].device)
        return state

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """Each weight without its patches, in host memory, and its patches."""
        state = super().model_state_dict(filter_prefix)
        return key_patches(self.model, state, self.patches, self.model.streaming.in_host_memory)

    def patch_weight_to_device(
        self, key: str, device_to: torch.device | None = None, *args: Any, return_weight: bool = False, **kwargs: Any
    ) -> torch.Tensor | None:
        """With ``return_weight`` the tensor ``key`` with its patches, a copy if it has any.

        Else it does nothing: all clones share the weights, so patches never change them; see `Patching`.
        """
        weight = weight_of(self.model, key) if return_weight else None
        if weight is None or key not in self.patches:
            return weight
        return patched_copy(weight, key, self.patches[key], self._place_of(key)[0], device_to or weight.device)

    def _place_of(self, key: str) -> tuple[nn.Module, str]:
        path, _, name = key.rpartition(".")
        return self.model.get_submodule(path), name


def _patched(dense: DensePatches, module: Any, tensor: torch.Tensor, *, is_packed: bool) -> torch.Tensor:
    if not is_packed:
        return dense.apply(tensor.clone(), dense.tensors)
    view: torch.Tensor = module.dense_with(
        lambda weight: dense.apply(weight, dense.tensors), dense.shape_of(module.shape)
    )
    return view
