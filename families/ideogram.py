"""Ideogram 4: one list of layers. Each picture takes two models, one with the prompt and one without.

ComfyUI has the names of Ideogram's code. Where it has one weight for q, k and v, stacked row-wise, diffusers has three.
"""

from .family import Family, Layout

_LIST = "layers"
_MARK = "embed_image_indicator."
_SAMPLE = "layers.0.feed_forward.w1"

IDEOGRAM4 = Family(
    "Ideogram 4",
    frozenset({"ideogram4"}),
    {_LIST: _LIST},
    (
        Layout("Ideogram", (_MARK, "layers.0.attention.qkv."), _SAMPLE),
        Layout(
            "diffusers",
            (_MARK, "layers.0.attention.to_q."),
            _SAMPLE,
            {_LIST: _LIST},
            {
                _LIST: {
                    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
                    "attention.o": ("attention.to_out.0",),
                }
            },
            is_comfyuis=False,
        ),
    ),
    ("input_proj.weight", "final_layer.linear.weight"),
    embeddings=frozenset({"embed_image_indicator.weight"}),
    since=lambda _: "0.24.0",
)
