"""The custom operators. One folder an operator: its meaning (schema, torch reference, ONNX function body).

A model carries each operator it uses as an ONNX function, so it runs without any plugin.
"""

from qwenport.plugins import rotary_embedding

DOMAIN = "qwenport"

__all__ = ["DOMAIN", "rotary_embedding"]
