"""The operator's body in standard ONNX. All attributes except `kind` are the function's; each kind has its own body."""

from __future__ import annotations

import onnx_ir as ir

from qwenport.plugins.function_body import FunctionBody
from qwenport.plugins.moe_router.schema import EXPERT_CHOICE, KINDS, NAME, SWITCH

ONNX_OPSET = 18  # ReduceSum's and Min's present forms
FLOAT, INT64 = int(ir.DataType.FLOAT), int(ir.DataType.INT64)


def function_body(opset: int, kind: str) -> ir.Function:
    """Return the model-local function for a model of ai.onnx version `opset` (at least 18).

    Raises:
        ValueError: an unknown kind, or an older opset.
    """
    if opset < ONNX_OPSET:
        raise ValueError(f"MoERouter needs ai.onnx {ONNX_OPSET} or later, not {opset}")
    if kind not in KINDS:
        raise ValueError(f"routing kind {kind!r} is not one of {', '.join(KINDS)}")
    body = FunctionBody("logits")
    (logits,) = body.inputs
    probabilities = body.op("Softmax", body.op("Cast", logits, to=FLOAT), axis=-1)
    write = {SWITCH: _switch, EXPERT_CHOICE: _expert_choice}.get(kind, _top_k)
    weights, indices = write(body, probabilities)
    return body.function(
        NAME,
        {"weights": weights, "indices": indices},
        opset,
        [
            ir.AttrString("kind", kind),
            ir.AttrInt64("k", 1),
            ir.AttrInt64("normalize", 0),
            ir.AttrFloat32("capacity_factor", 1.0),
        ],
    )


def _top_k(body: FunctionBody, probabilities: ir.Value) -> tuple[ir.Value, ir.Value]:
    op, last = body.op, body.integers(-1)
    k = op("Reshape", body.attribute("k", ir.AttributeType.INT), body.integers(1))
    weights, experts = body.ops(2, "TopK", probabilities, k, axis=-1, sorted=1)
    normalize = op(
        "Cast", body.attribute("normalize", ir.AttributeType.INT), to=int(ir.DataType.BOOL)
    )
    one = op("Cast", body.integer(1), to=FLOAT)
    total = op("Where", normalize, op("ReduceSum", weights, last, keepdims=1), one)
    return op("Div", weights, total), experts


def _switch(body: FunctionBody, probabilities: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A token past its expert's capacity, counted in order, gets weight 0."""
    op, one = body.op, body.integers(1)
    weights, experts = body.ops(2, "TopK", probabilities, one, axis=-1, sorted=1)
    mine = op("Equal", experts, body.arange(body.size(probabilities, 1)))
    running = op("CumSum", op("Cast", mine, to=INT64), body.integer(0))
    rank = op("GatherElements", running, experts, axis=1)
    kept = op("LessOrEqual", rank, _capacity(body, probabilities))
    return op("Mul", weights, op("Cast", kept, to=FLOAT)), experts


def _expert_choice(body: FunctionBody, probabilities: ir.Value) -> tuple[ir.Value, ir.Value]:
    op = body.op
    most = op("Min", _capacity(body, probabilities), body.size(probabilities, 0))
    scores = op("Transpose", probabilities, perm=[1, 0])
    weights, tokens = body.ops(2, "TopK", scores, most, axis=-1, sorted=1)
    return weights, tokens


def _capacity(body: FunctionBody, probabilities: ir.Value) -> ir.Value:
    """ceil(tokens * capacity_factor / experts) in fp32, at least 1, as a one-element vector."""
    op = body.op
    tokens, experts = (op("Cast", body.size(probabilities, axis), to=FLOAT) for axis in (0, 1))
    factor = body.attribute("capacity_factor", ir.AttributeType.FLOAT)
    share = op("Ceil", op("Div", op("Mul", tokens, factor), experts))
    return op("Max", op("Cast", share, to=INT64), body.integers(1))
