"""What is in a checkpoint: every check on a file's bytes is here, before anything is built from them.

From the bottom: ``errors`` (the one exception that a user sees), ``header`` (one safetensors file), ``shards`` (several
files as one), ``config`` (what diffusers says beside them), ``quant_state`` (what bitsandbytes writes beside a 4-bit
weight), ``tensors`` (a 4-bit weight, a tensor of parts), ``catalogue`` (a file's tensors by the names of ComfyUI's
model), ``identify`` (what another file is, and its loader), ``require`` (what a node needs of a file), ``read`` and
``read_parts`` (their bytes into memory). Knows neither kernels nor ComfyUI.
"""
