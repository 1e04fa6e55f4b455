"""The operator's ONNX schema."""

from __future__ import annotations

import onnx

from qwenport.contract import DOMAIN, DTYPES, ROTARY_EMBEDDING

NAME = ROTARY_EMBEDDING
VERSION = 1


def schema() -> onnx.defs.OpSchema:
    """Return the ONNX schema; register it with `onnx.defs.register_schema` to check a graph."""
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc="Rotates x [batch, heads, seq, head_dim] by its positions' angles, half-split layout.",
        inputs=[
            parameter("x", "T"),
            parameter("cos_cache", "T"),
            parameter("sin_cache", "T"),
            parameter("position_ids", "tensor(int64)"),
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", [dtype.schema for dtype in DTYPES.values()], "floating point")],
    )
