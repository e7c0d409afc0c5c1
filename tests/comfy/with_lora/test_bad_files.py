"""A bad LoRA: what does not fit is skipped and named, and the rest of it works."""

import functools
import logging

import comfy.model_patcher
import loras
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter

from flux_nf4.offload.comfyui import lora_reader
from flux_nf4.offload.comfyui.lora_reader import leave_out_half_pairs

BAD = "diffusion_model.double_blocks.0.img_mlp.0"
SHAPE = (1024, 256)


def replaced(file, ending, change):
    """``file`` with what ``change`` makes of the tensor of ``BAD`` whose name ends so."""
    (name,) = [name for name in file if name.startswith(BAD) and name.endswith(ending)]
    return file | {name: change(file[name])}


def with_value(value):
    def change(tensor):
        changed = tensor.clone()
        changed.view(-1)[7] = value
        return changed

    return change


@pytest.fixture
def with_lora(with_lora):
    """And the next node: the log tells of a single patch when the model goes on."""
    return lambda *given: with_lora(*given).clone()


@pytest.fixture
def log(caplog):
    """A function: what this package has said at a level and above."""
    caplog.set_level(logging.INFO)

    def messages(level):
        return [r.getMessage() for r in caplog.records if r.levelno >= level and r.getMessage().startswith("LoRA: ")]

    return messages


