"""Quantise a model and write it: ``sources`` and ``model_sources`` say where its tensors come from, ``dense`` reads
their values, ``quantise`` packs them, ``save`` writes the file, which ``atomic_file`` has appear whole or not at all.
"""
