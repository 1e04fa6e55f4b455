"""The operator's ONNX schema."""

from __future__ import annotations

import onnx

from qwenport.contract import DOMAIN, DTYPES, FP32, MOE_ROUTER

NAME = MOE_ROUTER
VERSION = 1

TOP_K, SWITCH, EXPERT_CHOICE = "top_k", "switch", "expert_choice"
KINDS = (TOP_K, SWITCH, EXPERT_CHOICE)


def schema() -> onnx.defs.OpSchema:
    """Return the ONNX schema; register it with `onnx.defs.register_schema` to check a graph."""
    parameter = onnx.defs.OpSchema.FormalParameter
    attribute, kinds = onnx.defs.OpSchema.Attribute, onnx.defs.OpSchema.AttrType
    return onnx.defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc="Softmax router of a mixture of experts.",
        inputs=[parameter("logits", "T")],
        outputs=[parameter("weights", FP32.schema), parameter("indices", "tensor(int64)")],
        type_constraints=[("T", [dtype.schema for dtype in DTYPES.values()], "floating point")],
        attributes=[
            attribute("kind", kinds.STRING, "top_k, switch or expert_choice", required=True),
            attribute("k", onnx.helper.make_attribute("k", 1), "top_k: experts per token"),
            attribute(
                "normalize",
                onnx.helper.make_attribute("normalize", 0),
                "top_k: 1 makes a token's weights sum to 1",
            ),
            attribute(
                "capacity_factor",
                onnx.helper.make_attribute("capacity_factor", 1.0),
                "switch, expert_choice: an expert takes ceil(tokens * factor / experts) tokens",
            ),
        ],
    )
