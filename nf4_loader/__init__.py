"""From a safetensors file to a model of ComfyUI's whose Linears hold 4-bit weights.

Knows files, bitsandbytes and ComfyUI's model classes; knows nothing of streaming. Four rooms, whose imports go one way:
``checkpoint`` (what is in a file) <- ``linear`` (how a 4-bit Linear computes) <- ``models`` (ComfyUI's models from a
catalogue) and ``saving`` (quantise and write). In the order of use:

>>> catalogue = read_catalogue(path)  # the header only; every check on the file
>>> model = build_transformer(catalogue)  # ComfyUI's model on meta tensors, nothing allocated
>>> ...  # the caller gives the model its memory
>>> fill(model, catalogue, progress)  # the file's bytes, by several threads
"""
