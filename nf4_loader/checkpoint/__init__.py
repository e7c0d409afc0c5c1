"""What is in a checkpoint: every check on a file's bytes is here, before anything is built from them.

From the bottom: ``errors`` (the one exception that a user sees), ``broken_download`` (what came in place of a model),
``header`` (one safetensors file), ``shards`` (several files as one), ``quant_state`` (what bitsandbytes writes beside a
4-bit weight), ``tensors`` (a 4-bit weight, a tensor of parts), ``read`` (bytes into memory), ``catalogue`` (a file's
tensors by the names of ComfyUI's model), ``config`` (what diffusers says beside them), ``identify`` (what another file
is, and its loader), ``encoder_file`` (a text encoder in a file of its own), ``require`` (what a node needs of a file),
``read_parts`` (the tensors' bytes into memory). Knows neither kernels nor ComfyUI.
"""
