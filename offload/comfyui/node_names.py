"""Names of this package's nodes, for advice in errors. Nothing else in ``offload`` knows nodes."""

QUANTISE = "Quantise Flux to NF4 and Save"
STREAM = "Stream Model Blocks"
STREAM_ENCODER = "Stream Text Encoder"
