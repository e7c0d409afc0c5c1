"""Mutated files: an error of this package, or a file that is read, in bounded time and memory.

``FUZZ_FILES`` sets how many there are, ``FUZZ_FIRST`` the seed of the first; each has one of its own, which a failure
names.
"""

import json
import os
import random
import re
import resource
import time
from pathlib import Path

import checkpoint_layout as layout
import pytest
import torch
from make_checkpoint import Recipe, make_checkpoint
from models_of_diffusers import SMALL, shapes_of_diffusers, use_small_defaults
from paces import slowness
from packed_tensors import packed_tensors
from safetensors.torch import load_file, save_file
from sparse_file import write_sparse

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.encoder_file import read_encoder_file
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.read_parts import DenseMemory, memory_of, read_parts
from flux_nf4.nf4_loader.checkpoint.require import require_4bit, require_all_in_one, require_transformer
from flux_nf4.nf4_loader.checkpoint.tensors import TransformerTensor, Weight4bit
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nf4_loader.models.streamed_encoders import require_type
from flux_nf4.nf4_loader.models.transformers import build_transformer
from flux_nf4.nf4_loader.saving.quantise import QuantSettings, quantise
from flux_nf4.page.encoder_plan import encoder_other_bytes, encoder_sizes
from flux_nf4.page.file_plan import block_sizes

