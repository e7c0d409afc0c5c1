"""What other packages put into a forward: here each gives something else each time that it is called.

They are not in a test's own file, because pytest calls those of ComfyUI ``comfy.test_...``, as if they were its own.
"""

import functools
from unittest import mock

import comfy.ldm.flux.layers
import comfy.ldm.flux.model
import comfy.patcher_extension
import pytest
from torch import nn

_calls = [0]


def begin_to_count():
    _calls[0] = 0


def counting():
    _calls[0] += 1
    return 1 + _calls[0] / 8


def scaled(method):
    """In place of a method: what another package writes."""

    def other(*args, **given):
        return method(*args, **given) * counting()

    return other


def wrapped(executor, *args, **kwargs):
    return executor(*args, **kwargs) * counting()


def a_wrapper_of_the_model(patcher, _):
    patcher.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, wrapped)


def a_wrapper_of_the_transformer(patcher, _):
    patcher.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapped)


def a_wrapper_of_the_prediction(patcher, _):
    patcher.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, wrapped)


def a_patch_in_a_block(patcher, _):
    patcher.set_model_patch_replace(lambda args, extra: {"img": args["img"] * counting()}, "dit", "single_block", 1)


def a_patch(patcher, _):
    if not hasattr(patcher, "set_model_post_input_patch"):
        pytest.skip("this ComfyUI has no such patches")
    patcher.set_model_post_input_patch(lambda given: {**given, "img": given["img"] * counting()})


def an_attention_override(patcher, _):
    options = patcher.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda attention, *args, **given: attention(*args, **given) * counting()


def a_wrapper_of_the_function(patcher, _):
    patcher.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * counting()
    )


def another_forward(_, monkeypatch):
    kind = comfy.ldm.flux.model.Flux
    monkeypatch.setattr(kind, "forward_orig", scaled(kind.forward_orig))


def another_forward_that_says_it_is_comfyuis(_, monkeypatch):
    kind = comfy.ldm.flux.layers.SingleStreamBlock
    monkeypatch.setattr(kind, "forward", functools.wraps(kind.forward)(scaled(kind.forward)))


def another_forward_that_says_nothing(_, monkeypatch):
    kind = comfy.ldm.flux.model.Flux
    method = kind.forward_orig
    monkeypatch.setattr(kind, "forward_orig", mock.create_autospec(method, side_effect=scaled(method)))


def something_else_in_the_place_of_a_method(_, monkeypatch):
    kind = comfy.ldm.flux.layers.LastLayer
    forward = kind.forward

    class Method:
        def __get__(self, module, _):
            return functools.partial(scaled(forward), module)

        def __call__(self, *args):
            return scaled(forward)(*args)

    monkeypatch.setattr(kind, "forward", Method())


def another_forward_of_this_model(patcher, monkeypatch):
    transformer = patcher.model.diffusion_model
    monkeypatch.setattr(transformer, "forward_orig", scaled(transformer.forward_orig))


def another_forward_of_a_layer(patcher, monkeypatch):
    layer = patcher.model.diffusion_model.img_in
    monkeypatch.setattr(layer, "forward", scaled(layer.forward), raising=False)


def another_attention(_, monkeypatch):
    layers = comfy.ldm.flux.layers
    monkeypatch.setattr(layers, "attention", scaled(layers.attention))


def another_apply_model(patcher, monkeypatch):
    kind = next(kind for kind in type(patcher.model).__mro__ if "_apply_model" in vars(kind))
    monkeypatch.setattr(kind, "_apply_model", scaled(kind._apply_model))


def a_hook(patcher, _):
    return patcher.model.diffusion_model.register_forward_hook(lambda module, args, output: output * counting())


def a_hook_of_a_layer(patcher, _):
    layer = patcher.model.diffusion_model.single_blocks[0].linear2
    return layer.register_forward_hook(lambda module, args, output: output * counting())


def a_hook_before_a_layer(patcher, _):
    layer = patcher.model.diffusion_model.single_blocks[0].linear2
    return layer.register_forward_pre_hook(lambda module, args: (args[0] * counting(),))


def a_hook_of_all_modules(*_):
    def hook(module, args, output):
        return output * counting() if isinstance(module, comfy.ldm.flux.layers.LastLayer) else None

    return nn.modules.module.register_module_forward_hook(hook)


def another_class(patcher, monkeypatch):
    block = patcher.model.diffusion_model.single_blocks[1]

    class Other(type(block)):
        forward = scaled(type(block).forward)

    monkeypatch.setattr(block, "__class__", Other)


def another_block(patcher, monkeypatch):
    class Other(nn.Module):
        def forward(self, img, *args, **given):
            return img * counting()

    monkeypatch.setattr(patcher.model.diffusion_model, "single_blocks", nn.ModuleList([Other()]))


def an_object_patch(patcher, _):
    class Other(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(ids) * counting()

    patcher.add_object_patch("diffusion_model.pe_embedder", Other(patcher.model.diffusion_model.pe_embedder))


def a_wrapper_of_a_weight(patcher, _):
    if not hasattr(patcher, "add_weight_wrapper"):
        pytest.skip("this ComfyUI has no such wrappers")
    patcher.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight * counting())


INTRUDERS = (
    a_wrapper_of_the_model,
    a_wrapper_of_the_transformer,
    a_wrapper_of_the_prediction,
    a_patch_in_a_block,
    a_patch,
    an_attention_override,
    a_wrapper_of_the_function,
    another_forward,
    another_forward_that_says_it_is_comfyuis,
    another_forward_that_says_nothing,
    something_else_in_the_place_of_a_method,
    another_forward_of_this_model,
    another_forward_of_a_layer,
    another_attention,
    another_apply_model,
    a_hook,
    a_hook_of_a_layer,
    a_hook_before_a_layer,
    a_hook_of_all_modules,
    another_class,
    another_block,
    an_object_patch,
    a_wrapper_of_a_weight,
)
"""Each takes a patcher and a `MonkeyPatch`, and returns a hook's handle if it has registered one."""
