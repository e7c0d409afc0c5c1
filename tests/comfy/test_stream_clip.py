"""The nodes that stream text encoders: any CLIP, with all that ComfyUI's nodes do to one, gives ComfyUI's bits."""

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from nodes import CLIPSetLastLayer
from safetensors.torch import load_file
from tiny_encoders import CLIP_L, T5, TINY, dense_twin, for_comfyui, make_small, save, save_clip_l, save_t5, tokens_of

from flux_nf4.offload.comfyui import dense_patches
from flux_nf4.offload.comfyui.clip import StreamedClip, stream_clip
from flux_nf4.offload.comfyui.large_layers import HostEmbedding
from flux_nf4.offload.plan import Residency

QWEN3 = next(tiny for tiny in TINY if tiny.clip_type == "lumina2")
DUAL = {"l": [[(1, 1.0)] * 77], "t5xxl": [[(3, 1.0), (14, 1.2), (159, 1.0), (1, 1.0)]]}


@pytest.fixture(params=["fp32", "bf16", "fp8"])
def dtype(request):
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[request.param]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A dense Qwen3 4B by ComfyUI's names."""
    return dense_twin(save(QWEN3, tmp_path_factory.mktemp("qwen3")))


@pytest.fixture
def clip(twin, dtype, monkeypatch):
    """ComfyUI's own CLIP with one text encoder."""
    if not QWEN3.is_known:
        pytest.skip("this ComfyUI has no Qwen3 4B")
    make_small(monkeypatch, QWEN3)
    state = {name: tensor.to(dtype) for name, tensor in for_comfyui(QWEN3, twin).items()}
    return comfy.sd.load_text_encoder_state_dicts([state], clip_type=comfy.sd.CLIPType.LUMINA2)


@pytest.fixture
def dual(tmp_path, monkeypatch):
    """ComfyUI's own CLIP with CLIP-L and T5."""
    monkeypatch.setattr("comfy.model_management.text_encoder_dtype", lambda *_, **__: torch.float32)
    options = {"t5xxl_model_config": dict(T5, num_layers=2), "model_config": dict(CLIP_L)}
    options["clip_l_model_config"] = dict(CLIP_L)
    states = [load_file(save_clip_l(tmp_path)), dense_twin(save_t5(tmp_path))]
    return comfy.sd.load_text_encoder_state_dicts(states, clip_type=comfy.sd.CLIPType.FLUX, model_options=options)


