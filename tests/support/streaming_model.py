"""A small model for a `SimulatedDevice`, and what may be done with it: every step keeps outputs to be checked later.

Layers launch their work: it reads the tensors that were bound when they were called, at the time it runs.
"""

import ctypes
import random

import torch
from counted import plan_by_counts
from file_parts import mapped_copies
from simulated_device import SimulatedDevice
from torch import nn

KINDS = {"double": (3, (40, 24, 40)), "single": (5, (32, 16))}
"""Blocks of a kind, and the widths of their layers."""


class Value:
    """What a kernel will have computed."""

    def __init__(self, tensor=None):
        self.tensor = tensor


class Layer(nn.Module):
    """``extra`` is a tensor that it may be given later."""

    def __init__(self, width, generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-9, 9, (width, 4), generator=generator).float(), requires_grad=False)
        self.bias = nn.Parameter(torch.randint(-9, 9, (4,), generator=generator).float(), requires_grad=False)
        self.device = None

    def forward(self, x):
        tensors = [self.weight, self.bias, *([self.extra] if hasattr(self, "extra") else [])]
        if self.device is None:
            return Value(compute(x.tensor, *tensors))
        assert all(map(self.device.holds, tensors)), "a tensor is not on the device"
        places, out = [(tensor.data_ptr(), tensor.shape) for tensor in tensors], Value()

        def kernel():
            # By address: a kernel that is queued keeps no memory alive, on a GPU neither.
            out.tensor = compute(x.tensor, *(at(pointer, shape) for pointer, shape in places))

        self.device.launch(kernel)
        return out


def at(pointer, shape):
    """The fp32 tensor at an address."""
    memory = (ctypes.c_char * (4 * shape.numel())).from_address(pointer)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


def compute(x, weight, bias, extra=torch.zeros(1, 4)):  # noqa: B008
    return (x * 3 + (weight.sum(0) * torch.arange(1, 5)) + bias + 7 * extra.sum(0)) % 1009


class Block(nn.Module):
    """Calls its layers in another order than the one they are registered in."""

    def __init__(self, widths, generator):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, generator) for width in widths)

    def forward(self, x, stop_before=None):
        for index, layer in enumerate(reversed(self.layers)):
            if index == stop_before:
                raise InterruptedError
            x = layer(x)
        return x


def make_groups(seed):
    generator = torch.Generator().manual_seed(seed)
    return {kind: [Block(widths, generator) for _ in range(count)] for kind, (count, widths) in KINDS.items()}


class StreamedModel:
    """A model streamed by ``streamer_class`` beside the same model computed at once; `check` compares.

    With seed 2 some weights are streamed from a mapped file."""

    def __init__(self, streamer_class, device, seed=0):
        self.device = device
        groups = make_groups(seed)
        self.blocks = [block for group in groups.values() for block in group]
        self.reference = [block for group in make_groups(seed).values() for block in group]
        in_place = [block.layers[0] for block in self.blocks[::2]] if seed == 2 else []
        in_file = mapped_copies([layer.weight for layer in in_place]) if in_place else []
        self.streamer = streamer_class(
            groups, {layer: {"weight": part} for layer, part in zip(in_place, in_file, strict=True)}
        )
        self.layers = [layer for block in self.blocks for layer in block.layers]
        self.reference_layers = [layer for block in self.reference for layer in block.layers]
        for layer in self.layers:
            layer.device = device
        self.pending = []
        self.calls = 0
        self.started = None

    def start(self, double=0, single=0, staging=1200):
        self.started = (double, single, staging)
        self.streamer.start(
            plan_by_counts(self.streamer.sizes(), {"double": double, "single": single}, staging), self.device
        )

    def stop(self):
        self.started = None
        self.streamer.stop()

    def set_extras(self, rows):
        """Give the n-th layer an extra tensor of so many rows, the others none; large ones of as many rows are kept."""
        before = {id(layer): layer.extra for layer in self.reference_layers if hasattr(layer, "extra")}
        extras = {}
        rows = [*rows, *[0] * len(self.layers)]
        for layer, reference, count in zip(self.layers, self.reference_layers, rows, strict=False):
            if hasattr(reference, "extra"):
                del reference.extra
            if count:
                kept = before.get(id(reference))
                is_kept = kept is not None and len(kept) == count and count > 8
                reference.extra = kept if is_kept else torch.full((count, 4), float(self.calls % 7 + count))
                extras[layer] = {"extra": reference.extra}
        self.streamer.set_extras(extras)
        if self.started is not None:
            self.start(*self.started)

    def forward(self, order=None, stop_at=None, stop_before=0):
        """Run blocks in ``order`` (all by default); at the ``stop_at``-th call raise before a layer."""
        if self.streamer.plan is None:
            self.start()
        self.calls += 1
        x = Value(torch.arange(4.0) + self.calls)
        expected = Value(x.tensor)
        try:
            for step, index in enumerate(range(len(self.blocks)) if order is None else order):
                x = self.blocks[index](x, stop_before if step == stop_at else None)
                expected = self.reference[index](expected)
        except InterruptedError:
            return
        self.pending.append((x, expected.tensor))

    def check(self):
        self.device.synchronise()
        for x, expected in self.pending:
            assert torch.equal(x.tensor, expected), "the streamed model computed something else"
        self.pending.clear()
        plan = self.streamer.plan
        assert self.streamer.device_bytes == (0 if plan is None else plan.device_bytes)


def exercise(streamer_class, seed, steps=25):
    """Random steps with two models on one device; raises AssertionError where a byte is wrong."""
    rng = random.Random(seed)
    device = SimulatedDevice(seed)
    models = [StreamedModel(streamer_class, device, seed=1), StreamedModel(streamer_class, device, seed=2)]
    count = len(models[0].blocks)
    for _ in range(steps):
        model = rng.choice(models)
        action = rng.randrange(10)
        if action < 3:
            model.forward()
        elif action == 3:
            model.forward(stop_at=rng.randrange(count), stop_before=rng.randrange(2))
        elif action == 4:
            model.forward(order=[rng.randrange(count) for _ in range(rng.randrange(1, 12))])
        elif action == 5:
            double, single = rng.choice(((0, 0), (0, 0), (rng.randrange(4), rng.randrange(6))))
            model.start(double, single, rng.choice((0, 1200, 2000)))
        elif action == 6:
            model.stop()
        elif action == 7:
            model.set_extras([rng.choice((0, 2, 12, 20)) for _ in model.layers])
        elif action == 8:
            model.check()
            models[models.index(model)] = StreamedModel(
                streamer_class, device, seed=3
            )  # and let go, with copies under way
        else:
            model.check()
    for staging in (1200, 2000, 0):
        for model in models:
            model.start(staging=staging)
            model.forward()
    for model in (*models, *models):
        model.stop()  # with copies under way
        model.start(staging=1200)  # in a ring that the other one's compute still reads
        model.forward()
    for model in models:
        model.stop()
    for model in models:
        model.check()
