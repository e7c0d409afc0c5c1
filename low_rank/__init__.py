"""Low-rank patches (LoRA) of a Linear that computes with them beside its weight, which stays as it is.

``factors`` reads ComfyUI's patches; ``branch`` holds their factors and multiplies with them. Knows torch only, and
nothing of how the weight is kept: `nf4_loader` and `offload` both may use it.
"""
