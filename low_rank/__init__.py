"""Low-rank patches (LoRA) that a Linear computes beside its weight, without changing the weight.

``factors`` reads ComfyUI's patches; ``branch`` holds their factors and multiplies with them, for many rows by the
Triton kernels of ``beside`` (``beside_kernel``). The package knows torch, but not how the weight is kept, so that both
`nf4_loader` and `offload` can use it.
"""
