"""The operator's body in standard ONNX: sparse for one token and for thousands, with static shapes.

The T*k pairs (token, expert) are ordered by expert and each expert's group is padded to blocks of b rows, so that
a block has one expert and the work is one batched matmul over blocks. b = ceil(T*k / E) grows with the number of
tokens: one token reads the weights of k experts, and however many tokens there are, at most 2E blocks of weights are
gathered. The maximum number of blocks follows from the shapes, so no shape depends on data.
"""

from __future__ import annotations

import onnx_ir as ir

from qwenport.plugins.function_body import FunctionBody
from qwenport.plugins.moe_experts.schema import INPUTS, NAME

FLOAT, INT64 = int(ir.DataType.FLOAT), int(ir.DataType.INT64)
ONNX_OPSET = 18  # Split's num_outputs, ReduceSum's and ScatterElements' present forms


def function_body(opset: int, *, by_expert: bool = False) -> ir.Function:
    """Return the model-local function for a model of ai.onnx version `opset` (at least 18)."""
    if opset < ONNX_OPSET:
        raise ValueError(f"MoEExperts needs ai.onnx {ONNX_OPSET} or later, not {opset}")
    body = FunctionBody(*INPUTS)
    y = (_by_expert if by_expert else _by_token)(body)
    return body.function(NAME, {"y": y}, opset, [ir.AttrInt64("by_expert", int(by_expert))])


def _by_token(body: FunctionBody) -> ir.Value:
    op, one, zero = body.op, body.integers(1), body.integers(0)
    given, experts, weights, gate_up, down = body.inputs

    # leading axes become one of tokens; `given` keeps the shape to return to
    width = body.size(given, -1)
    x = op("Reshape", given, op("Concat", body.integers(-1), width, axis=0))
    tokens, k = body.size(x, 0), body.size(experts, -1)
    count = body.size(gate_up, 0)
    pairs = op("Mul", tokens, k)
    rows = op("Max", op("Div", op("Sub", op("Add", pairs, count), one), count), one)
    spare = op("Sub", rows, one)
    blocks = op("Div", op("Add", pairs, op("Mul", spare, op("Min", count, pairs))), rows)

    # the place of each pair: its expert's first block, then its rank among that expert's pairs
    flat = op("Reshape", experts, body.integers(-1))
    column = op("Unsqueeze", flat, one)
    chosen = op("Cast", op("Equal", column, body.arange(count)), to=INT64)
    running = op("CumSum", chosen, body.integer(0))
    rank = op("Sub", op("Squeeze", op("GatherElements", running, column, axis=1), one), one)
    group = op("ReduceSum", chosen, zero, keepdims=0)
    group_blocks = op("Div", op("Add", group, spare), rows)
    ends = op("CumSum", group_blocks, body.integer(0))
    first = op("Gather", op("Sub", ends, group_blocks), flat)
    place = op("Add", op("Mul", first, rows), rank)

    # the expert of each block, and the token of each row; the results of spare blocks and rows are unused
    passed = op("LessOrEqual", ends, op("Unsqueeze", body.arange(blocks), one))
    expert = op("ReduceSum", op("Cast", passed, to=INT64), one, keepdims=0)
    expert = op("Min", expert, op("Sub", count, one))
    empty = op("Expand", zero, op("Mul", blocks, rows))
    source = op("ScatterElements", empty, place, op("Div", body.arange(pairs), k), axis=0)

    shape = op("Concat", blocks, rows, width, axis=0)
    gathered = op("Reshape", op("Gather", x, source), shape)
    outer = _swiglu(body, gathered, op("Gather", gate_up, expert), op("Gather", down, expert))
    by_row = op("Reshape", outer, op("Concat", body.integers(-1), width, axis=0))
    by_pair = op("Reshape", op("Gather", by_row, place), op("Concat", tokens, k, width, axis=0))

    parts = op("Cast", by_pair, to=FLOAT)
    factors = op("Reshape", weights, op("Concat", tokens, k, one, axis=0))
    y = op("ReduceSum", op("Mul", parts, factors), one, keepdims=0)
    return op("Reshape", op("CastLike", y, x), op("Shape", given))


def _by_expert(body: FunctionBody) -> ir.Value:
    """Every expert has the same number of tokens: one batched matmul, then a sum over each token's rows."""
    op = body.op
    x, tokens, weights, gate_up, down = body.inputs
    outer = _swiglu(body, op("Gather", x, tokens), gate_up, down)
    parts = op("Cast", outer, to=FLOAT)
    weighted = op("Mul", parts, op("Unsqueeze", weights, body.integers(-1)))
    rows = op("Reshape", weighted, op("Concat", body.integers(-1), body.size(x, 1), axis=0))
    zeros = op("Expand", op("Cast", body.integer(0), to=FLOAT), op("Shape", x))
    row_tokens = op("Reshape", tokens, body.integers(-1, 1))
    return op("CastLike", op("ScatterND", zeros, row_tokens, rows, reduction="add"), x)


def _swiglu(body: FunctionBody, x: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
    """x [n, rows, H], gate_up [n, 2I, H], down [n, H, I] -> [n, rows, H].

    Weights keep their layout, [out, in]; activations are transposed instead.
    """
    op = body.op
    inner = op("MatMul", gate_up, op("Transpose", x, perm=[0, 2, 1]))
    gate, up = body.ops(2, "Split", inner, axis=1, num_outputs=2)
    active = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
    return op("Transpose", op("MatMul", down, active), perm=[0, 2, 1])
