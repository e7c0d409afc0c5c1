"""Weights that stay in their file: where a device copies from its memory, and where the RAM does not hold a model."""

import gc
import logging
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from fake_registrar import FakeRegistrar
from file_parts import maps_of, open_files
from make_checkpoint import Recipe, make_checkpoint
from random_lora import kohya
from there_and_back import Copied, move
from tiny_blocks import DOUBLES, SINGLES
from tiny_flux import HIDDEN

from flux_nf4 import checkpoints
from flux_nf4.checkpoints import load_transformer, streamed
from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.offload import file_map, pinning, pinning_ahead
from flux_nf4.offload.comfyui import pins
from flux_nf4.offload.comfyui import streaming as streaming_module
from flux_nf4.offload.file_map import FileMapError
from flux_nf4.offload.host_memory import keep_host_memory
from flux_nf4.offload.pinnable import PinnableMemory
from flux_nf4.offload.plan import Residency

RECIPE = Recipe(double_blocks=DOUBLES, single_blocks=SINGLES, hidden=HIDDEN, unet_only=True)


@pytest.fixture(scope="module", params=[False, True], ids=["v2", "v1"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "tiny.safetensors"
    make_checkpoint(path, replace(RECIPE, nested=request.param))
    return path


@pytest.fixture
def own_file(tmp_path):
    """One that may be broken."""
    path = tmp_path / "own.safetensors"
    make_checkpoint(path, RECIPE)
    return path


@pytest.fixture
def registrar(monkeypatch):
    """The driver of a "device" that copies from files' memory."""
    fake = FakeRegistrar()
    monkeypatch.setitem(pinning.REGISTRARS, "cpu", fake)
    return fake


def load(file, double=0, single=0):
    gc.collect()
    model = load_transformer(read_catalogue(file))
    return streamed(model, Residency((("double", double), ("single", single))), node_id=None)


def in_arena(file, monkeypatch, sample, *counts):
    """What a model gives whose weights were read."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "why_not_pinned", lambda *_: "this test wants it so")
        patcher = load(file, *counts)
        assert not patcher.model.streaming.streamer.file.nbytes
        expected = sample(patcher)
    comfy.model_management.unload_all_models()
    return expected


@pytest.mark.parametrize("counts", [(0, 0), (2, 3), (19, 38)])
def test_a_device_copies_from_the_files_memory(
    file, counts, tiny_config, copies, registrar, sample, monkeypatch, caplog
):
    expected = in_arena(file, monkeypatch, sample, *counts)
    with caplog.at_level(logging.INFO):
        patcher = load(file, *counts)
    streaming = patcher.model.streaming
    packed = sum(part.nbytes for part in read_catalogue(file).parts)
    assert sum(streamer.file.nbytes for streamer in streaming.streamers) > 0.9 * packed
    assert sum(streamer.ram_bytes for streamer in streaming.streamers) < 0.1 * packed
    assert torch.equal(sample(patcher), expected)
    assert streaming.all_pinned
    assert sum(registrar.registered.values()) == streaming.pinned_bytes == streaming.host_bytes
    (said,) = [record.message for record in caplog.records if "of tiny.safetensors stay in the file" in record.message]
    assert "reading 0.0" in said


def test_a_sampling_pins_only_what_is_new(file, tiny_config, copies, registrar, sample, monkeypatch):
    patcher = load(file)
    sample(patcher)
    streaming, asked, pinned = patcher.model.streaming, [], []
    pin_limit, pin = streaming_module.pin_limit, PinnableMemory.pin
    monkeypatch.setattr(streaming_module, "pin_limit", lambda nbytes: asked.append(nbytes) or pin_limit(nbytes))
    monkeypatch.setattr(PinnableMemory, "pin", lambda memory, *given: pinned.append(memory) or pin(memory, *given))
    sample(patcher)
    assert (asked, pinned) == ([], [])
    name = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    rows, columns = patcher.model_state_dict()[name].shape
    lora = kohya({name.removeprefix("diffusion_model.").removesuffix(".weight"): (rows, columns)}, 256, alpha=1.0)
    sample(comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0])
    assert pinned == [streaming.streamer.extras_arena]
    assert len(asked) == 1


def test_a_count_that_comfyui_has_lost_is_put_right_by_the_next_sampling(
    file, tiny_config, copies, registrar, sample, monkeypatch
):
    """ComfyUI sets its counter to 0 when the last of its own pins goes (0.3.68 to 0.18)."""
    monkeypatch.setattr(comfy.model_management, "TOTAL_PINNED_MEMORY", pins._counted_bytes, raising=False)
    patcher = load(file)
    sample(patcher)
    counted = comfy.model_management.TOTAL_PINNED_MEMORY
    assert counted >= patcher.model.streaming.pinned_bytes > 0
    comfy.model_management.TOTAL_PINNED_MEMORY = 0
    sample(patcher)
    assert counted == comfy.model_management.TOTAL_PINNED_MEMORY


def test_the_file_is_pinned_while_the_rest_is_loaded(file, tiny_config, copies, registrar):
    patcher = load(file)
    pinning_ahead.wait()
    streamer = patcher.model.streaming.streamer
    assert streamer.file.all_pinned
    assert not streamer.arena.pinned_bytes


class SlowRegistrar(FakeRegistrar):
    """Begins when a model is loaded, but for the trial, and then takes a while for each piece."""

    def __init__(self):
        super().__init__()
        self.is_loaded = threading.Event()

    def register(self, *arguments, **options):
        if threading.current_thread().name == "pinning-ahead":
            assert self.is_loaded.wait(120), "loading waits for it"
            time.sleep(0.005)
        return super().register(*arguments, **options)


@pytest.mark.parametrize("counts", [(0, 0), (2, 3), (19, 38)])
def test_a_slow_driver_is_waited_for_block_by_block_and_the_log_tells_the_end_of_it(
    file, counts, tiny_config, copies, sample, monkeypatch, caplog
):
    expected = in_arena(file, monkeypatch, sample, *counts)
    driver = SlowRegistrar()
    monkeypatch.setitem(pinning.REGISTRARS, "cpu", driver)
    copy, seen = copies.copy, set()

    def copy_what_is_registered(pairs, **events):
        addresses = {source.untyped_storage().data_ptr() for _, source in pairs} & file_map._ranges.keys()
        assert addresses <= driver.registered.keys()
        seen.update(addresses)
        copy(pairs, **events)

    monkeypatch.setattr(copies, "copy", copy_what_is_registered)
    with caplog.at_level(logging.INFO):
        patcher = load(file, *counts)
        streaming = patcher.model.streaming
        assert sum(driver.registered.values()) < streaming.pinned_bytes, "it is under way, and counts"
        driver.is_loaded.set()
        assert torch.equal(sample(patcher), expected)
        pinning_ahead.wait()
        assert torch.equal(sample(patcher), expected)
    assert sum(driver.registered.values()) == streaming.pinned_bytes == streaming.host_bytes
    assert seen <= driver.registered.keys()
    assert len(seen) == sum(len(streamer.file._ranges) for streamer in streaming.streamers)
    said = [record.message for record in caplog.records if "of the file pinned" in record.message]
    assert len(said) == len(streaming.streamers)
    assert not any(";" in text for text in said)


def test_nothing_is_registered_while_the_model_is_brought_to_the_device(file, tiny_config, copies, monkeypatch):
    """The driver would let each of its many calls wait for a piece."""
    driver = SlowRegistrar()
    monkeypatch.setitem(pinning.REGISTRARS, "cpu", driver)
    patcher = load(file)
    model, counted = patcher.model, []

    def to(*_):
        driver.is_loaded.set()
        for _ in range(2):
            counted.append(len(driver.registered))
            time.sleep(0.05)  # in which it would register ten
        return model

    monkeypatch.setattr(model, "to", to)
    comfy.model_management.load_models_gpu([patcher])
    assert counted[1] - counted[0] <= 1, "what it had begun"
    pinning_ahead.wait()
    assert len(driver.registered) > counted[1] + 1


def test_a_load_that_is_interrupted_leaves_nothing_registered(own_file, tiny_config, copies, registrar, monkeypatch):
    def interrupt(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "fill", interrupt)
        with pytest.raises(InterruptedError):
            load(own_file)
    assert registrar.calls > 1
    gc.collect()
    assert registrar.registered == {}
    assert maps_of(own_file) == open_files(own_file) == []
    assert load(own_file).model.streaming.streamer.file.nbytes


def join_threads():
    """That which pins may be at its end, and still hold what it has pinned."""
    for thread in threading.enumerate():
        if thread.name == "pinning-ahead":
            thread.join()


def test_loading_again_and_again_leaves_nothing(tmp_path, tiny_config, copies, registrar, sample):
    for index in range(5):
        path = tmp_path / f"{index}.safetensors"
        make_checkpoint(path, RECIPE)
        patcher = load(path)
        sample(patcher)
        assert registrar.registered
        assert maps_of(path)
        del patcher
        comfy.model_management.unload_all_models()
        gc.collect()
        join_threads()
        assert registrar.registered == {}
        assert maps_of(path) == open_files(path) == []
    assert file_map._ranges == {}


@pytest.mark.parametrize(
    ("driver", "why"),
    [
        (FakeRegistrar(knows_read_only=False), "the driver refused a page of the file (error 801)"),
        (FakeRegistrar(refuse_at=0), "the driver refused a page of the file (error 2)"),
        (None, "cpu has no way to pin memory that is there already"),
    ],
)
def test_where_registering_is_refused_it_is_read_as_before(
    file, driver, why, tiny_config, copies, monkeypatch, sample, caplog
):
    expected = in_arena(file, monkeypatch, sample)
    if driver is not None:
        monkeypatch.setitem(pinning.REGISTRARS, "cpu", driver)
    with caplog.at_level(logging.INFO):
        patcher = load(file)
    streamer = patcher.model.streaming.streamer
    assert not streamer.file.nbytes
    assert torch.equal(sample(patcher), expected)
    assert [record.message.endswith(f"into RAM: {why}") for record in caplog.records if "NF4" in record.message] == [1]


def test_a_driver_that_refuses_more_leaves_the_rest_unpinned(file, tiny_config, copies, monkeypatch, sample, caplog):
    expected = in_arena(file, monkeypatch, sample)
    driver = FakeRegistrar(refuse_at=6)  # the trial is one
    monkeypatch.setattr(checkpoints, "_pin_ahead", lambda *_: None)
    monkeypatch.setitem(pinning.REGISTRARS, "cpu", driver)
    monkeypatch.setattr("flux_nf4.offload.streamer.Streamer.pin", pin_the_file_first)
    patcher = load(file)
    assert torch.equal(sample(patcher), expected)
    streamer = patcher.model.streaming.streamer
    assert 0 < streamer.file.pinned_bytes < streamer.file.nbytes
    assert "GiB of the file pinned; the driver refused more (error 2)" in caplog.text


def pin_the_file_first(streamer, limit_bytes, device, limited_by, first):
    streamer.file.pin(limit_bytes, device, limited_by, first)


def test_a_file_that_was_written_to_is_an_error_of_the_next_sampling(own_file, tiny_config, copies, registrar, sample):
    patcher = load(own_file)
    sample(patcher)
    os.truncate(own_file, 1000)
    with pytest.raises(FileMapError, match=r"^own\.safetensors: it was written to while it was in use"):
        sample(patcher)


def test_a_file_that_is_replaced_gives_the_same_picture_until_it_is_loaded_again(
    own_file, tmp_path, tiny_config, copies, registrar, sample
):
    patcher = load(own_file)
    expected = sample(patcher)
    comfy.model_management.unload_all_models()
    other = tmp_path / "other.safetensors"
    make_checkpoint(other, replace(RECIPE, seed=7))
    other.rename(own_file)
    assert torch.equal(sample(patcher), expected)
    assert not torch.equal(sample(load(own_file)), expected)


def test_a_file_that_ends_while_it_is_read_is_named(own_file, tiny_config, copies, registrar, monkeypatch):
    real = checkpoints.attach_streaming

    def truncate(*arguments, **options):
        real(*arguments, **options)
        os.truncate(own_file, own_file.stat().st_size // 2)

    monkeypatch.setattr(checkpoints, "attach_streaming", truncate)
    ended = r"ended at byte [\d,]+ while it was read\. Download it again"
    with pytest.raises(CheckpointError, match=rf"^own\.safetensors: it (was written to while it was in use|{ended})"):
        load(own_file)


def test_a_file_is_brought_in_while_the_model_is_made(own_file, tiny_config, copies, registrar, monkeypatch):
    has_begun, seen = threading.Event(), []
    bring_in, attach = file_map._bring_in, checkpoints.attach_streaming

    def begin(*chunk):
        has_begun.set()
        return bring_in(*chunk)

    def wait_for_it(*arguments, **options):
        seen.append(has_begun.wait(timeout=10))
        attach(*arguments, **options)

    monkeypatch.setattr(file_map, "_bring_in", begin)
    monkeypatch.setattr(checkpoints, "attach_streaming", wait_for_it)
    load(own_file)
    assert seen == [True]


def test_an_interrupt_while_a_file_is_brought_in_leaves_nothing_pinned(
    own_file, tiny_config, copies, registrar, monkeypatch
):
    def interrupt(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(checkpoints, "attach_streaming", interrupt)
    with pytest.raises(InterruptedError):
        load(own_file)
    gc.collect()
    assert registrar.registered == {}
    assert maps_of(own_file) == open_files(own_file) == []


def test_a_second_device_shares_files_memory_and_arena(file, tiny_config, copies, registrar, sample, monkeypatch):
    first = load(file)
    expected = sample(first)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu", 0))
    second = load(file)
    assert not second.is_clone(first)
    assert (first.load_device, second.load_device) == (torch.device("cpu"), torch.device("cpu", 0))
    streamings = [patcher.model.streaming for patcher in (first, second)]
    for ours, theirs in zip(*(streaming.streamers for streaming in streamings), strict=True):
        assert ours.arena is theirs.arena
        assert [tensor.data_ptr() for of in ours.file.tensors for tensor in of] == [
            tensor.data_ptr() for of in theirs.file.tensors for tensor in of
        ]
    assert torch.equal(sample(second), expected)
    assert sum(registrar.registered.values()) == streamings[0].pinned_bytes
    assert load(file).is_clone(second)
    del first, streamings, ours, theirs
    comfy.model_management.unload_all_models()
    gc.collect()
    assert torch.equal(sample(second), expected)


def test_a_second_device_shares_an_arena_that_was_read(file, tiny_config, copies, sample, monkeypatch):
    first = load(file)
    expected = sample(first)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu", 0))
    second = load(file)
    assert second.model.streaming.streamer.arena is first.model.streaming.streamer.arena
    assert torch.equal(sample(second), expected)
    assert torch.equal(sample(first), expected)


@pytest.mark.parametrize("counts", [(0, 0), (2, 3), (19, 38)])
def test_short_ram_gives_the_same_picture(file, counts, tiny_config, copies, free_ram, sample, caplog):
    expected = sample(load(file, *counts))
    comfy.model_management.unload_all_models()
    free_ram(read_catalogue(file).transformer_ram // 2)
    with caplog.at_level(logging.WARNING):
        patcher = load(file, *counts)
    (said,) = [record.message for record in caplog.records if "packed weights stay in the file" in record.message]
    assert "tiny.safetensors takes" in said
    streamer = patcher.model.streaming.streamer
    assert streamer.ram_bytes < 0.1 * read_catalogue(file).transformer_ram
    assert not streamer.all_pinned
    assert torch.equal(sample(patcher), expected)


def test_where_ram_is_short_nothing_is_brought_in(file, tiny_config, copies, free_ram, monkeypatch):
    monkeypatch.setattr(file_map, "_bring_in", lambda *_: pytest.fail("the RAM does not hold it"))
    free_ram(read_catalogue(file).transformer_ram // 2)
    assert load(file).model.streaming.streamer.file.nbytes


def test_the_bar_gets_to_its_end(file, tiny_config, copies, registrar, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total):
            self.left = total
            bars.append(self)

        def update(self, nbytes):
            self.left -= nbytes

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    load(file)
    assert [bar.left for bar in bars] == [0]


def test_a_file_that_cannot_be_brought_in_is_named(own_file, tiny_config, copies, registrar, monkeypatch):
    def fail(item, *_):
        raise FileMapError(item.file.path, "reading it failed")

    monkeypatch.setattr(file_map, "_bring_in", fail)
    with pytest.raises(CheckpointError, match=r"^own\.safetensors: reading it failed"):
        load(own_file)


def test_on_the_cpu_it_computes_from_the_file(file, tiny_config, free_ram, sample):
    expected = sample(load(file))
    comfy.model_management.unload_all_models()
    free_ram(read_catalogue(file).transformer_ram // 2)
    patcher = load(file)
    assert patcher.model.streaming.streamer.ram_bytes < 0.3 * read_catalogue(file).transformer_ram
    assert torch.equal(sample(patcher), expected)


@pytest.mark.parametrize("is_short", [False, True])
def test_a_patch_is_that_of_a_model_in_ram(file, is_short, tiny_config, copies, free_ram, sample, monkeypatch):
    key = "diffusion_model.double_blocks.1.img_mlp.0.weight"

    def patched():
        patcher = load(file)
        patcher.add_patches({key: ("diff", (torch.full((1024, 256), 0.01),))})
        return patcher

    expected = sample(patched())
    comfy.model_management.unload_all_models()
    if is_short:
        free_ram(read_catalogue(file).transformer_ram // 2)
    else:
        monkeypatch.setitem(pinning.REGISTRARS, "cpu", FakeRegistrar())
    patcher = patched()
    assert torch.equal(sample(patcher), expected)
    assert patcher.model.streaming.streamer.file.nbytes


@pytest.mark.parametrize("is_short", [False, True])
def test_ram_kept_for_what_is_on_the_device_is_given_back_where_it_is_short(file, is_short, tiny_config, free_ram):
    encoder = torch.nn.Linear(2, 2)
    keep_host_memory(encoder)
    move(encoder, "meta")
    free_ram(read_catalogue(file).transformer_ram // 2 if is_short else 1 << 40)
    load(file)
    with pytest.raises(Copied) if is_short else nullcontext():
        move(encoder, "cpu")


def test_too_little_for_the_rest_is_an_error(file, tiny_config, free_ram):
    free_ram(100)
    with pytest.raises(CheckpointError, match=r"GiB of RAM; 0\.00 GiB are free"):
        load(file)


def test_a_system_that_refuses_the_map_is_told(file, tiny_config, free_ram, monkeypatch):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    free_ram(read_catalogue(file).transformer_ram // 2)
    monkeypatch.setattr(file_map, "_map", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be mapped into memory \(.*Cannot allocate memory\)"):
        load(file)
