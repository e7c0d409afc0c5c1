"""How small the text encoders of Flux.1 are in tests: of the fixtures ``clip_l`` and ``t5``."""

LAYERS = 2
T5 = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "vocab_size": 500}
CLIP_L = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
