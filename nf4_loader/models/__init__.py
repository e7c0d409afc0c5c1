"""ComfyUI's models from a catalogue: transformers, text encoders and VAE, their memory filled from the files.

``transformers`` builds a model on meta tensors. ``fill`` reads its bytes once it has memory; ``mapped`` finds those
that need not be read, because the file has them just as the model does. ``text_encoders`` does all of this for CLIP-L
and T5.
"""