def lora_for(clip):
    """For every large weight of its first layers."""
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for name, tensor in clip.patcher.model_state_dict().items():
        if tensor.dim() == 2 and name.endswith(".weight") and ".0." in name:
            rows, columns = tensor.shape
            path = f"text_encoders.{name.removesuffix('.weight')}"
            lora[f"{path}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 10
            lora[f"{path}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 10
    assert lora
    return lora


def with_lora(clip):
    return comfy.sd.load_lora_for_models(None, clip, lora_for(clip), 0, 0.7)[1]


def lora_on_embedding(clip):
    """Of rank 4, and the name of the weight."""
    (name,) = [name for name in clip.patcher.model_state_dict() if name.endswith("embed_tokens.weight")]
    rows, columns = clip.patcher.model.get_parameter(name).shape
    generator = torch.Generator().manual_seed(3)
    path = f"text_encoders.{name.removesuffix('.weight')}"
    lora = {f"{path}.lora_up.weight": torch.randn(rows, 4, generator=generator)}
    return lora | {f"{path}.lora_down.weight": torch.randn(4, columns, generator=generator) / 10}, name


def with_lora_on_embedding(clip):
    return comfy.sd.load_lora_for_models(None, clip, lora_on_embedding(clip)[0], 0, 0.7)[1]


def with_difference_on_embedding(clip):
    _, name = lora_on_embedding(clip)
    clone = clip.clone()
    difference = torch.ones(clone.patcher.model.get_parameter(name).shape) / 4
    assert clone.patcher.add_patches({name: ("diff", (difference,))}, 0.5)
    return clone


def with_hook(clip):
    hooks = comfy.hooks.create_hook_lora(lora_for(clip), 0, 0.6)
    return SetClipHooks().apply_hooks(clip, schedule_clip=False, apply_to_conds=False, hooks=hooks)[0]


def with_last_layer(clip):
    is_dual = hasattr(clip.cond_stage_model, "t5xxl")
    return CLIPSetLastLayer().set_last_layer(clip, -2 if is_dual else -3)[0]


ACTS = {"nothing": lambda clip: clip, "LoRA": with_lora, "hook": with_hook, "last layer": with_last_layer}
ON_EMBEDDING = {"LoRA": with_lora_on_embedding, "difference": with_difference_on_embedding}


def encoded(clip, tokens=None):
    with torch.inference_mode():
        got = clip.encode_from_tokens(tokens or tokens_of("qwen3_4b"), return_dict=True)
    return {name: value.clone() for name, value in got.items() if isinstance(value, torch.Tensor)}


def same(got, wanted):
    assert wanted["cond"].std() > 0.01
    return got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def streamed(clip, budget):
    """Within the least budget (0), or automatic (None)."""
    found = stream_clip(clip, Residency(), None)
    return found if budget is None else stream_clip(found, Residency(budget_bytes=found.patcher.model_size()), None)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("budget", [0, None])
def test_what_nodes_do_to_it_before_or_after_is_the_same(act, budget, clip, clip_copies):
    do = ACTS[act]
    plain, wanted = encoded(clip), encoded(do(clip))
    assert same(plain, wanted) == (act == "nothing")
    for order in (lambda: do(streamed(clip, budget)), lambda: streamed(do(clip), budget)):
        ours = order()
        assert isinstance(ours, StreamedClip)
        got = encoded(ours)
        assert same(got, wanted)
        streaming = ours.patcher.model.streaming.streamer
        assert bool(streaming.plan.streamed) == (budget is not None)
    assert same(encoded(clip), plain), "the CLIP that it came from stays as it was"
    assert not isinstance(clip, StreamedClip)


@pytest.mark.parametrize("act", ON_EMBEDDING)
@pytest.mark.parametrize("budget", [0, None])
def test_patches_of_a_large_embedding_stay_in_host_memory(act, budget, clip, clip_copies):
    do = ON_EMBEDDING[act]
    plain, wanted = encoded(clip), encoded(do(clip))
    assert not same(plain, wanted)
    ours = do(streamed(clip, budget))
    assert same(encoded(ours), wanted)
    streaming = ours.patcher.model.streaming
    assert streaming.patching.device_bytes == 0
    embedding = next(module for module in ours.patcher.model.modules() if isinstance(module, HostEmbedding))
    ids = torch.tensor([[5, 5, 0, 17]])
    assert torch.equal(embedding.look_up(ids, out_dtype=torch.float32), embedding(ids, out_dtype=torch.float32))
    assert not torch.equal(embedding.weight, embedding._parameters["weight"])
    assert same(encoded(streamed(clip, budget)), plain)


def test_lora_on_a_large_embedding_takes_the_device_some_rows_at_a_time(clip, clip_copies, dtype, monkeypatch):
    whole = encoded(with_lora_on_embedding(clip))["cond"]
    sizes = []
    copied = dense_patches.patched_copy
    monkeypatch.setattr(dense_patches, "PIECE_BYTES", 40_000)
    monkeypatch.setattr(dense_patches, "patched_copy", lambda *args: (sizes.append(args[0].numel()), copied(*args))[1])
    ours = encoded(with_lora_on_embedding(streamed(clip, 0)))["cond"]
    assert len(sizes) > 5
    assert max(sizes) <= 10_000
    # Each piece is rounded at random to the weight's dtype as ComfyUI does it, but not by the same numbers.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float8_e4m3fn: 0.3}[dtype]
    assert (ours - whole).norm() < tolerance * whole.norm()
    assert (ours - encoded(clip)["cond"]).norm() > 2 * (ours - whole).norm()


@pytest.mark.parametrize("as_hook", [False, True])
def test_a_patched_embedding_takes_ram_and_its_weight_leaves_the_device(as_hook, clip, clip_copies):
    ours = streamed(clip, None)
    patcher, large = ours.patcher, ours.patcher.model.large_layers
    encoded(ours)
    nbytes, ram, held = large.device_bytes, patcher.get_ram_usage(), patcher.loaded_size()
    assert nbytes > 0
    if as_hook:
        hooks = comfy.hooks.create_hook_lora(lora_on_embedding(clip)[0], 0, 0.6)
        patched = SetClipHooks().apply_hooks(ours, schedule_clip=False, apply_to_conds=False, hooks=hooks)[0]
    else:
        patched = with_lora_on_embedding(ours)
    encoded(patched)
    (embedding,) = large.layers
    assert large.device_bytes == 0
    assert patched.patcher.loaded_size() == held - nbytes
    if not as_hook:  # whose copy goes when the prompt is encoded
        assert embedding.weight is not embedding._parameters["weight"]
        assert patched.patcher.get_ram_usage() == ram + embedding.weight.nbytes == ram + nbytes
    encoded(ours)
    assert (large.device_bytes, patcher.get_ram_usage(), patcher.loaded_size()) == (nbytes, ram, held)


@pytest.mark.parametrize("act", ACTS)
def test_of_several_encoders_all_are_streamed(act, dual, clip_copies):
    do = ACTS[act]
    wanted = encoded(do(dual), DUAL)
    ours = do(streamed(dual, 0))
    assert same(encoded(ours, DUAL), wanted)
    streamer = ours.patcher.model.streaming.streamer
    assert {size.kind for size in streamer.sizes()} == {"clip_l", "t5xxl"}
    assert len(streamer.plan.streamed) == 4
    assert same(encoded(do(dual), DUAL), wanted)


@pytest.mark.skipif(not hasattr(comfy.sd.CLIP, "generate"), reason="this ComfyUI's CLIP writes no text")
@pytest.mark.parametrize("budget", [0, None])
def test_it_writes_the_same_text(budget, clip, clip_copies):
    def written(clip):
        with torch.inference_mode():
            return clip.generate(tokens_of("qwen3_4b"), do_sample=False, max_length=4)

    wanted = written(clip)
    assert len(wanted) == 4
    assert written(streamed(clip, budget)) == wanted


def test_a_change_of_the_budget_reads_and_copies_nothing_anew(clip, clip_copies):
    first = streamed(clip, 0)
    wanted = encoded(first)
    again = stream_clip(clip, Residency(), None)
    assert again.patcher.model is first.patcher.model
    assert same(encoded(again), wanted)
    assert not first.patcher.model.streaming.streamer.plan.streamed


def test_out_of_memory_gives_the_residents_up_and_encodes_once_more(clip, clip_copies):
    ours = streamed(clip, None)
    wanted = encoded(ours)
    streamer = ours.patcher.model.streaming.streamer
    assert streamer.plan.resident
    failures = [torch.OutOfMemoryError("fake")]

    def fail(*_):
        if failures:
            raise failures.pop()

    handle = streamer.blocks[1].module.register_forward_pre_hook(fail)
    assert same(encoded(ours), wanted)
    handle.remove()
    assert not streamer.plan.resident


def test_comfyui_may_say_which_patcher_runs_it(clip, clip_copies):
    """As it does before and after each sampling, for any model that has such an attribute."""
    ours = streamed(clip, 0)
    wanted = encoded(ours)
    model, patcher = ours.patcher.model, ours.patcher
    other = patcher.clone()
    other.pre_run()
    assert model.current_patcher is other
    other.cleanup()
    assert model.current_patcher is other
    patcher.pre_run()
    assert model.current_patcher is patcher
    assert same(encoded(ours), wanted)


def test_what_cannot_be_done_to_it_is_refused_with_the_nodes_for_text_encoders(clip, clip_copies):
    ours, other = streamed(clip, 0), clip.patcher.get_key_patches()
    saving = "cannot be saved by this node.* Quantise Text Encoder to NF4 and Save; .* connect the CLIP from before"
    with pytest.raises(ValueError, match=saving):
        ours.get_sd()
    with pytest.raises(ValueError, match=saving):
        with_lora(ours).patcher.partially_load(torch.device("cpu"), 0, force_patch_weights=True)
    with pytest.raises(ValueError, match=r"Quantise Text Encoder to NF4 and Save\) .* Stream Text Encoder\)"):
        ours.patcher.add_patches({key: other[key] for key in list(other)[:1]}, 0.5, 0.5)


def test_a_small_budget_is_not_too_small_after_all_of_it_was_resident(clip, clip_copies):
    whole = stream_clip(clip, Residency(), None)
    least = whole.patcher.model_size()
    whole.patcher.load(torch.device("cpu"), 0)
    assert whole.patcher.model.large_layers.device_bytes
    small = stream_clip(clip, Residency(budget_bytes=least), None)
    small.patcher.load(torch.device("cpu"), least + 1)
    assert small.patcher.loaded_size() <= least


def test_patches_for_the_model_beside_it_are_no_news(clip, clip_copies, caplog):
    ours = streamed(clip, 0)
    of_model = {f"diffusion_model.{name}.weight": ("diff", (torch.zeros(1),)) for name in "xy"}
    assert ours.patcher.add_patches(of_model, 1.0) == []
    assert not ours.patcher.patches
    assert not caplog.records


def test_what_hooks_had_put_on_the_device_leaves_it(clip, clip_copies):
    ours = streamed(clip, None)
    patcher, patching = ours.patcher, ours.patcher.model.streaming.patching
    key = next(name for name, tensor in patcher.model.named_parameters() if name.endswith("norm.weight"))
    patcher.add_patches({key: ("diff", (torch.ones_like(patcher.model.get_parameter(key)),))}, 1.0)
    patcher.load(torch.device("cpu"), 0)
    assert patching.device_bytes
    patcher.current_hooks = comfy.hooks.HookGroup()
    patcher.unpatch_model(torch.device("cpu"))
    assert not patching.device_bytes


def test_large_layers_take_ram_wherever_they_are(clip, clip_copies):
    patcher = stream_clip(clip, Residency(), None).patcher
    patcher.load(torch.device("cpu"), patcher.model_size() + 1)
    left_out = patcher.get_ram_usage()
    assert not patcher.model.large_layers.device_bytes
    patcher.load(torch.device("cpu"), 0)
    assert patcher.model.large_layers.device_bytes
    assert patcher.get_ram_usage() == left_out
    assert left_out > patcher.model.large_layers.device_bytes + patcher.model.streaming.streamer.ram_bytes


def test_it_asks_for_what_it_needs_and_takes_what_is_free(clip, clip_copies):
    ours = stream_clip(clip, Residency(), None)
    patcher, streamer = ours.patcher, ours.patcher.model.streaming.streamer
    needed = patcher.model_size()
    assert needed < streamer.host_bytes / 2
    patcher.load(torch.device("cpu"), needed + 1)
    assert patcher.loaded_size() <= needed
    assert len(streamer.plan.streamed) == len(streamer.blocks)
    patcher.load(torch.device("cpu"), 0)
    assert not streamer.plan.streamed
    whole = patcher.loaded_size()
    large = patcher.model.large_layers
    nbytes = large.device_bytes
    assert nbytes == large.nbytes_of(large.layers) > 0
    assert patcher.partially_unload(torch.device("cpu"), 1) == nbytes
    assert patcher.loaded_size() == whole - nbytes
    assert not streamer.plan.streamed
    freed = patcher.partially_unload(torch.device("cpu"), 50_000)
    assert freed >= 50_000
    assert patcher.loaded_size() == whole - nbytes - freed
    assert streamer.plan.streamed
    patcher.detach()
    assert streamer.plan is None


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_forward_has_room_for_its_widest_weight_in_fp32_twice(kept, clip, clip_copies, dtype, monkeypatch):
    """``kept``: how many times ComfyUI leaves room for that anyway."""
    patcher = stream_clip(clip, Residency(), None).patcher
    streamer = patcher.model.streaming.streamer
    layers = [module for block in streamer.blocks for module in block.module.modules()]
    widest = 4 * max(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
    management = comfy.model_management
    reserved = management.extra_reserved_memory()
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: reserved + kept * widest)
    # The weights of most dtypes are expanded in each forward; those in fp32 are what it multiplies with.
    missing = 0 if dtype == torch.float32 else (2 - kept) * widest
    all_resident = sum(block.nbytes for block in streamer.sizes()) + patcher.model.streaming.taken_bytes
    for room, stays in ((all_resident + missing, True), (all_resident + missing - 1, False)):
        patcher.load(torch.device("cpu"), room)
        assert bool(streamer.plan.streamed) != stays
        assert patcher.loaded_size() <= room - missing
    patcher.residency = Residency(budget_bytes=all_resident)
    patcher.load(torch.device("cpu"), all_resident + missing)
    assert not streamer.plan.streamed, "a budget is for the weights alone"


@pytest.mark.parametrize("scaled", [False, True])
def test_an_embedding_in_host_memory_looks_up_the_same_rows(scaled, dtype):
    table = comfy_embedding(scaled, dtype)
    ids = torch.tensor([[5, 5, 0, 399, 17]])
    wanted = table(ids, out_dtype=torch.float32)
    table.__class__ = type("Host", (HostEmbedding, type(table)), {})
    assert torch.equal(table(ids, out_dtype=torch.float32), wanted)
    assert torch.equal(table.look_up(ids, out_dtype=torch.float32), wanted)
    assert wanted.abs().sum() > 1


def comfy_embedding(scaled, dtype):
    import comfy.ops

    kind = comfy.ops.manual_cast.Embedding
    if scaled:

        class Scaled(kind):
            def forward(self, ids, out_dtype=None):
                return super().forward(ids, out_dtype=out_dtype) * 8

        kind = Scaled
    table = kind(400, 64, dtype=dtype)
    table.weight = torch.nn.Parameter(torch.randn(400, 64).to(dtype), requires_grad=False)
    return table
