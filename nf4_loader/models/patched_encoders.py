"""Text encoders with 4-bit layers, for ComfyUI's nodes: LoRA, merges, hooks and saving work as with dense ones.

ComfyUI patches a text encoder by writing to its weights. A 4-bit weight cannot be written to. Its layer patches a fresh
dense copy in each forward instead; a prompt needs only one forward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.sd
import torch

from ..linear.dense_view import DenseView
from ..linear.linear4bit import Linear4bit

Function = Callable[[torch.Tensor], torch.Tensor]


class ClipIn4Bits(comfy.sd.CLIP):
    """ComfyUI's CLIP, whose state dict has dense values that can be saved."""

    def clone(self, *args: Any, **kwargs: Any) -> "ClipIn4Bits":
        other = super().clone(*args, **kwargs)
        other.__class__ = ClipIn4Bits
        return other

    def get_sd(self) -> dict[str, torch.Tensor]:
        """All tensors, patched, for a file. 4-bit weights become dense tensors on the CPU."""
        return self._with_dense_values(super().get_sd())

    def state_dict_for_saving(self) -> dict[str, torch.Tensor]:
        """As `get_sd`. Newer ComfyUIs save this."""
        comfyuis: Any = super()
        return self._with_dense_values(comfyuis.state_dict_for_saving())

    def _with_dense_values(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for key, tensor in self.patcher.model_state_dict().items():
            if isinstance(tensor, DenseView):
                state[key] = tensor.clone().cpu()
        return state


class PatcherIn4Bits(comfy.model_patcher.ModelPatcher):
    """ComfyUI's ModelPatcher, except that it patches 4-bit weights in each forward."""

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        """The model's tensors; 4-bit weights with this patcher's patches, as ComfyUI shows what it has loaded."""
        state: dict[str, torch.Tensor] = super().model_state_dict(filter_prefix)
        for key, layer in self._in_4_bits():
            if key in state and key in self.patches:
                state[key] = DenseView(layer, layer.shape, functions=_functions(key, layer, self.patches[key]))
        return state

    def load(self, *args: Any, **kwargs: Any) -> None:
        super().load(*args, **kwargs)
        self._patch_layers(self.current_hooks)

    def patch_hooks(self, hooks: Any) -> None:
        super().patch_hooks(hooks)
        self._patch_layers(hooks)

    def _patch_layers(self, hooks: Any) -> None:
        """Put this patcher's patches and those of ``hooks`` into effect. Clones share the layers."""
        of_hooks = self.get_combined_hook_patches(hooks)
        for key, layer in self._in_4_bits():
            layer.weight_function = _functions(key, layer, [*self.patches.get(key, ()), *of_hooks.get(key, ())])

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: Any, key: str, *args: Any, **kwargs: Any
    ) -> None:
        if not isinstance(self._weight(key), DenseView):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self._weight(key), DenseView):
            return super().patch_weight_to_device(key, *args, **kwargs)
        return None

    def _in_4_bits(self) -> list[tuple[str, Linear4bit]]:
        """The layers by the names of their weights."""
        modules = self.model.named_modules()
        return [(f"{path}.weight", module) for path, module in modules if isinstance(module, Linear4bit)]

    def _weight(self, key: str) -> Any:
        weight, *_ = comfy.model_patcher.get_key_weight(self.model, key)
        return weight


def patch_4bit_layers(clip: comfy.sd.CLIP) -> None:
    """Have ``clip``, which has 4-bit layers, and its future clones patch, merge and save these as dense ones."""
    clip.__class__ = ClipIn4Bits
    kind = type(clip.patcher)
    clip.patcher.__class__ = type("PatcherIn4Bits", (PatcherIn4Bits, kind), {"moves_as": kind})
    # ComfyUI would count the dense weights of the state dict.
    model = clip.cond_stage_model
    clip.patcher.size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _functions(key: str, layer: Linear4bit, patches: Sequence[Any]) -> list[Function]:
    """The functions that patch a fresh dense weight of ``layer``, in fp32, as ComfyUI patches dense weights."""

    def patch(weight: torch.Tensor) -> torch.Tensor:
        original = {key: [(layer.weight, None)]}
        values = weight.to(torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, values, key, original_weights=original).to(weight.dtype)

    return [patch] if patches else []
