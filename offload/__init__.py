"""Keeps part of a model's blocks resident on a device and streams the rest from pinned host memory.

Knows torch, not what the blocks compute. From the bottom: ``plan`` (who stays, integers only), ``record`` (a
block's flat bytes), ``arena`` (host memory), ``copies`` (streams and events), ``streamer`` (fetch, wait, release),
``patcher`` (ComfyUI's ModelPatcher, the one file that knows ComfyUI).
"""
