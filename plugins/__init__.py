"""The custom operators. One folder an operator: its meaning (schema, torch reference, ONNX function body).

A model carries each operator it uses as an ONNX function, so it runs without any plugin. The operators are modules
of this package, imported by those who compute with them (`from qwenport.plugins import moe_router`), since they bring
torch; here are only the names that graphs use. `compiled` makes the library of CUDA kernels that TensorRT loads.
"""

from qwenport.plugins.names import DOMAIN, MOE_EXPERTS, MOE_ROUTER, ROTARY_EMBEDDING, VERSION

__all__ = ["DOMAIN", "MOE_EXPERTS", "MOE_ROUTER", "ROTARY_EMBEDDING", "VERSION"]
