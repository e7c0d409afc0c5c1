"""A streamed model's weights, as nodes and patches see them: unpatched, in host memory, in their logical shapes.

The state dict is not enough: for a packed weight (NVFP4, W4A8) it has the packed parts, whose shapes the patches do not
fit. The parameter itself has the logical shape.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def weight_of(model: nn.Module, key: str) -> torch.Tensor | None:
    """Tensor ``key`` of the model's state dict, or the parameter or buffer of that name; None if there is neither.

    It makes the state dict of the module that has the tensor, and not of the whole model.
    """
    path, _, name = key.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    tensor: torch.Tensor | None = module.state_dict(prefix=f"{path}." if path else "").get(key)
    own = module._parameters.get(name, module._buffers.get(name))
    return tensor if tensor is None or own is None else own


def key_patches(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    patches: Mapping[str, Sequence[Any]],
    in_host_memory: Callable[[nn.Module, str], torch.Tensor | None],
) -> dict[str, list[Any]]:
    """The result of ``ModelPatcher.get_key_patches``: for each tensor of the ``state`` dict a pair, then its patches.

    The pair is the weight in host memory, and the function of its layer that converts it to the values that the layer
    computes with. ``in_host_memory`` gives the tensor of a module that is streamed, and None of another.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for key, weight in _in_logical_shapes(model, state).items():
        path, _, name = key.rpartition(".")
        module = modules[path]
        if not hasattr(module, name):
            continue  # a part of a packed weight
        # Nodes that merge models keep these tensors. A view of a resident would keep its block on the device.
        if type(weight) in (torch.Tensor, nn.Parameter) or is_traceable_wrapper_subclass(weight):
            host = in_host_memory(module, name)
            weight = weight.cpu() if host is None else host
        convert: Callable[..., torch.Tensor] = getattr(module, f"convert_{name}", _as_it_is)
        found[key] = [(weight, convert), *patches.get(key, ())]
    return found


def _in_logical_shapes(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of ``state``; parameters and buffers of the same names in their place."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {key: own.get(key, tensor) for key, tensor in state.items()}


def _as_it_is(weight: torch.Tensor, **_: Any) -> torch.Tensor:
    return weight
