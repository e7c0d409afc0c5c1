"""A MODEL as ComfyUI-GGUF makes it, with the same interface.

Its tensors know their GGUF type and logical shape. The state dict of a layer has sizes only; that of the largest has in
addition room to dequantise it in, as a tensor that does not exist.
"""

import comfy.ops
import comfy.sd
import gguf
import torch


class _Tensor(torch.Tensor):
    """Raw bytes of a GGUF tensor."""

    @staticmethod
    def __new__(cls, raw, kind, shape):
        return super().__new__(cls, raw)

    def __init__(self, raw, kind, shape):
        self.tensor_type, self.tensor_shape = kind, shape

    @property
    def shape(self):
        return getattr(self, "tensor_shape", self.size())

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        moved.tensor_type, moved.tensor_shape = self.tensor_type, self.tensor_shape
        return moved

    def detach(self):
        return self


class _Operations(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        is_largest = False

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *_):
            for name in ("weight", "bias"):
                setattr(self, name, torch.nn.Parameter(state_dict[prefix + name], requires_grad=False))

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            for name in ("weight", "bias"):
                destination[prefix + name] = torch.empty(getattr(self, name).size(), device="meta")
            if self.is_largest:
                destination[prefix + "temp.weight"] = torch.empty(self.weight.shape, device="meta")


def load_gguf(path):
    """The MODEL of a GGUF file with Black Forest Labs' names."""
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = torch.Size(reversed(tensor.shape.tolist()))
        state[tensor.name] = _Tensor(torch.from_numpy(tensor.data.copy()), tensor.tensor_type, shape)
    loaded = comfy.sd.load_diffusion_model_state_dict(state, model_options={"custom_operations": _Operations})
    layers = [module for module in loaded.model.modules() if isinstance(module, _Operations.Linear)]
    max(layers, key=lambda layer: layer.weight.nbytes).is_largest = True
    return loaded
