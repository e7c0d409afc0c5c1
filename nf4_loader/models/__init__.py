"""ComfyUI's models from a catalogue: transformers, text encoders and VAE, their memory filled from the files.

``transformers`` builds a model on meta tensors, ``fill`` reads its bytes once it has memory, ``mapped`` leaves packed
bytes in the file where RAM is short, ``text_encoders`` does all of this for CLIP-L and T5.
"""
