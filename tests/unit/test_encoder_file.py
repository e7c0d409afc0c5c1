"""Text encoders in files of their own: those that no node loads in 4 bits are refused with what they are."""

import pytest
from packed_tensors import packed_tensors
from sparse_file import write_sparse

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
from flux_nf4.nf4_loader.checkpoint.encoder_file import read_encoder_file
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError
from flux_nf4.nf4_loader.checkpoint.require import require_transformer

WIDTH = "model.layers.0.post_attention_layernorm.weight"
"""Llama 3.1 8B has the names of Mistral 3, and another width."""


def refusals(path, tensors):
    """What the streamed loaders of transformers and of text encoders say of a file with these tensors."""
    write_sparse(path, tensors)
    with pytest.raises(CheckpointError) as as_transformer:
        require_transformer(read_catalogue(path))
    with pytest.raises(CheckpointError) as as_encoder:
        read_encoder_file(path)
    return str(as_transformer.value), str(as_encoder.value)


@pytest.mark.parametrize(
    ("prefix", "name", "kind"),
    [
        ("t5xxl.transformer.", "encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
        ("text_encoders.clip_l.transformer.", "text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
        ("a.b.", "model.layers.0.self_attn.q_proj.weight", "a language model (a text encoder)"),
    ],
)
def test_a_prefix_that_no_loader_knows_is_named(prefix, name, kind, tmp_path):
    tensors = packed_tensors(prefix + name, (64, 64), "nf4", 64) | {prefix + WIDTH: ("BF16", (5120,), None)}
    for message in refusals(tmp_path / "encoder.safetensors", tensors):
        assert f"it is {kind} in 4 bits, whose names begin with '{prefix}', which no loader knows" in message


def test_a_4bit_language_model_that_no_node_loads_is_not_sent_to_the_node_that_refuses_it(tmp_path):
    tensors = packed_tensors("model.layers.0.self_attn.q_proj.weight", (64, 64), "nf4", 64)
    as_transformer, as_encoder = refusals(tmp_path / "llama.safetensors", tensors | {WIDTH: ("BF16", (4096,), None)})
    assert "If it is T5-XXL" in as_transformer
    assert "it is another language model in 4 bits, or one of another size, for which there is no node" in as_encoder
    assert "(streamed)" not in as_encoder


def test_a_dense_language_model_is_sent_to_its_loader(tmp_path):
    tensors = dict.fromkeys((WIDTH, "model.layers.0.input_layernorm.weight"), ("BF16", (4096,), None))
    for message in refusals(tmp_path / "llama.safetensors", tensors):
        assert "it is a language model" in message
        assert "Load it with 'Load CLIP'" in message
