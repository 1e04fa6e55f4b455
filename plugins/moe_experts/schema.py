"""The operator's ONNX schema."""

from __future__ import annotations

import onnx

from qwenport.contract import DOMAIN, DTYPES, FP32, MOE_EXPERTS

NAME = MOE_EXPERTS
VERSION = 1
LARGEST_FP8 = 448.0
"""Of e4m3."""
INPUTS = ("x", "indices", "weights", "gate_up", "down")
INPUT_SCALES = "input_scales"
"""The optional input after INPUTS."""
BY_COLUMNS = f"{NAME}ByColumns"
"""A function that lowering for TensorRT puts in the operator's place; no package has it."""
COLUMNS = ("gate_up_columns", "down_columns")
"""Its inputs after INPUTS, in place of INPUT_SCALES."""


def schema() -> onnx.defs.OpSchema:
    """Return the ONNX schema; register it with `onnx.defs.register_schema` to check a graph."""
    parameter = onnx.defs.OpSchema.FormalParameter
    types = dict(zip(INPUTS, ("T", "tensor(int64)", FP32.schema, "T", "T"), strict=True))
    return onnx.defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc="Each token's chosen SwiGLU experts, weighted and summed.",
        inputs=[
            *(parameter(name, kind) for name, kind in types.items()),
            parameter(
                INPUT_SCALES,
                "T",
                "[E, 3]: what an expert's gate, up and down multiply is rounded to FP8 (e4m3), with these scales",
                param_option=onnx.defs.OpSchema.FormalParameterOption.Optional,
            ),
        ],
        outputs=[parameter("y", "T")],
        attributes=[
            onnx.defs.OpSchema.Attribute(
                "by_expert",
                onnx.helper.make_attribute("by_expert", 0),
                "0: indices are each token's experts; 1: each expert's tokens",
            ),
            onnx.defs.OpSchema.Attribute(
                "round_inner",
                onnx.helper.make_attribute("round_inner", 0),
                "1: what down multiplies is rounded to FP8 (e4m3), with a scale for each token and expert",
            ),
        ],
        type_constraints=[("T", [dtype.schema for dtype in DTYPES.values()], "floating point")],
    )
