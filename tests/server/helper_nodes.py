"""A custom node package that the tests drop in beside ours: what a test needs to do inside the server."""

import logging
import sys

import comfy.model_management
import psutil
import torch

_get_free_memory = comfy.model_management.get_free_memory
_swap_memory = psutil.swap_memory


class AnyType(str):
    """Links to any input."""

    def __ne__(self, other):
        return False


class AnyName:
    """A file name that no list was asked about."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    RETURN_TYPES = (AnyType("*"),)
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self, name):
        return (name,)


class SetFreeRam:
    """Makes ComfyUI see this much free RAM (bytes, no swap); 0: what there is."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"nbytes": ("INT", {"min": 0, "max": 2**60})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self, nbytes):
        def get_free_memory(dev=None, torch_free_too=False):
            real = _get_free_memory(dev, torch_free_too)
            is_cpu = isinstance(dev, torch.device) and dev.type == "cpu"
            return nbytes if is_cpu and not torch_free_too else real

        comfy.model_management.get_free_memory = get_free_memory if nbytes else _get_free_memory
        psutil.swap_memory = (lambda: type("Swap", (), {"free": 0})) if nbytes else _swap_memory
        return {}


class StreamOnCpu:
    """Has what is loaded from now on stream, though the device is the CPU; off again, it logs how many bytes came.

    Blocks are ``small`` or of their real size; for both the ring is smaller than a few of them. Nobody is told what was
    measured: the package would take it for this machine's speed.
    """

    computes_from_host = None
    sizes = ()
    nbytes = 0
    observers = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"is_on": ("BOOLEAN", {})}, "optional": {"small": ("BOOLEAN", {"default": True})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self, is_on, small=True):
        own, of_copies = StreamOnCpu, module("offload.copies").InlineCopies
        patcher, record = module("offload.comfyui.patcher").StreamedModelPatcher, module("offload.record")
        if own.computes_from_host is None:
            own.computes_from_host, copy = patcher._computes_from_host, of_copies.copy
            own.sizes = record.SMALL_BYTES, patcher.staging_bytes

            def counted(copies, pairs, **events):
                own.nbytes += sum(source.nbytes for _, source in pairs)
                copy(copies, pairs, **events)

            of_copies.copy = counted
        patcher._computes_from_host = False if is_on else own.computes_from_host
        # As many tiles for the small model as for the real one.
        sizes = (2048, 600_000) if small else (own.sizes[0], 64 << 20)
        record.SMALL_BYTES, patcher.staging_bytes = sizes if is_on else own.sizes
        observers = module("offload.comfyui.streaming").observers
        if is_on:
            own.observers, observers[:] = observers[:], ()
        else:
            observers[:] = own.observers or observers
            logging.info("TestStreamOnCpu: %d bytes streamed", own.nbytes)
        own.nbytes = 0
        return {}


def module(name):
    (found,) = [module for full, module in sys.modules.items() if full.endswith(name)]
    return found


NODE_CLASS_MAPPINGS = {"TestAnyName": AnyName, "TestSetFreeRam": SetFreeRam, "TestStreamOnCpu": StreamOnCpu}
