"""Units of memory, and what counts as running out of it."""

import sys

MIB = 1 << 20
GIB = 1 << 30


def is_out_of_ram(error: BaseException) -> bool:
    """Whether the system gave no memory: Python's own error, or that of torch's allocator."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory.

    Not every backend raises torch's own class; some only say it in the message. Where ComfyUI runs, it is asked, too:
    it knows the errors of more backends, and clears what the driver keeps of them.
    """
    import torch  # here, because modules that import no torch need the units above

    is_oom = getattr(sys.modules.get("comfy.model_management"), "is_oom", None)
    if isinstance(error, torch.OutOfMemoryError) or (is_oom is not None and is_oom(error)):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