FILES = int(os.environ.get("FUZZ_FILES", "400"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
SECONDS = 5
SLOWNESS = slowness()
EXTRA_BYTES = 2**30
VALUES = (0, -1, 1, 2, 3, 63, 64, 65, 255, 2**16, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e400, True, None)
WORDS = (
    "",
    "nf4",
    "fp4",
    "F32",
    "U8",
    "F8_E4M3",
    "BOOL",
    "C64",
    "I64",
    "../x",
    "model.diffusion_model.",
    "\0",
    "é",
    "a" * 500,
)


def layers(prefix, *names):
    return {f"{prefix}{name}": (64, 128) for name in names}


OTHER_FAMILIES = (
    (
        layers("", "double_stream_modulation_img.linear", "norm_out.linear")
        | layers("transformer_blocks.0.attn.", "to_q", "to_k", "to_v", "to_out.0")
        | layers("single_transformer_blocks.0.attn.", "to_qkv_mlp_proj", "to_out"),
        {"transformer_blocks.0.attn.norm_q.weight": (128,)},
    ),
    (
        layers("transformer_blocks.1.", "attn.to_q", "img_mod.1", "img_mlp.net.0.proj"),
        {f"transformer_blocks.0.{name}.weight": (64, 64) for name in ("attn.add_q_proj", "img_mod.1")}
        | {"txt_norm.weight": (64,), "img_in.weight": (64, 64)},
    ),
    (
        layers("layers.0.attention.", "to_q", "to_k", "to_v", "to_out.0") | layers("", "input_proj"),
        {"embed_image_indicator.weight": (2, 64), "layers.0.attention.norm_q.weight": (64,)},
    ),
    (
        layers("", "text_fusion.projector", "text_fusion.layerwise_blocks.0.attn.to_q", "img_in")
        | layers("transformer_blocks.0.", "attn.to_q", "attn.to_gate", "ff.up"),
        {"transformer_blocks.0.scale_shift_table": (6, 64), "transformer_blocks.0.norm1.weight": (64,)},
    ),
)
"""What is packed and what is dense in files of FLUX.2, Qwen-Image, Ideogram 4 and Krea 2, in diffusers' names."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """What is mutated: files of each layout, as (header, body)."""
    folder = tmp_path_factory.mktemp("bases")
    for number, nested in enumerate((False, True)):
        recipe = Recipe(hidden=64, nested=nested, unet_only=True, quant_type="fp4" if nested else "nf4")
        make_checkpoint(folder / f"{number}.safetensors", recipe)
    tensors = load_file(folder / "0.safetensors")
    beside = {"text_encoders.t5xxl.transformer.encoder.block.0.a": torch.ones(4), "vae.b": torch.ones(3).half()}
    beside["text_encoders.clip_l.c"] = torch.ones(2, 2).bfloat16()
    save_file(tensors | beside, folder / "2.safetensors")
    diffusers = {}
    for name, tensor in tensors.items():
        linear, _, end = name.removeprefix("model.diffusion_model.").partition(".weight")
        if linear in ("single_blocks.0.linear2", "img_in"):
            for theirs in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
                diffusers[f"single_transformer_blocks.0.{theirs}.weight{end}"] = tensor.clone()
    save_file(diffusers, folder / "3.safetensors")
    for number, (packed, dense) in enumerate(OTHER_FAMILIES, 4):
        tensors = {name: torch.ones(shape).bfloat16() for name, shape in dense.items()}
        for name, shape in packed.items():
            values = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            parts = quantise(values, QuantSettings(nested=number % 2 == 0))
            tensors |= {f"{name}.weight{end}": part for end, part in parts.items()}
        save_file(tensors, folder / f"{number}.safetensors")
    return [split(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def encoder_bases(tmp_path_factory):
    """Text encoders in each layout of transformers, as (header, body)."""
    folder = tmp_path_factory.mktemp("encoders")
    language = {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "mlp.down_proj": 64}
    layouts = {
        "language_model.model.": (5120, {}),
        "model.": (2560, {"self_attn.q_norm.weight": (32,)}),
        "": (4096, {"self_attn.q_norm.weight": (32,)}),
        "model.language_model.": (2560, {"self_attn.q_norm.weight": (32,)}),
    }
    for number, (prefix, (width, more)) in enumerate(layouts.items()):
        tensors = {f"{prefix}embed_tokens.weight": ("BF16", (16, 64), None)}
        for layer in (f"{prefix}layers.{index}." for index in (0, 1, 35)):
            for name, rows in language.items():
                tensors |= packed_tensors(f"{layer}{name}.weight", (rows, 64), "nf4", 64)
            tensors |= {f"{layer}{name}": ("F32", shape, None) for name, shape in more.items()}
            tensors[f"{layer}post_attention_layernorm.weight"] = ("BF16", (width,), None)
        if "language" in prefix:
            tensors["vision_tower.a.weight"] = tensors["model.visual.b.bias"] = ("F32", (3,), None)
        if prefix == "model.language_model.":
            tensors["model.visual.deepstack_merger_list.0.norm.weight"] = ("F32", (3,), None)
        write_sparse(folder / f"{number}.safetensors", tensors)
    for name in ("encoder.block.0.layer.0.SelfAttention.q.weight", "text_model.encoder.layers.0.mlp.fc1.weight"):
        tensors = packed_tensors(name, (64, 64), "fp4", 64) | {"shared.weight": ("BF16", (8, 64), None)}
        write_sparse(folder / f"{name}.safetensors", tensors)
    return [split(path) for path in sorted(folder.iterdir())]


def split(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header, body):
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


# Mutations: each takes a random generator, the header and the body, and gives the bytes of a file.


def flip_bytes(chance, header, body):
    raw = bytearray(joined(header, body))
    for _ in range(chance.choice((1, 3, 30))):
        at = chance.randrange(min(len(raw), chance.choice((8, 200, 20_000, len(raw)))))
        raw[at] = chance.choice((0, 255, raw[at] ^ (1 << chance.randrange(8)), chance.randrange(256)))
    return bytes(raw)


def cut(chance, header, body):
    raw = joined(header, body)
    at = chance.choice((chance.randrange(20), chance.randrange(len(raw)), len(raw) - 1 - chance.randrange(9)))
    return raw[:at] if chance.random() < 0.7 else raw[:at] + raw[at + chance.randrange(1, 99) :]


def append(chance, header, body):
    return joined(header, body + chance.randbytes(chance.choice((1, 8, 5000))))


def change_entry(chance, header, body):
    entry = header[chance.choice(list(header))]
    for _ in range(chance.choice((1, 1, 2))):
        key = chance.choice(("dtype", "shape", "data_offsets", "extra"))
        value = entry.get(key)
        if isinstance(value, list) and value and chance.random() < 0.6:
            value[chance.randrange(len(value))] = anything(chance)
        else:
            entry[key] = anything(chance)
    return joined(header, body)


def change_names(chance, header, body):
    names = list(header)
    for _ in range(chance.choice((1, 2, 40))):
        old = chance.choice(names)
        new = chance.choice(
            (chance.choice(names), old.replace("0", "7"), old + ".weight", chance.choice(WORDS), old[:-3])
        )
        if old in header:
            header[new] = header.pop(old)
    return joined(header, body)


def drop_tensors(chance, header, body):
    """With the offsets of the others closed up, so that only the tensors are missing."""
    gone = set(chance.sample(list(header), chance.choice((1, 2, len(header) // 2))))
    kept, parts, position = {}, [], 0
    for name, entry in header.items():
        if name not in gone and name != "__metadata__":
            begin, end = entry["data_offsets"]
            kept[name] = entry | {"data_offsets": [position, position + end - begin]}
            parts.append(body[begin:end])
            position += end - begin
    return joined(kept, b"".join(parts))


def swap_places(chance, header, body):
    one, other = chance.sample([name for name in header if name != "__metadata__"], 2)
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[one]["data_offsets"],
    )
    return joined(header, body)


def change_quant_state(chance, header, body):
    name = chance.choice([name for name in header if ".quant_state." in name])
    begin, end = header[name]["data_offsets"]
    state = json.loads(body[begin:end])
    for _ in range(chance.choice((1, 2))):
        state[chance.choice((*state, "nested_blocksize", "nested_offset"))] = anything(chance)
    if chance.random() < 0.5 and isinstance(state.get("shape"), list) and state["shape"]:
        state["shape"] = [chance.choice((*VALUES, *state["shape"])) for _ in state["shape"]]
    raw = json.dumps(state).encode()[: end - begin].ljust(end - begin)
    return joined(header, body[:begin] + raw + body[end:])


def deep_json(chance, header, body):
    raw = chance.choice((b"[", b'{"a":')) * chance.choice((10, 5000, 200_000))
    return len(raw).to_bytes(8, "little") + raw + body


def many_names(chance, header, body):
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return joined(dict.fromkeys(map(str, range(3000)), empty) | header, body)


MUTATIONS = (
    flip_bytes, flip_bytes, cut, append, change_entry, change_entry, change_names, drop_tensors, swap_places,
    change_quant_state, change_quant_state, deep_json, many_names,
)  # fmt: skip


def anything(chance):
    return chance.choice(
        (
            chance.choice(VALUES),
            chance.choice(WORDS),
            chance.randrange(10**6),
            [chance.choice(VALUES) for _ in range(chance.randrange(5))],
            {"a": chance.choice(VALUES)},
        )
    )


def read_all(path):
    """Everything that loading does with the file but for ComfyUI's part."""
    size = path.stat().st_size
    catalogue = read_catalogue(path)
    for entry in catalogue.header.tensors.values():
        assert 0 <= entry.offset <= entry.offset + entry.nbytes <= size
    require_transformer(catalogue)
    block_sizes(catalogue, torch.bfloat16)  # as the page asks for
    memory = []
    for tensor in catalogue.transformer.values():
        if tensor.weights4bit:
            linear = Linear4bit(tensor.held, bias=False, dtype=torch.bfloat16)
            memory += memory_of(tensor, linear.tensors)
            packed = [buffer.nbytes for name, buffer in linear.named_buffers() if not name.startswith("dense")]
            assert packed == tensor.packed_sizes
        else:
            memory += [DenseMemory(part, torch.empty(part.shape)) for part in tensor.parts]
    read_parts(memory, lambda _: None)
    require_all_in_one(catalogue)


def read_encoder(path):
    """As `read_all`, of a text encoder."""
    size = path.stat().st_size
    file = read_encoder_file(path)
    for entry in file.header.tensors.values():
        assert 0 <= entry.offset <= entry.offset + entry.nbytes <= size
    require_4bit([file])
    require_type(file, next(iter(file.encoder.types)))
    encoder_sizes(file, torch.bfloat16)
    encoder_other_bytes(file, torch.bfloat16)
    memory = []
    for tensor in file.tensors.values():
        if isinstance(tensor, Weight4bit):
            whole = TransformerTensor((tensor,))
            memory += memory_of(whole, Linear4bit(whole.held, bias=False, dtype=torch.bfloat16).tensors)
        else:
            memory.append(DenseMemory(tensor, torch.empty(tensor.shape)))
    read_parts(memory, lambda _: None)


class Bounded:
    """Address space that may grow by no more than ``EXTRA_BYTES``: what asks for more gets a MemoryError."""

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def outcome(path, action):
    """The error's message, or "" if the file was read; anything but a CheckpointError goes through."""
    started, cpu_time = time.monotonic(), time.process_time()
    try:
        action(path)
        message = ""
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 3000
    # A busy machine is no hang: this process's own time counts, and the clock's where it is far too long.
    assert time.process_time() - cpu_time < SECONDS * SLOWNESS
    assert time.monotonic() - started < 10 * SECONDS * SLOWNESS
    return message


@pytest.mark.parametrize(("what", "action"), [("bases", read_all), ("encoder_bases", read_encoder)])
def test_mutated_files_are_read_or_refused(what, action, request, tmp_path):
    bases = request.getfixturevalue(what)
    path, seen = tmp_path / "flux.safetensors", set()
    with Bounded():
        for seed in range(FIRST, FIRST + FILES):
            chance = random.Random(seed)
            header, body = chance.choice(bases)
            mutation = chance.choice(MUTATIONS)
            path.write_bytes(mutation(chance, json.loads(json.dumps(header)), body))
            try:
                seen.add(re.sub(r"[\d,]+|'[^']*'", "", outcome(path, action))[18:80])
            except BaseException as error:
                raise AssertionError(f"seed {seed}, {mutation.__name__}") from error
    assert len(seen) > 20


def test_swapped_and_mixed_shards_are_read_or_refused(bases, tmp_path):
    header, body = bases[0]
    names = [name for name in header if name != "__metadata__"]
    messages = set()
    for seed in range(FIRST, FIRST + FILES // 10):
        chance = random.Random(seed)
        weight_map = {}
        for number in (1, 2):
            file = f"model-{number:05}-of-00002.safetensors"
            kept = {name: header[name] for name in names[number - 1 :: 2]}
            weight_map |= dict.fromkeys(kept, file)
            gone = {n: e for n, e in header.items() if n not in kept}
            chance_of_damage = chance.random()
            raw = drop_tensors(random.Random(0), {**kept}, body) if chance_of_damage < 0.3 else _only(kept, body)
            (tmp_path / file).write_bytes(flip_bytes(chance, *_parts(raw)) if chance_of_damage > 0.8 else raw)
            assert gone
        if chance.random() < 0.5:
            for name in chance.sample(names, 3):
                weight_map[name] = chance.choice((*weight_map.values(), "../x.safetensors", "x.safetensors"))
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        messages.add(outcome(tmp_path / "model-00001-of-00002.safetensors", read_shards)[:40])
    assert len(messages) > 3


def read_shards(path):
    require_transformer(read_catalogue(path))


def _only(header, body):
    kept, parts, position = {}, [], 0
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kept[name] = entry | {"data_offsets": [position, position + end - begin]}
        parts.append(body[begin:end])
        position += end - begin
    return joined(kept, b"".join(parts))


def _parts(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize("family", ["Flux.1", *SMALL])
def test_mutated_shapes_become_a_model_or_are_refused(family, tmp_path, monkeypatch):
    """ComfyUI's detection and model, on the meta device, of shapes that nobody has checked."""
    small = SMALL.get(family)
    if small is not None and not small.is_known:
        pytest.skip(f"this ComfyUI has no {small.supported}")
    if small is not None:
        use_small_defaults(small, monkeypatch)
    whole = shapes_of_diffusers(small) if small is not None else layout.flux(1, 1, guidance=True)
    path, messages = tmp_path / "flux.safetensors", set()
    for seed in range(FIRST, FIRST + FILES // 20):
        chance = random.Random(seed)
        shapes = dict(whole)
        for name in chance.sample(list(shapes), chance.choice((0, 1, 1, 2))):
            shape = list(shapes.pop(name))
            shape[chance.randrange(len(shape))] = chance.choice((1, 2, 63, 64, 128, 3071, 6144, 9216))
            if chance.random() < 0.7:
                shapes[chance.choice((name, name, name.replace("0", "1")))] = tuple(shape)
        tensors = {}
        for name, shape in shapes.items():
            is_linear = len(shape) == 2 and not name.startswith("embed")
            if name.endswith(".weight") and chance.random() < (0.9 if is_linear else 0.01):
                tensors |= packed_tensors(name, shape, "nf4", 64)
            else:
                tensors[name] = ("BF16", shape, None)
        write_sparse(path, tensors)
        try:
            messages.add(outcome(path, lambda path: build_transformer(read_catalogue(path)))[:60])
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
    assert "" in messages
    assert len(messages) > 3
