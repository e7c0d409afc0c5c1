"""Keeps part of a model's blocks resident on a device and streams the rest from pinned host memory.

Knows torch, not what the blocks compute. From the bottom: ``plan`` (who stays, integers only), ``record`` (a block's
flat bytes), ``ring`` (places in the staging bytes, integers), ``pinning`` (who locks memory, how much is locked),
``pinning_ahead`` (on a thread, while a model is made), ``pinnable`` (memory that is locked part by part),
``arena`` (host memory of our own), ``file_map`` and ``file_arena`` (memory of files), ``ram`` (how much there is),
``copies`` (streams and events), ``bounce`` (copies of what is not pinned), ``block`` (the records of one), ``extras``
(tensors that layers get in addition), ``call_order`` (in which order a block calls its layers), ``staging`` (tiles in
the ring), ``conveyor`` (fetch, wait, release), ``put`` (what stays on the device), ``streamer``
(who stays), ``telemetry`` (what it cost), ``ahead`` (outputs computed before they are needed), ``turns`` (threads that
drive a device each). ``host_memory`` is for models that are not streamed. ``comfyui`` is for ComfyUI's memory manager;
nothing else here knows ComfyUI.
"""
