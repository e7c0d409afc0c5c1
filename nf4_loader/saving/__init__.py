"""Quantise a model and write it.

``sources`` and ``model_sources`` say where its tensors come from, ``dense`` reads their values, ``quantise`` packs
them, ``save`` writes the file. With ``atomic_file`` the file appears whole or not at all.
"""
