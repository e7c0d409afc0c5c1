"""What this package's nodes are called where advice names them: the rest of ``offload`` knows no nodes."""

QUANTISE = "Quantise Flux to NF4 and Save"
STREAM = "Stream Model Blocks"
STREAM_ENCODER = "Stream Text Encoder"
