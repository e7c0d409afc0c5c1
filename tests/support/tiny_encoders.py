"""Tiny text encoders, quantised and saved by transformers, and ComfyUI made to take them for the real ones.

Widths are an eighth of the real ones, which is whole blocks of 64. ComfyUI's configurations are made as small, and its
detection and ours are shown the real widths.
"""

import base64
import dataclasses
import functools
import importlib
import json
from dataclasses import dataclass
from typing import Any

import comfy.sd
import comfy.text_encoders.flux as flux
import comfy.text_encoders.llama as llama
import comfy.text_encoders.qwen_vl as qwen_vl
import torch
import transformers
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit as BnbLinear4bit
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from flux_nf4.families import encoders as table

PART = 8
TEXT = {"intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 400}
HEADS = {"num_key_value_heads": 2, "head_dim": 32}
QWEN25_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
T5 = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "vocab_size": 400}
CLIP_L = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Tiny:
    """A tiny encoder: transformers' class and configuration; ComfyUI's CLIP type, configuration and name of it."""

    name: str
    model: str
    config: str
    options: Any
    clip_type: str
    comfy_config: str
    key: str
    layers: int = 3

    @property
    def is_known(self) -> bool:
        """Whether this ComfyUI has it."""
        encoder = next(one for one in table.ENCODERS if one.name == self.name)
        module, function = encoder.types[self.clip_type].split(".")
        try:
            found = importlib.import_module(f"comfy.text_encoders.{module}")
        except ImportError:
            return False
        return hasattr(found, function) and (self.name != "Mistral 3" or _makes_tokenizers())


def _makes_tokenizers() -> bool:
    """Whether ComfyUI's tokenizer of Mistral 3 goes with the transformers that is installed."""
    try:
        flux.Mistral3Tokenizer(tokenizer_data={"tekken_model": tekken()})
    except TypeError:
        return False
    return True


def _text(width: int, layers: int, **others: Any) -> dict[str, Any]:
    return TEXT | {"hidden_size": width // PART, "num_hidden_layers": layers} | others


def _qwen3_vl(width: int, layers: int) -> dict[str, Any]:
    rope = {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"}
    return {
        "text_config": _text(width, layers, rope_scaling=rope, **HEADS),
        "vision_config": VISION
        | {"out_hidden_size": width // PART, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    }


TINY = (
    Tiny(
        "Mistral 3",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": _text(5120, 40, model_type="mistral", **HEADS),
            "vision_config": {"model_type": "pixtral", "hidden_size": 64, "intermediate_size": 64, "image_size": 28}
            | {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14},
            "image_token_index": 10,
            "spatial_merge_size": 1,
            "tie_word_embeddings": False,
        },
        "flux2",
        "Mistral3Small24BConfig",
        "mistral3_24b",
        40,
    ),
    Tiny(
        "Qwen3 4B",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _text(2560, 28, tie_word_embeddings=True, **HEADS),
        "flux2",
        "Qwen3_4BConfig",
        "qwen3_4b",
        28,
    ),
    Tiny(
        "Qwen3 4B",
        "Qwen3Model",
        "Qwen3Config",
        _text(2560, 3, **HEADS),
        "lumina2",
        "Qwen3_4BConfig",
        "qwen3_4b",
    ),
    Tiny(
        "Qwen3 8B",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _text(4096, 28, tie_word_embeddings=False, **HEADS),
        "flux2",
        "Qwen3_8BConfig",
        "qwen3_8b",
        28,
    ),
    Tiny(
        "Qwen2.5-VL 7B",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": _text(2048, 3)
            | QWEN25_HEADS
            | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6], "rope_type": "default"}},
            "vision_config": VISION | {"out_hidden_size": 2048 // PART},
        },
        "qwen_image",
        "Qwen25_7BVLI_Config",
        "qwen25_7b",
    ),
    Tiny(
        "Qwen3-VL 8B",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        _qwen3_vl(4096, 37),
        "ideogram4",
        "Qwen3VL_8BConfig",
        "qwen3vl_8b",
        37,
    ),
    Tiny(
        "Qwen3-VL 4B",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        _qwen3_vl(2560, 36),
        "krea2",
        "Qwen3VL_4BConfig",
        "qwen3vl_4b",
        36,
    ),
)