CASES = {
    "an output that is too small": (".lora_B.weight", lambda up: up[:-1], "shape '[1024, 256]' is invalid"),
    "an input that is too large": (".lora_A.weight", lambda down: torch.cat([down, down], 1), "is invalid for input"),
    "halves of other ranks": (".lora_A.weight", lambda down: down[:-1], "same reduction dim"),
    "no rank": (".lora_A.weight", lambda down: down[:0], "an empty tensor of shape (0, 256)"),
    "NaN": (".lora_B.weight", with_value(float("nan")), "values that are not finite"),
    "infinity in fp16": (".lora_A.weight", lambda down: with_value(float("inf"))(down.half()), "not finite"),
    "NaN in float8": (
        ".lora_A.weight",
        lambda down: with_value(float("nan"))(down).to(torch.float8_e4m3fn),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_that_does_not_fit_is_skipped_and_named(case, load, shapes, with_lora, log):
    ending, change, reason = CASES[case]
    patched = with_lora(load(), replaced(loras.generic(shapes), ending, change), 0.5)
    (message,) = log(logging.WARNING)
    assert message.startswith(f"LoRA: {len(shapes) - 1} patches applied at strength 0.5, 1 skipped: {BAD}.weight (")
    assert reason in message
    assert patched.patches.keys() == {f"diffusion_model.{name}.weight" for name in shapes} - {f"{BAD}.weight"}


OTHER_KINDS = {
    "loha": ".hada_w1_a",
    "lokr": ".lokr_w2",
    "glora": ".b1.weight",
    "oft": ".oft_blocks",
    "oft with a constraint": ".oft_blocks",
    "boft": ".rescale",
    "dora": ".lora_up.weight",
    "difference": ".diff",
    "set": ".set_weight",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_so_is_one_of_any_other_kind(kind, load, with_lora, log):
    file = loras.adapters(BAD, SHAPE)[kind]
    fitting = with_lora(load(), file).patches
    (message,) = log(logging.INFO)
    assert message == f"LoRA: {len(fitting)} patches applied at strength 1, all that ComfyUI recognised for this model"
    patched = with_lora(load(), replaced(file, OTHER_KINDS[kind], lambda tensor: tensor[:-1].contiguous()))
    message = log(logging.WARNING)[0]
    assert f"{len(patched.patches)} patches applied at strength 1, 1 skipped: {BAD}.weight (" in message
    assert len(patched.patches) == len(fitting) - 1


def test_a_pair_without_its_lower_half_is_skipped_and_named(load, twin, shapes, with_lora, log):
    """ComfyUI's own reader stops there: for streamed models it does not, for others it still does."""
    file = loras.generic(shapes)
    del file[f"{BAD}.lora_A.weight"]
    rest = {f"diffusion_model.{name}.weight" for name in shapes} - {f"{BAD}.weight"}
    assert with_lora(load(), file).patches.keys() == rest
    assert log(logging.WARNING) == [
        f"LoRA: the file lacks {BAD}.lora_A.weight, so the layer that it is for stays unchanged"
    ]
    with pytest.raises(KeyError, match="lora_A"):
        with_lora(twin, file)
    assert len(with_lora(load(), loras.generic(shapes)).patches) == len(rest) + 1


@pytest.fixture
def reader(monkeypatch):
    """A function: has ComfyUI read pairs by this function for the rest of the test."""

    def set_to(load):
        monkeypatch.setattr(LoRAAdapter, "load", load)

    return set_to


def raises(cls, layer, file):
    return file[f"{layer}.up"], file[f"{layer}.down"]


def test_a_reader_that_another_package_has_wrapped_is_wrapped_once_more_and_once_only(reader, load):
    @functools.wraps(raises)
    def of_another_package(*arguments):
        return raises(*arguments)

    model = load()
    reader(classmethod(of_another_package))
    for _ in range(2):
        leave_out_half_pairs(model.model)
        assert LoRAAdapter.load("layer", {"layer.up": 1}) is None
        assert LoRAAdapter.load("layer", {"layer.up": 1, "layer.down": 2}) == (1, 2)
    assert LoRAAdapter.load.__func__.__wrapped__ is of_another_package


def test_without_streamed_models_the_reader_is_comfyuis(reader, monkeypatch):
    monkeypatch.setattr(lora_reader, "_streamed", set())
    comfyuis = classmethod(raises)
    reader(comfyuis)
    one, two = (torch.nn.Linear(1, 1) for _ in range(2))
    leave_out_half_pairs(one)
    leave_out_half_pairs(two)
    del one
    assert LoRAAdapter.__dict__["load"] is not comfyuis
    del two
    assert LoRAAdapter.__dict__["load"] is comfyuis


def test_a_reader_that_was_wrapped_after_ours_is_left_alone(reader, monkeypatch):
    monkeypatch.setattr(lora_reader, "_streamed", set())
    reader(classmethod(raises))
    model = torch.nn.Linear(1, 1)
    leave_out_half_pairs(model)
    ours = LoRAAdapter.load
    wrapped = classmethod(lambda cls, *given: ours(*given))
    reader(wrapped)
    del model
    assert LoRAAdapter.__dict__["load"] is wrapped


def test_a_reader_that_is_no_method_is_left_alone(reader):
    reader(staticmethod(lambda *_: "its own"))
    leave_out_half_pairs(torch.nn.Linear(1, 1))
    assert LoRAAdapter.load("layer", {}) == "its own"


@pytest.mark.parametrize("error", [KeyError("a table of its own"), KeyError(), KeyError("layer.up")])
def test_another_missing_key_is_still_an_error(error, reader):
    def raises(cls, layer, file):
        raise error

    class ForStreamed(comfy.model_patcher.ModelPatcher):
        def __init__(self):
            self.model = torch.nn.Linear(1, 1)
            self.model.streaming = None

        def __del__(self):
            pass

    reader(classmethod(raises))
    patcher = ForStreamed()  # what reads the file has one among its variables
    leave_out_half_pairs(patcher.model)
    with pytest.raises(KeyError) as raised:
        LoRAAdapter.load("layer", {"layer.up": 1})
    assert raised.value is error


UNKNOWN = {
    "a missing upper half": lambda file: {
        name: tensor for name, tensor in file.items() if name != f"{BAD}.lora_B.weight"
    },
    "a layer that the model lacks": lambda file: {
        name.replace(BAD, f"{BAD}9"): tensor for name, tensor in file.items()
    },
    "an adapter of an unknown kind": lambda file: {
        name.replace(f"{BAD}.lora_", f"{BAD}.rotated_"): tensor for name, tensor in file.items()
    },
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_comfyui_does_not_take_for_a_patch_it_names_and_the_others_work(
    case, load, shapes, with_lora, caplog, log
):
    """Its loader drops them before this package sees the file."""
    file = loras.generic(shapes)
    patched = with_lora(load(), UNKNOWN[case](file))
    assert patched.patches.keys() == {f"diffusion_model.{name}.weight" for name in shapes} - {f"{BAD}.weight"}
    assert any(f"lora key not loaded: {BAD}" in message for message in caplog.messages)
    (message,) = log(logging.INFO)
    assert f"{len(shapes) - 1} patches applied at strength 1, all that ComfyUI recognised" in message


def test_a_kind_that_comfyui_does_not_know_is_skipped_and_named(load, log):
    patcher = load().clone()
    assert patcher.add_patches({f"{BAD}.weight": ("rotation", (torch.ones(SHAPE),))}) == []
    patcher.clone()
    (message,) = log(logging.WARNING)
    assert f"{BAD}.weight (patch type not recognized rotation)" in message


def test_many_that_do_not_fit_are_counted_and_the_first_named(load, shapes, with_lora, log):
    wrong = {name: (rows + 8, columns) for name, (rows, columns) in shapes.items()}
    with_lora(load(), loras.generic(wrong))
    (message,) = log(logging.WARNING)
    assert f"LoRA: 0 patches applied at strength 1, {len(shapes)} skipped: diffusion_model.double_blocks.0." in message
    assert message.count("diffusion_model.") == 4
    assert message.endswith(f"and {len(shapes) - 4} more")


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "diffusion_model.blocks.0.cross_attn.k",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ],
    ids=["SD 1.5", "SDXL", "Wan", "text encoder"],
)
def test_a_lora_of_another_model_changes_nothing_and_says_so(key, load, with_lora, log):
    file = {f"{key}.lora_up.weight": torch.ones(64, 4), f"{key}.lora_down.weight": torch.ones(4, 64)}
    patched = with_lora(load(), file)
    (message,) = log(logging.WARNING)
    assert "none of its keys belongs to this model" in message
    assert not patched.patches


def test_a_lora_that_comes_after_one_that_widens_a_layer_must_fit_the_wider_one(load, twin_model, with_lora, log):
    widened = with_lora(load(), loras.black_forest_labs(twin_model))
    wide, narrow = (loras.generic({"img_in": (256, columns)}) for columns in (128, 64))
    with_lora(widened, narrow)
    assert "diffusion_model.img_in.weight (ERROR lora shape" in log(logging.WARNING)[-1]
    with_lora(widened, wide)
    assert log(logging.INFO)[-1] == "LoRA: 1 patches applied at strength 1, all that ComfyUI recognised for this model"


def test_the_other_messages_of_the_log_are_kept(load, shapes, with_lora, caplog):
    with_lora(load(), loras.generic(shapes))
    logging.warning("still here")
    assert "still here" in caplog.text


@pytest.mark.parametrize("ending", [".dora_scale", ".alpha"])
def test_a_magnitude_of_another_layer_and_an_alpha_that_is_no_number_are_named(ending, load, with_lora, log):
    name = "double_blocks.1.img_mlp.0"
    file = loras.kohya({name: (1024, 256)})
    (key,) = {key.split(".")[0] for key in file}
    file[key + ending] = torch.ones(7, 1) if ending == ".dora_scale" else torch.tensor(float("nan"))
    patcher = with_lora(load(), file)
    assert not patcher.patches
    assert "1 skipped: diffusion_model.double_blocks.1.img_mlp.0.weight" in log(logging.WARNING)[-1]
