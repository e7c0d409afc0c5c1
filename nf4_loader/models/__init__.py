"""ComfyUI's models from a catalogue: transformers, text encoders and VAE, their memory filled from the files.

``transformers`` builds a model on meta tensors. ``fill`` reads its bytes once it has memory; ``mapped`` finds those
that need not be read, because the file has them just as the model does. ``text_encoders`` does all of this for CLIP-L
and T5. ``streamed_encoders`` builds all text encoders of `families.encoders`, without memory for 4-bit weights, and
``tokenizers`` finds the tokenizers that ComfyUI lacks. ``patched_encoders`` lets ComfyUI's nodes patch 4-bit layers.
"""
