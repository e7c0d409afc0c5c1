"""ComfyUI's side of streaming, and all of it that knows ComfyUI.

``streaming`` (what makes a model a streamed one), ``patcher`` (ComfyUI's ModelPatcher for it), ``patching`` (LoRA and
the like, with ``dense_patches``, ``patch_check`` and ``half_pairs``), ``adopt`` (streams another node's MODEL),
``pins`` (its limit), ``visitors`` (text encoders and VAE), ``contract`` (what ComfyUI must have).
"""
