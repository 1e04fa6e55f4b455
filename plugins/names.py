"""What the operators are called in a graph. Importing this brings neither torch nor onnx."""

DOMAIN = "qwenport"
VERSION = 1
"""Of the domain: it counts all operators' versions together."""

ROTARY_EMBEDDING = "RotaryEmbedding"
MOE_ROUTER = "MoERouter"
MOE_EXPERTS = "MoEExperts"
