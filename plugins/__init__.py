"""The custom operators. One folder an operator: its meaning (schema, torch reference, ONNX function body).

A model carries each operator it uses as an ONNX function, so it runs without any plugin.
"""

from qwenport.plugins import moe_experts, moe_router, rotary_embedding
from qwenport.plugins.function_body import DOMAIN, VERSION

__all__ = ["DOMAIN", "VERSION", "moe_experts", "moe_router", "rotary_embedding"]
