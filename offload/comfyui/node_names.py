"""Names of this package's nodes, for advice in errors. Nothing else in ``offload`` knows nodes."""

from typing import NamedTuple


class Advice(NamedTuple):
    """What errors name: the output of ComfyUI's that is streamed, and the nodes that quantise and stream it."""

    output: str
    quantise: str
    stream: str


OF_MODELS = Advice("MODEL", "Quantise Flux to NF4 and Save", "Stream Model Blocks")
OF_ENCODERS = Advice("CLIP", "Quantise Text Encoder to NF4 and Save", "Stream Text Encoder")
