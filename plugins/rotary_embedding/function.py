"""The operator's body in standard ONNX, so that a model using it runs without the plugin."""

from __future__ import annotations

import onnx_ir as ir

from qwenport.contract import DOMAIN
from qwenport.plugins.rotary_embedding.schema import NAME

ONNX_OPSET = 23  # ai.onnx RotaryEmbedding appeared here and has not changed up to opset 24


def function_body(opset: int) -> ir.Function:
    """Return the model-local function for a model of ai.onnx version `opset` (at least 23)."""
    if opset < ONNX_OPSET:
        raise ValueError(f"RotaryEmbedding needs ai.onnx {ONNX_OPSET} or later, not {opset}")
    inputs = [ir.Value(name=name) for name in ("x", "cos_cache", "sin_cache", "position_ids")]
    node = ir.node("RotaryEmbedding", inputs=inputs, attributes={"interleaved": 0}, name="rotate")
    node.outputs[0].name = "y"
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset}, name=NAME)
    return ir.Function(DOMAIN, NAME, "", graph=graph, attributes=[])
