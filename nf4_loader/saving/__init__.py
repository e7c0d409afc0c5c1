"""Quantise a transformer or text encoders and write them.

``sources`` (of files), ``model_sources`` and ``encoder_sources`` (of what ComfyUI has loaded) say where tensors come
from, ``dense`` reads their values, ``quantise`` packs them, ``save`` writes the file. With ``atomic_file`` the file
appears whole or not at all.
"""
