"""Names and shapes of an all-in-one Flux.1 checkpoint, written down by hand so that nothing is checked against itself.

Every function maps tensor names, without the prefix they have in the file, to shapes.
"""

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, inp: int) -> Shapes:
    return {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}


def flux(
    double_blocks: int,
    single_blocks: int,
    *,
    guidance: bool,
    in_channels: int = 64,
    hidden: int = 3072,
    t5: int = 4096,
    clip_l: int = 768,
) -> Shapes:
    """The transformer in Black Forest Labs' names. ``guidance`` tells dev from schnell, ``t5`` and ``clip_l`` are the
    widths of its text encoders."""
    mlp, head = 4 * hidden, 128
    shapes = linear("img_in", hidden, in_channels) | linear("txt_in", hidden, t5)
    embedders = {"time_in": 256, "vector_in": clip_l} | ({"guidance_in": 256} if guidance else {})
    for name, size in embedders.items():
        shapes |= linear(f"{name}.in_layer", hidden, size) | linear(f"{name}.out_layer", hidden, hidden)
    for i in range(double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= linear(f"{block}_mod.lin", 6 * hidden, hidden)
            shapes |= linear(f"{block}_attn.qkv", 3 * hidden, hidden) | linear(f"{block}_attn.proj", hidden, hidden)
            shapes |= {f"{block}_attn.norm.{part}_norm.scale": (head,) for part in ("query", "key")}
            shapes |= linear(f"{block}_mlp.0", mlp, hidden) | linear(f"{block}_mlp.2", hidden, mlp)
    for i in range(single_blocks):
        block = f"single_blocks.{i}"
        shapes |= linear(f"{block}.modulation.lin", 3 * hidden, hidden)
        shapes |= linear(f"{block}.linear1", 3 * hidden + mlp, hidden) | linear(
            f"{block}.linear2", hidden, hidden + mlp
        )
        shapes |= {f"{block}.norm.{part}_norm.scale": (head,) for part in ("query", "key")}
    return (
        shapes
        | linear("final_layer.linear", in_channels_out(in_channels), hidden)
        | linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    )


def in_channels_out(in_channels: int) -> int:
    """Fill (384) and Canny/Depth (128) take more channels in, and give the same 64 out."""
    return min(in_channels, 64)


def flux2_of_diffusers(hidden: int, text: int, doubles: int, singles: int, guidance: bool) -> Shapes:
    """A FLUX.2 in the names of diffusers, where no layer has a bias.

    Args:
        hidden: The width of a token: 6144 of dev, 4096 of klein 9B, 3072 of klein 4B.
        text: What the text encoder gives for a token.
        doubles: Blocks of that kind.
        singles: Blocks of that kind.
        guidance: Whether it is told the guidance, as dev is.
    """
    mlp = 3 * hidden
    shapes: Shapes = {"x_embedder.weight": (hidden, 128), "context_embedder.weight": (hidden, text)}
    for embedder in ("timestep", "guidance")[: 1 + guidance]:
        shapes[f"time_guidance_embed.{embedder}_embedder.linear_1.weight"] = (hidden, 256)
        shapes[f"time_guidance_embed.{embedder}_embedder.linear_2.weight"] = (hidden, hidden)
    shapes |= {f"double_stream_modulation_{stream}.linear.weight": (6 * hidden, hidden) for stream in ("img", "txt")}
    shapes["single_stream_modulation.linear.weight"] = (3 * hidden, hidden)
    for i in range(doubles):
        block = f"transformer_blocks.{i}"
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes[f"{block}.attn.{layer}.weight"] = (hidden, hidden)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{norm}.weight"] = (128,)
        for stream in ("ff", "ff_context"):
            shapes[f"{block}.{stream}.linear_in.weight"] = (2 * mlp, hidden)
            shapes[f"{block}.{stream}.linear_out.weight"] = (hidden, mlp)
    for i in range(singles):
        block = f"single_transformer_blocks.{i}.attn"
        shapes[f"{block}.to_qkv_mlp_proj.weight"] = (3 * hidden + 2 * mlp, hidden)
        shapes[f"{block}.to_out.weight"] = (hidden, hidden + mlp)
        shapes |= {f"{block}.{norm}.weight": (128,) for norm in ("norm_q", "norm_k")}
    return shapes | {"norm_out.linear.weight": (2 * hidden, hidden), "proj_out.weight": (128, hidden)}


def language_model(
    prefix: str, layers: int, hidden: int, heads: int, mlp: int, vocabulary: int, *, norms_of_heads: bool = False
) -> Shapes:
    """A text encoder as transformers saves it, 8 heads of keys and values: Mistral 3 or, with ``norms_of_heads``,
    Qwen3."""
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (vocabulary, hidden), f"{prefix}norm.weight": (hidden,)}
    for i in range(layers):
        layer = f"{prefix}layers.{i}"
        sizes = {"q_proj": (128 * heads, hidden), "k_proj": (1024, hidden), "v_proj": (1024, hidden)}
        shapes |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in sizes.items()}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, 128 * heads)
        shapes |= {f"{layer}.mlp.{name}.weight": (mlp, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, mlp)
        shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if norms_of_heads:
            shapes |= {f"{layer}.self_attn.{norm}.weight": (128,) for norm in ("q_norm", "k_norm")}
    return shapes


def clip_l(width: int = 768) -> Shapes:
    shapes: Shapes = {
        "transformer.text_model.embeddings.token_embedding.weight": (49408, width),
        "transformer.text_model.embeddings.position_embedding.weight": (77, width),
    }
    for i in range(12):
        layer = f"transformer.text_model.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", width, width)
        shapes |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
    shapes |= _norm("transformer.text_model.final_layer_norm", width)
    return shapes | {"transformer.text_projection.weight": (width, width)}


