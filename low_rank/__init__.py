"""Low-rank patches (LoRA) that a Linear computes beside its weight, without changing the weight.

``factors`` reads ComfyUI's patches; ``branch`` holds their factors and multiplies with them. The package knows torch,
but not how the weight is kept, so that both `nf4_loader` and `offload` can use it.
"""
