"""The safetensors header: nothing of it is believed that the file does not bear out."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import _TYPES, save_file

from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.header import BITS, MAX_HEADER_BYTES, natural_key, read_header

DTYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}


def tensor(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ")
    return message


# What safetensors itself writes


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.get)
def test_every_dtype_of_safetensors_is_found_with_its_bytes(tmp_path, dtype):
    path = tmp_path / "flux.safetensors"
    tensors = {
        "matrix": torch.randint(0, 2, (6, 8 * dtype.itemsize), dtype=torch.uint8).view(dtype),
        "vector": torch.ones(3 * dtype.itemsize, dtype=torch.uint8).view(dtype),
        "scalar": torch.ones(dtype.itemsize, dtype=torch.uint8).view(dtype).squeeze(),
        "nothing": torch.empty(0, dtype=dtype),
        "no rows": torch.empty(0, 4, dtype=dtype),
    }
    save_file(tensors, path)
    header = read_header(path)
    content = path.read_bytes()
    assert header.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        entry = header.tensors[name]
        assert (entry.name, entry.dtype, entry.shape) == (name, DTYPE_NAMES[dtype], tuple(expected.shape))
        stored = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[entry.offset : entry.offset + entry.nbytes] == stored


def test_metadata_is_read(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt", "title": "Flux – é"})
    assert read_header(path).metadata == {"format": "pt", "title": "Flux – é"}


def test_a_file_without_metadata_has_none(write_safetensors):
    assert read_header(write_safetensors({"a": tensor()}, bytes(8))).metadata == {}


@pytest.mark.parametrize("metadata", [None, [], "text", 3])
def test_metadata_of_another_kind_is_ignored(write_safetensors, metadata):
    header = read_header(write_safetensors({"__metadata__": metadata, "a": tensor()}, bytes(8)))
    assert header.metadata == {}
    assert list(header.tensors) == ["a"]


def test_tensors_are_in_file_order(write_safetensors):
    path = write_safetensors({"b": tensor(begin=8, end=16), "a": tensor(begin=0, end=8)}, bytes(16))
    assert list(read_header(path).tensors) == ["a", "b"]


def test_an_empty_tensor_may_begin_where_another_does(write_safetensors):
    path = write_safetensors({"a": tensor(), "empty": tensor(shape=(0,), end=0)}, bytes(8))
    assert list(read_header(path).tensors) == ["empty", "a"]


def test_a_file_without_tensors_is_read(write_safetensors):
    assert read_header(write_safetensors({})).tensors == {}


@pytest.mark.parametrize("length", [0x80, 0x180, 0x280, 0x480])
def test_a_header_whose_length_begins_like_a_pickle_is_read(write_safetensors, length):
    path = write_safetensors(json.dumps({"a": tensor()}).encode().ljust(length), bytes(8))
    assert path.read_bytes()[0] == 0x80
    assert list(read_header(path).tensors) == ["a"]


def test_only_the_header_is_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    raw = json.dumps({"a": tensor("U8", (1 << 40,), 0, 1 << 40)}).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + (1 << 40))  # sparse: reading it would not end
    assert read_header(path).tensors["a"].nbytes == 1 << 40


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), [("F4", (2, 3), 3), ("F6_E2M3", (4,), 3), ("F4", (3,), 2)])
def test_elements_below_a_byte_are_counted_in_bits(write_safetensors, dtype, shape, nbytes):
    path = write_safetensors({"a": tensor(dtype, shape, 0, nbytes)}, bytes(nbytes))
    assert read_header(path).tensors["a"].nbytes == nbytes


# Files that are no safetensors files


def test_a_missing_file_is_refused(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "gone.safetensors")


def test_a_folder_is_refused(tmp_path):
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "cannot be read" in refusal(folder)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "secret.safetensors"
    path.touch()
    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refusal(path)


OTHER_FILES = {
    "empty": (b"", "it has 0 bytes"),
    "seven bytes": (b"\0" * 7, "it has 7 bytes"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF file. Load it with 'Unet Loader (GGUF)'"),
    "torch.save": (b"PK\x03\x04\0\0\x08\x08" + bytes(64), "PyTorch pickle"),
    "torch.save of old": (b"\x80\x02\x8a\nl\xfc\x9cF" + bytes(64), "PyTorch pickle"),
    "pickle": (b"\x80\x04\x95\x1e\0\0\0\x01" + bytes(64), "PyTorch pickle"),
    "noise": (bytes(range(200, 250)), "This is no safetensors file"),
}


@pytest.mark.parametrize(("content", "found"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_of_another_format_is_refused_by_name(tmp_path, content, found):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(content)
    assert found in refusal(path)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    assert "the header should be 1,000 bytes long, the whole file has 10" in refusal(path)


def test_an_absurdly_long_header_is_refused(tmp_path):
    path = tmp_path / "flux.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    assert "a header of 100,000,001 bytes, more than the 100,000,000" in refusal(path)


@pytest.mark.parametrize("kept", [4, 8, 9, 40, -9, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "flux.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.zeros(2, 2)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "download it again" in refusal(path)


# Headers that are not what they should be

NOT_JSON = {
    "nothing": b"",
    "half": b'{"a": {"dtype": "F32", ',
    "not UTF-8": b'{"\xff\xfe": 1}',
    "more after it": b"{} {}",
    "deep objects": b'{"a":' * 100_000,
    "deep arrays": b"[" * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON)
def test_a_header_that_is_not_json_is_refused(write_safetensors, raw):
    assert "not readable as JSON" in refusal(write_safetensors(raw))


@pytest.mark.parametrize(("document", "kind"), [([], "list"), ("a", "str"), (3, "int"), (None, "NoneType")])
def test_a_header_that_is_no_object_is_refused(write_safetensors, document, kind):
    assert f"its header is a JSON {kind}, not an object" in refusal(write_safetensors(document))


def test_a_name_that_is_there_twice_is_refused(write_safetensors):
    entry = json.dumps(tensor())
    raw = f'{{"img_in.weight": {entry}, "img_in.weight": {entry}}}'.encode()
    assert "'img_in.weight' is there twice" in refusal(write_safetensors(raw, bytes(8)))


def test_a_field_that_is_there_twice_is_refused(write_safetensors):
    raw = b'{"a": {"dtype": "F32", "shape": [2], "shape": [4], "data_offsets": [0, 8]}}'
    assert "'shape' is there twice" in refusal(write_safetensors(raw, bytes(8)))


MALFORMED = {
    "no object": 5,
    "null": None,
    "empty": {},
    "no dtype": {"shape": [2], "data_offsets": [0, 8]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 8]},
    "no offsets": {"dtype": "F32", "shape": [2]},
    "dtype is a list": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
    "shape is a number": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
    "negative size": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    "two negative sizes": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
    "size is a fraction": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
    "size is text": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
    "size is a boolean": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]},
    "size of 64 bits": {"dtype": "U8", "shape": [1 << 63], "data_offsets": [0, 1 << 63]},
    "size of 4000 digits": {"dtype": "U8", "shape": [10**4000, 10**4000], "data_offsets": [0, 8]},
    "thousands of dimensions": {"dtype": "F32", "shape": [9] * 5000, "data_offsets": [0, 8]},
    "negative offset": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
    "offset is a boolean": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]},
    "one offset": {"dtype": "F32", "shape": [2], "data_offsets": [8]},
    "three offsets": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]},
}


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_entry_is_refused(write_safetensors, fields):
    message = refusal(write_safetensors({"img_in.bias": fields}, bytes(8)))
    assert "img_in.bias: its header entry is malformed" in message
    assert len(message) < 500


def test_an_unknown_dtype_is_refused(write_safetensors):
    message = refusal(write_safetensors({"img_in.bias": tensor("F12")}, bytes(8)))
    assert "img_in.bias: unknown dtype 'F12'; known are BOOL, U8" in message


@pytest.mark.parametrize(
    ("shape", "end", "needed"),
    [((3,), 8, "12"), ((1,), 8, "4"), ((), 8, "4"), ((0,), 8, "0"), ((2,), 0, "8"), ((1 << 40, 1 << 40), 8, "4,8")],
)
def test_a_shape_that_does_not_match_the_bytes_is_refused(write_safetensors, shape, end, needed):
    message = refusal(write_safetensors({"img_in.bias": tensor("F32", shape, 0, end)}, bytes(end)))
    assert f"img_in.bias: F32 of shape {shape} needs {needed}" in message
    assert f"the header gives it {end} ([0, {end}))" in message


def test_offsets_that_run_backwards_are_refused(write_safetensors):
    message = refusal(write_safetensors({"a": tensor(begin=8, end=0)}, bytes(8)))
    assert "a: F32 of shape (2,) needs 8 bytes; the header gives it -8" in message


@pytest.mark.parametrize(("begin", "end"), [(4, 12), (0, 8), (7, 15)])
def test_overlapping_tensors_are_refused(write_safetensors, begin, end):
    message = refusal(write_safetensors({"a": tensor(), "b": tensor(begin=begin, end=end)}, bytes(end)))
    assert "b: its bytes overlap those of the tensor before it" in message


@pytest.mark.parametrize("begin", [9, 16])
def test_a_gap_between_tensors_is_refused(write_safetensors, begin):
    message = refusal(write_safetensors({"a": tensor(), "b": tensor(begin=begin, end=begin + 8)}, bytes(begin + 8)))
    assert f"b: {begin - 8} bytes before it belong to no tensor" in message


def test_a_gap_before_the_first_tensor_is_refused(write_safetensors):
    message = refusal(write_safetensors({"a": tensor(begin=8, end=16)}, bytes(16)))
    assert "a: 8 bytes before it belong to no tensor" in message


@pytest.mark.parametrize("present", [0, 7])
def test_offsets_past_the_end_of_the_file_are_refused(write_safetensors, present):
    path = write_safetensors({"a": tensor()}, bytes(present))
    size = path.stat().st_size
    assert f"its tensors end at byte {size - present + 8:,}; the file has {size:,} bytes" in refusal(path)


def test_trailing_bytes_are_refused(write_safetensors):
    path = write_safetensors({"a": tensor()}, bytes(9))
    size = path.stat().st_size
    assert f"its tensors end at byte {size - 1:,}; the file has {size:,} bytes" in refusal(path)


# Fuzzing


def check_parses_or_refuses(path, content):
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    position = 8 + int.from_bytes(content[:8], "little")
    for name, entry in header.tensors.items():
        assert entry.name == name
        assert entry.offset == position
        assert entry.nbytes == -(-math.prod(entry.shape) * BITS[entry.dtype] // 8)
        position += entry.nbytes
    assert position == len(content)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"


@pytest.fixture(scope="module")
def valid(fuzzed):
    tensors = {"a": torch.ones(3, 2), "b.weight": torch.ones(5, dtype=torch.uint8), "c": torch.ones(2).bfloat16()}
    save_file(tensors, fuzzed, metadata={"format": "pt"})
    content = fuzzed.read_bytes()
    check_parses_or_refuses(fuzzed, content)
    return content


fuzz = settings(max_examples=200, database=None, derandomize=True)

EDIT = st.tuples(st.integers(0, 1 << 30), st.sampled_from(["replace", "insert", "delete"]), st.binary(max_size=3))


@fuzz
@given(edits=st.lists(EDIT, min_size=1, max_size=4), fix_length=st.booleans())
def test_any_change_of_a_files_bytes_parses_consistently_or_is_refused(fuzzed, valid, edits, fix_length):
    content = bytearray(valid)
    data_bytes = len(valid) - 8 - int.from_bytes(valid[:8], "little")
    for position, kind, new in edits:
        start = position % (len(content) + 1)
        content[start : start + (0 if kind == "insert" else max(1, len(new)))] = b"" if kind == "delete" else new
    if fix_length:  # so that the JSON, not only the length before it, is put to the test
        content[:8] = max(0, len(content) - 8 - data_bytes).to_bytes(8, "little")
    check_parses_or_refuses(fuzzed, bytes(content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
SIZES = st.lists(st.integers(-1, 9) | st.integers() | st.booleans(), max_size=3)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(list(BITS)) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2) | SIZES | JSON,
    },
)


@fuzz
@given(document=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), FIELDS | JSON, max_size=3) | JSON)
def test_any_json_parses_consistently_or_is_refused(fuzzed, document):
    raw = json.dumps(document).encode()
    check_parses_or_refuses(fuzzed, len(raw).to_bytes(8, "little") + raw + bytes(24))


@fuzz
@given(content=st.binary(max_size=64))
def test_any_bytes_parse_consistently_or_are_refused(fuzzed, content):
    check_parses_or_refuses(fuzzed, content)


def test_blocks_sort_by_number():
    names = ["blocks.10.b", "blocks.2.b", "blocks.2.a", "blocks", "0"]
    assert sorted(names, key=natural_key) == ["0", "blocks", "blocks.2.a", "blocks.2.b", "blocks.10.b"]
