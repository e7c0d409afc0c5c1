"""ComfyUI's side of streaming, and all of it that knows ComfyUI.

``streaming`` (what makes a model a streamed one), ``patcher`` (ComfyUI's ModelPatcher for it), ``own_model`` (a model
object for each MODEL of a loader), ``reads`` (what nodes read of it), ``patching`` (LoRA and the like, with
``weights``, ``dense_patches``, ``low_rank_beside``, ``patch_check``, ``patch_log``, ``lora_reader`` and
``unread_lora``), ``modulation`` and ``coming_steps`` (layers that are computed ahead), ``retry`` (a forward that runs
once more) with ``company`` (whether it may), ``lasting`` (allocations that outlive a forward), ``compiled`` (nodes for
torch.compile), ``adopt`` (streams another node's MODEL) with ``block_lists`` (finds its blocks), ``clip`` (a streamed
CLIP) with ``large_layers`` (its embeddings), ``pins`` (ComfyUI's limit on pinned memory), ``encoders`` (text encoders
and VAE that are not streamed), ``requires`` (what ComfyUI must have), ``node_names`` (nodes that errors name).
"""