def make_small(monkeypatch: Any, tiny: Tiny) -> None:
    """ComfyUI's text encoder is as small as this one, in fp32, and is known all the same."""
    small = [dataclasses.replace(one, width=one.width and one.width // PART) for one in table.ENCODERS]
    monkeypatch.setattr(table, "ENCODERS", tuple(small))
    monkeypatch.setattr(comfy.sd, "detect_te_model", functools.partial(_detect, comfy.sd.detect_te_model))
    monkeypatch.setattr("comfy.model_management.text_encoder_dtype", lambda *_, **__: torch.float32)
    if hasattr(llama, tiny.comfy_config):
        _shrink(monkeypatch, tiny)
    real = qwen_vl.Qwen2VLVisionTransformer
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_layers": 2}
    monkeypatch.setattr(qwen_vl, "Qwen2VLVisionTransformer", lambda **given: real(**given | vision))


def _shrink(monkeypatch: Any, tiny: Tiny) -> None:
    text = tiny.options.get("text_config", tiny.options)
    sizes = {name: text[name] for name in (*TEXT, "hidden_size", "num_hidden_layers", "num_key_value_heads")}
    places = [llama]
    if "VL" in tiny.comfy_config and "3VL" in tiny.comfy_config:
        import comfy.text_encoders.qwen3vl as qwen3vl

        places.append(qwen3vl)
        vision = {"hidden_size": 64, "intermediate_size": 64, "depth": 2, "deepstack_visual_indexes": [0, 1]}
        monkeypatch.setitem(qwen3vl.QWEN3VL_VISION, tiny.key, vision)
        for name, value in (("num_heads", 2), ("num_position_embeddings", 16)):
            monkeypatch.setitem(qwen3vl.QWEN3VL_VISION_COMMON, name, value)
    real = getattr(llama, tiny.comfy_config)
    dims = getattr(real, "rope_dims", None)
    own = {"head_dim": 32} | ({"rope_dims": [count // 4 for count in dims]} if dims else {})
    config = functools.partial(type(tiny.comfy_config, (real,), own), **sizes)
    monkeypatch.setattr(llama, tiny.comfy_config, config)
    if len(places) > 1:
        monkeypatch.setattr(places[1], tiny.comfy_config, config)
        monkeypatch.setitem(places[1].QWEN3VL_CONFIGS, tiny.key, config)


def _detect(detect: Any, state: Any) -> Any:
    """ComfyUI's detection, shown the real widths."""
    shown = dict(state)
    for name, tensor in state.items():
        if name.endswith(("post_attention_layernorm.weight", "merger.linear_fc2.weight")):
            shown[name] = torch.empty(tensor.shape[0] * PART, *tensor.shape[1:], device="meta")
        elif name.endswith("k_proj.bias"):
            shown[name] = torch.empty(512, device="meta")
    return detect(shown)


def save(tiny: Tiny, folder: Any, *, double_quant: bool = False, quant_type: str = "nf4", shards: str = "1GB") -> Any:
    """Quantised by bitsandbytes and saved by transformers to ``folder``. Returns transformers' model."""
    torch.manual_seed(0)
    kind, dense = getattr(transformers, tiny.model), folder / "dense"
    kind(getattr(transformers, tiny.config)(**tiny.options)).save_pretrained(dense)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    model = kind.from_pretrained(dense, quantization_config=quantisation, dtype=torch.float32, device_map={"": "cpu"})
    model.save_pretrained(folder, max_shard_size=shards)
    if tiny.name == "Mistral 3":
        (folder / "tekken.json").write_bytes(tekken())
    return model


def save_t5(folder: Any, layers: int = 2) -> Any:
    """As `save`, of a T5."""
    torch.manual_seed(0)
    config = transformers.T5Config(**T5, num_layers=layers, feed_forward_proj="gated-gelu", is_encoder_decoder=False)
    kind, dense = transformers.T5EncoderModel, folder / "t5 dense"
    kind(config).save_pretrained(dense)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["wo"])
    model = kind.from_pretrained(dense, quantization_config=quantisation, dtype=torch.float32, device_map={"": "cpu"})
    model.save_pretrained(folder / "t5")
    return model


def save_clip_l(folder: Any) -> Any:
    """A dense CLIP-L. Returns its file."""
    torch.manual_seed(1)
    state = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_L)).state_dict()
    named = {name if name.startswith("text_model.") else f"text_model.{name}": state[name] for name in state}
    save_file(named, folder / "clip_l.safetensors")
    return folder / "clip_l.safetensors"


def dense_twin(model: Any) -> dict[str, torch.Tensor]:
    """The values of a quantised model as bitsandbytes dequantises them, in fp32, by the names of ComfyUI's model."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".weight." not in name}
    state.pop("encoder.embed_tokens.weight", None)  # T5's, which is the same as ``shared``
    for name, module in model.named_modules():
        if isinstance(module, BnbLinear4bit):
            module.weight.quant_state.dtype = torch.float32
            state[f"{name}.weight"] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
    named = {table.encoder_name(name): tensor.clone() for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if name is not None}


def tekken() -> bytes:
    """Mistral's tokenizer, with the 256 bytes as its only ordinary tokens."""
    special = [{"rank": rank, "token_str": f"<{rank}>"} for rank in range(20)]
    vocab = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {"default_vocab_size": 276, "default_num_special_tokens": 20}
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": special}).encode()


def for_comfyui(tiny: Tiny, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` as a file for ComfyUI has it."""
    if tiny.name == "Mistral 3":
        return state | {"tekken_model": torch.frombuffer(bytearray(tekken()), dtype=torch.uint8)}
    if tiny.name.startswith("Qwen3-VL") and tiny.clip_type != "flux2":
        prefixes = {"model": "model.language_model", "visual": "model.visual"}
        return {
            ".".join([prefixes.get(first, first), rest]): tensor
            for (first, _, rest), tensor in ((name.partition("."), tensor) for name, tensor in state.items())
        }
    return state


def tokens_of(key: str, count: int = 12) -> dict[str, Any]:
    """A prompt, as the tokenizer of the encoder ``key`` gives it."""
    return {key: [[(5 + 7 * i % 390, 1.0) for i in range(count)]]}
