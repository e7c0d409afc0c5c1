"""A Linear whose weight is a packed tensor class, as those of ComfyUI's native formats are, for versions without them.

As there: the parameter has the logical shape and the state dict the packed parts; the layer multiplies with the packed
weight as long as nothing has to be added to it, and with a dense copy otherwise.
"""

import collections

import torch
from torch import nn

multiplied = collections.Counter()
"""How many products were computed from ``packed`` weights, and how many from ``dense`` copies."""


class PackedTensor(torch.Tensor):
    """(rows, columns) in fp32, held as 4-bit codes, two in a byte, and a scale (rows, 1)."""

    @staticmethod
    def __new__(cls, packed, scale):
        shape = (packed.shape[0], 2 * packed.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=packed.device)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 7
        codes = ((weight / scale).round() + 8).to(torch.uint8)
        return cls(codes[:, ::2] * 16 + codes[:, 1::2], scale)

    def dequantize(self):
        codes = torch.stack((self.packed // 16, self.packed % 16), -1).flatten(1)
        return (codes.to(self.scale.dtype) - 8) * self.scale

    @property
    def nbytes(self):
        return self.packed.nbytes + self.scale.nbytes

    def __tensor_flatten__(self):
        return ["packed", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, shape, stride):
        return cls(inner["packed"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].packed), func(args[0].scale))
        dense = torch.utils._pytree.tree_map(lambda leaf: leaf.dequantize() if isinstance(leaf, cls) else leaf, args)
        return func(*dense, **(kwargs or {}))


class PackedLinear(nn.Module):
    """Takes the place of a Linear of ComfyUI's."""

    comfy_cast_weights = True

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(PackedTensor.of(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias
        self.weight_function, self.bias_function = [], []

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        destination = {} if destination is None else destination
        parts = {"weight": self.weight.packed, "weight_scale": self.weight.scale, "comfy_quant": torch.zeros(4)}
        if self.bias is not None:
            parts["bias"] = self.bias
        destination.update({prefix + name: part for name, part in parts.items()})
        return destination

    def forward(self, input):
        weight, bias = self.weight, self.bias
        is_packed = isinstance(weight, PackedTensor)
        multiplied["packed" if is_packed and not self.weight_function else "dense"] += 1
        weight = weight.dequantize() if is_packed else weight
        for function in self.weight_function:
            weight = function(weight)
        for function in self.bias_function:
            bias = function(bias)
        return nn.functional.linear(input, weight, bias)


def pack(model):
    """Have every Linear of ``model`` be a `PackedLinear`. Returns ``model``."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(path, PackedLinear(layer))
    return model


def round_like_packed(model):
    """Have every Linear of ``model`` hold the values that a `PackedLinear` of it has. Returns ``model``."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(PackedTensor.of(layer.weight.detach()).dequantize(), requires_grad=False)
    return model
