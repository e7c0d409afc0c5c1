"""Text encoders of Flux.1 in files: in an all-in-one file, and the dense twin of a T5 in 4 bits."""

import checkpoint_layout as layout
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit as BnbLinear4bit
from packed_tensors import packed_tensors
from sparse_file import write_sparse
from transformers import T5EncoderModel

from flux_nf4.nf4_loader.checkpoint.read_parts import TORCH_DTYPES


def dense_reference(model):
    """transformers' model with the weights that bitsandbytes dequantises, in fp32."""
    dense = T5EncoderModel(model.config).float().eval()
    state = {}
    for name, tensor in model.state_dict().items():
        if ".weight." not in name:
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
    for name, module in model.named_modules():
        if isinstance(module, BnbLinear4bit):
            module.weight.quant_state.dtype = torch.float32
            state[f"{name}.weight"] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
    dense.load_state_dict(state)
    return dense


def all_in_one(path, clip_l, t5, vae_path=None):
    """A file with these text encoders beside a transformer and a VAE (at ``vae_path``, if given) of the real layout,
    which are holes."""
    tensors = {}
    for name, shape in layout.flux(1, 1, guidance=True).items():
        name = f"model.diffusion_model.{name}"
        tensors |= packed_tensors(name, shape, "nf4", 64) if len(shape) == 2 else {name: ("BF16", shape, None)}
    vae = {f"vae.{name}": ("BF16", shape, None) for name, shape in layout.vae().items()}
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {torch.uint8: "U8"}
    for part, state in (("clip_l", clip_l), ("t5xxl", t5)):
        for name, tensor in state.items():
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            tensors[f"text_encoders.{part}.transformer.{name}"] = (names[tensor.dtype], tuple(tensor.shape), raw)
    if vae_path is not None:
        write_sparse(vae_path, vae)
    write_sparse(path, tensors if vae_path is not None else tensors | vae)
    return path