def t5_xxl(layers: int, width: int = 4096) -> Shapes:
    mlp, heads = width * 5 // 2, width // 64
    shapes: Shapes = {
        "transformer.shared.weight": (32128, width),
        "transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads),
        "transformer.encoder.final_layer_norm.weight": (width,),
    }
    for i in range(layers):
        block = f"transformer.encoder.block.{i}"
        shapes |= {f"{block}.layer.0.SelfAttention.{part}.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{block}.layer.1.DenseReluDense.{part}.weight": (mlp, width) for part in ("wi_0", "wi_1")}
        shapes |= {f"{block}.layer.1.DenseReluDense.wo.weight": (width, mlp)}
        shapes |= {f"{block}.layer.{part}.layer_norm.weight": (width,) for part in (0, 1)}
    return shapes


def vae() -> Shapes:
    """The autoencoder with 16 latent channels, in the original names."""
    widths = (128, 256, 512, 512)
    shapes = _conv("encoder.conv_in", 128, 3) | _conv("decoder.conv_in", 512, 16)
    width = 128
    for level, out in enumerate(widths):
        for j in range(2):
            shapes |= _resnet(f"encoder.down.{level}.block.{j}", width, out)
            width = out
        if level < 3:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    for level, out in reversed(list(enumerate(widths))):
        for j in range(3):
            shapes |= _resnet(f"decoder.up.{level}.block.{j}", width, out)
            width = out
        if level > 0:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    for side in ("encoder", "decoder"):
        shapes |= _resnet(f"{side}.mid.block_1", 512, 512) | _resnet(f"{side}.mid.block_2", 512, 512)
        shapes |= _norm(f"{side}.mid.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            shapes |= _conv(f"{side}.mid.attn_1.{part}", 512, 512, kernel=1)
    shapes |= _norm("encoder.norm_out", 512) | _conv("encoder.conv_out", 32, 512)
    return shapes | _norm("decoder.norm_out", 128) | _conv("decoder.conv_out", 3, 128)


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _conv(name: str, out: int, inp: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (out, inp, kernel, kernel), f"{name}.bias": (out,)}


def _resnet(name: str, inp: int, out: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inp) | _conv(f"{name}.conv1", out, inp)
    shapes |= _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out)
    return shapes | (_conv(f"{name}.nin_shortcut", out, inp, kernel=1) if inp != out else {})
