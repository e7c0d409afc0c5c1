"""Bad input: the message arrives in the history and says what to do, and the next good prompt succeeds.

Bad files are the good file's header, changed, over a sparse body: only the small tensors that a loader reads before
it trusts a file (quant states, code tables) have their bytes.
"""

import json

import pytest

SMALL = 4096


class BadFile:
    """The good file's header as (dtype, shape) by name and its small tensors' bytes, to be changed and written."""

    def __init__(self, good):
        with good.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self.tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
            self.bytes = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                if end - begin <= SMALL:
                    file.seek(8 + length + begin)
                    self.bytes[name] = file.read(end - begin)

    def drop(self, *parts):
        """Leave out every tensor with one of ``parts`` in its name."""
        self.tensors = {name: t for name, t in self.tensors.items() if not any(part in name for part in parts)}

    def rename(self, old, new):
        self.tensors = {name.replace(old, new): t for name, t in self.tensors.items()}
        self.bytes = {name.replace(old, new): b for name, b in self.bytes.items()}

    def quant_state(self, weight, **fields):
        """Change fields of a weight's quant state; None leaves one out."""
        name = f"{weight}.quant_state.bitsandbytes__nf4"
        state = {k: v for k, v in (json.loads(self.bytes[name]) | fields).items() if v is not None}
        self.raw_quant_state(weight, json.dumps(state).encode())

    def raw_quant_state(self, weight, raw):
        name = f"{weight}.quant_state.bitsandbytes__nf4"
        self.bytes[name] = raw
        self.tensors[name] = ("U8", [len(raw)])

    def header(self, change=lambda entries: None):
        sizes = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}
        entries, position = {}, 0
        for name, (dtype, shape) in self.tensors.items():
            nbytes = sizes.get(dtype, 1)
            for size in shape:
                nbytes *= size
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
            position += nbytes
        places = {name: entry["data_offsets"][0] for name, entry in entries.items()}
        change(entries)
        return json.dumps(entries).encode(), places, position

    def write(self, path, change=lambda entries: None, cut=0):
        raw, places, size = self.header(change)
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            start = file.tell()
            for name, content in self.bytes.items():
                if name in places:
                    file.seek(start + places[name])
                    file.write(content)
            file.truncate(start + size - cut)


QKV = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"


def not_safetensors(bad, path):
    path.write_bytes(bytes(range(200, 250)))


def web_page(bad, path):
    path.write_bytes(b"<!DOCTYPE html><html><title>Log in</title>you are not logged in</html>")


def with_holes(bad, path):
    bad.bytes = {name: content for name, content in bad.bytes.items() if not name.startswith(QKV)}
    bad.write(path)


def truncated_header(bad, path):
    raw, _, _ = bad.header()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw[:1000])


def absurdly_long_header(bad, path):
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def header_not_json(bad, path):
    path.write_bytes((40).to_bytes(8, "little") + b"{" * 40)


def overlapping_offsets(bad, path):
    def change(entries):
        names = list(entries)
        entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]
        entries[names[1]] |= {"dtype": entries[names[0]]["dtype"], "shape": entries[names[0]]["shape"]}

    bad.write(path, change)


def past_the_end(bad, path):
    bad.write(path, cut=1_000_000)


def unknown_dtype(bad, path):
    bad.write(path, lambda entries: entries[QKV].update(dtype="F3"))


def quant_state_missing(bad, path):
    bad.drop(f"{QKV}.quant_state")
    bad.write(path)


def every_quant_state_missing(bad, path):
    bad.drop(".quant_state.", ".absmax", ".quant_map")
    bad.write(path)


def quant_state_not_json(bad, path):
    bad.raw_quant_state(QKV, b"\x00\x01not json")
    bad.write(path)


def unknown_quant_type(bad, path):
    bad.quant_state(QKV, quant_type="int3")
    bad.write(path)


def shape_not_matching_the_bytes(bad, path):
    bad.quant_state(QKV, shape=[768, 250])
    bad.write(path)


def shape_of_another_model(bad, path):
    bad.quant_state(QKV, shape=[256, 768])
    bad.write(path)


def absmax_too_short(bad, path):
    bad.tensors[f"{QKV}.absmax"] = ("F32", [3066])
    bad.write(path)


def layer_missing(bad, path):
    bad.drop("single_blocks.0.linear2")
    bad.write(path)


def llm_int8(bad, path):
    bad.drop(".quant_state.", ".absmax", ".quant_map")
    bad.tensors[QKV] = ("I8", [768, 256])
    bad.tensors[f"{QKV.removesuffix('.weight')}.SCB"] = ("F32", [768])
    bad.write(path)


def dense(dtype):
    def make(bad, path):
        shapes = {
            name.split(".quant_state.")[0]: json.loads(bad.bytes[name])["shape"]
            for name in bad.tensors
            if ".quant_state." in name
        }
        bad.drop(".quant_state.", ".absmax", ".quant_map")
        bad.tensors |= {name: (dtype, shape) for name, shape in shapes.items()}
        bad.write(path)

    make.__name__ = f"dense_{dtype}"
    return make


def dense_unet_only(bad, path):
    bad.drop("text_encoders.", "vae.")
    dense("BF16")(bad, path)


