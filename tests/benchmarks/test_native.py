"""ComfyUI's native formats in the comparison: made from the same weights, and the same picture streamed or not."""

import comfy.sd
import pytest
from cases import TINY_CASES
from contenders import CONTENDERS, Options, family_maker
from family import Unavailable
from native_files import has_formats
from random_lora import linear_shapes
from turn import Effort, take_turn

HAS_FORMATS = has_formats()
NAMES = [
    contender.name for contender in CONTENDERS if contender.name.startswith(("comfy-int8", "comfy-w4", "comfy-nv"))
]


@pytest.mark.skipif(HAS_FORMATS, reason="this ComfyUI has the formats")
def test_a_comfyui_without_them_says_so(tiny_files):
    with pytest.raises(Unavailable, match="needs a ComfyUI with comfy-kitchen"):
        family_maker("comfy-int8", Options(tiny_files))()


@pytest.mark.skipif(not HAS_FORMATS, reason="this ComfyUI has no formats of its own")
@pytest.mark.parametrize("kind", ["int8", "w4a8", "nvfp4"])
def test_a_tiny_file_is_read_in_its_format(kind, tiny_files):
    """Both ways to run an int8 file agree on its plain integers, too: equal pictures do not show it."""
    from comfy.quant_ops import QuantizedTensor  # where the formats are

    model = comfy.sd.load_diffusion_model(str(tiny_files.native(kind))).model.diffusion_model
    assert all(isinstance(block.img_attn.qkv.weight, QuantizedTensor) for block in model.double_blocks)


@pytest.mark.skipif(not HAS_FORMATS, reason="this ComfyUI has no formats of its own")
@pytest.mark.parametrize("kind", ["int8", "w4a8", "nvfp4"])
def test_a_lora_for_it_has_the_shapes_of_the_layers(kind, tiny_files):
    """Where weights are packed a state dict has others, and ComfyUI and this package leave such a LoRA out."""
    dense = linear_shapes(family_maker("comfy-bf16", Options(tiny_files))()._patcher.model)
    family = family_maker(f"comfy-{kind}", Options(tiny_files))()
    assert linear_shapes(family._patcher.model) == linear_shapes(family._streamed_once().model) == dense
    assert len(dense) > 20


@pytest.mark.skipif(not HAS_FORMATS, reason="this ComfyUI has no formats of its own")
@pytest.mark.parametrize("kind", ["int8", "w4a8", "nvfp4"])
@pytest.mark.parametrize("case", ["tiny", "tiny-lora"])
def test_streamed_makes_the_picture_that_comfyui_makes(kind, case, tiny_files, tmp_path):
    assert f"comfy-{kind}-streamed" in NAMES
    family = family_maker(f"comfy-{kind}", Options(tiny_files))()
    chosen = next(one for one in TINY_CASES if one.name == case)
    figures = [
        take_turn(family, setting, name, chosen, Effort(2, 0.01), tmp_path)
        for setting, name in (("automatic", "comfy-bf16"), ("streamed", "streamed"))
    ]
    error = figures[1].difference.relative_error
    if case == "tiny":
        assert error == 0.0
    else:  # stock ComfyUI quantises the patched weights once more, NVFP4 coarsely
        assert 0 < error < 0.3