def gguf(bad, path):
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


def pickle(bad, path):
    path.write_bytes(b"PK\x03\x04\0\0\x08\x08" + bytes(64))


def nunchaku(bad, path):
    bad.drop("double_blocks", "single_blocks", ".quant_state.", ".absmax", ".quant_map")
    bad.tensors["single_transformer_blocks.0.qkv_proj.qweight"] = ("I8", [768, 128])
    bad.write(path)


def not_flux(bad, path):
    bad.rename("double_blocks.", "joint_blocks.")
    bad.write(path)


def lora(bad, path):
    bad.drop("model.diffusion_model.", "text_encoders.", "vae.")
    bad.tensors |= {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ("F16", [16, 256])}
    bad.write(path)


def unet_only(bad, path):
    bad.drop("text_encoders.", "vae.")
    bad.write(path)


def without_vae(bad, path):
    bad.drop("vae.")
    bad.write(path)


CASES = {
    not_safetensors: ["no safetensors file, or it is damaged"],
    web_page: ["this is a web page ('Log in')", "accept the licence"],
    with_holes: ["img_attn.qkv.weight", "never downloaded"],
    truncated_header: ["header", "download it again"],
    absurdly_long_header: ["4,611,686,018,427,387,904 bytes", "download it again"],
    header_not_json: ["not readable as JSON"],
    overlapping_offsets: ["overlap"],
    past_the_end: ["the file has", "download it again"],
    unknown_dtype: [QKV, "unknown dtype 'F3'"],
    quant_state_missing: ["img_attn.qkv.weight", "quant_state"],
    every_quant_state_missing: ["packed", "no quant state"],
    quant_state_not_json: ["img_attn.qkv.weight", "not readable as JSON"],
    unknown_quant_type: ["img_attn.qkv.weight", "'int3'", "nf4 and fp4"],
    shape_not_matching_the_bytes: ["(768, 250)", "96,000", "98,304"],
    shape_of_another_model: ["(256, 768)", "this model needs (768, 256)"],
    absmax_too_short: ["3,072 F32 values of absmax", "3,066"],
    layer_missing: ["missing (1)", "single_blocks.0.linear2.weight", "download it again"],
    llm_int8: ["LLM.int8", "'.SCB'"],
    dense("BF16"): ["dense BF16 weights", "'Load Checkpoint'"],
    dense("F8_E4M3"): ["dense F8_E4M3 weights", "'Load Checkpoint'"],
    dense_unet_only: ["dense BF16 weights", "'Load Diffusion Model'"],
    gguf: ["GGUF", "'Unet Loader (GGUF)'"],
    pickle: ["PyTorch pickle", "Convert it"],
    nunchaku: ["nunchaku (SVDQuant)", "'Nunchaku FLUX DiT Loader'"],
    not_flux: ["not of a model that this node loads"],
    lora: ["it is a LoRA", "models/loras"],
    unet_only: ["no CLIP-L, no T5-XXL, no VAE", "'DualCLIPLoader'", "'Load VAE'"],
    without_vae: ["no VAE", "all-in-one"],
}


def decode_only(workflow):
    """The good prompt after a bad one: loads the whole file again, and takes the shortest way to a picture."""
    workflow["7"]["inputs"]["samples"] = ["5", 0]
    return {name: workflow[name] for name in ("1", "5", "7", "8")}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_bad_file_is_refused_and_the_server_goes_on(make, server, checkpoint, workflow, error_of, picture):
    path = server.base / "models" / "checkpoints" / f"{make.__name__}.safetensors"
    make(BadFile(checkpoint), path)
    message = error_of(workflow(ckpt_name=path.name))
    assert path.name in message
    for fragment in CASES[make]:
        assert fragment in message
    path.unlink()
    picture(decode_only(workflow()))


@pytest.mark.parametrize("name", ["gone.safetensors", "../outside.safetensors"])
def test_a_file_that_is_not_in_the_folder_is_refused(name, server, workflow, error_of, picture, tmp_path):
    (server.base / "models" / "outside.safetensors").write_bytes(b"secret")
    asked = workflow()
    asked["1"]["inputs"]["ckpt_name"] = ["9", 0]
    asked["9"] = {"class_type": "TestAnyName", "inputs": {"name": name}}
    message = error_of(asked)
    assert name in message
    assert "no such file in the checkpoints folder" in message
    picture(decode_only(workflow()))


def test_a_name_that_is_not_listed_is_refused_at_once(server, workflow):
    with pytest.raises(RuntimeError, match="value_not_in_list"):
        server.run(workflow(ckpt_name="gone.safetensors"))


def test_too_little_ram_is_said_before_anything_is_read(server, checkpoint, workflow, error_of, picture):
    def set_free_ram(nbytes):
        server.run({"1": {"class_type": "TestSetFreeRam", "inputs": {"nbytes": nbytes}}})

    server.free()  # what is in memory needs no more of it
    set_free_ram(2**26)
    message = error_of(workflow(single_blocks_cuda_size=20))
    set_free_ram(0)
    assert checkpoint.name in message
    assert "GiB of RAM" in message
    assert "0.06 GiB are free" in message
    picture(workflow(single_blocks_cuda_size=20, steps=1))
