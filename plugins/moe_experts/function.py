"""The operator's body in standard ONNX: sparse for one token and for thousands, with static shapes.

The T*k pairs (token, expert) are ordered by expert and each expert's group is padded to blocks of b rows, so that
a block has one expert and the work is one batched matmul over blocks. b = ceil(T*k / E) grows with the number of
tokens: one token reads the weights of k experts, and however many tokens there are, at most 2E blocks of weights are
gathered. The maximum number of blocks follows from the shapes, so no shape depends on data.

TensorRT gets another body, which a pass of its lowering puts in this one's place. Its kernel generator reads a gathered
weight once if the product is written as multiplications and a sum, while a matmul needs the gathered weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qwenport.plugins.function_body import FunctionBody
from qwenport.plugins.moe_experts.schema import (
    BY_COLUMNS,
    COLUMNS,
    INPUT_SCALES,
    INPUTS,
    LARGEST_FP8,
    NAME,
)

FLOAT, INT64 = int(ir.DataType.FLOAT), int(ir.DataType.INT64)
FLOAT8 = int(ir.DataType.FLOAT8E4M3FN)
ONNX_OPSET = 18  # Split's num_outputs, ReduceSum's and ScatterElements' present forms


def function_body(
    opset: int, *, by_expert: bool = False, round_inner: bool = False, input_scales: bool = False
) -> ir.Function:
    """Return the model-local function for a model of ai.onnx version `opset`: at least 18, or 19 if it rounds to FP8.

    With `input_scales` it has that input.
    """
    if opset < ONNX_OPSET:
        raise ValueError(f"MoEExperts needs ai.onnx {ONNX_OPSET} or later, not {opset}")
    body = FunctionBody(*INPUTS, *([INPUT_SCALES] if input_scales else []))
    swiglu = _swiglu_rounded if round_inner else _swiglu
    if input_scales:
        swiglu = _swiglu_of_scales
    y = (_by_expert if by_expert else _by_token)(body, swiglu)
    return body.function(NAME, {"y": y}, opset, _attributes(by_expert, round_inner))


def _attributes(by_expert: bool, round_inner: bool) -> list[ir.Attr]:
    return [
        ir.AttrInt64("by_expert", int(by_expert)),
        ir.AttrInt64("round_inner", int(round_inner)),
    ]


def tensorrt_body(
    opset: int, rounded_in: ir.DataType | None = None, *, input_scales: bool = False
) -> ir.Function:
    """Return the function, by token, for TensorRT: a decode step reads each pair's weights once and copies none.

    Up to E pairs are multiplied one by one, more are computed in at most 2E blocks. Both ways are in the graph, and one
    of them gets no tokens.

    Args:
        opset: ai.onnx's.
        rounded_in: T, if what down multiplies is rounded to FP8, or with `input_scales` what each linear multiplies.
        input_scales: whether it has that input.
    """
    inputs = (*INPUTS, INPUT_SCALES) if input_scales else INPUTS
    return _for_tensorrt(NAME, inputs, opset, rounded_in)


def body_by_columns(opset: int) -> ir.Function:
    """Return the function BY_COLUMNS for TensorRT: as `tensorrt_body`, of weights that have their columns in any order.

    Two more inputs, int32 [E, K] of gate_up and of down, have for each column of an expert's weight the column of its
    input that it is multiplied by. A weight may have more columns than its input.
    """
    return _for_tensorrt(BY_COLUMNS, (*INPUTS, *COLUMNS), opset)


def _for_tensorrt(
    name: str, inputs: Sequence[str], opset: int, rounded_in: ir.DataType | None = None
) -> ir.Function:
    body = FunctionBody(*inputs)
    y = _by_token_for_tensorrt(body, rounded_in)
    round_inner = rounded_in is not None and INPUT_SCALES not in inputs
    return body.function(name, {"y": y}, opset, _attributes(False, round_inner))


SwiGLU = Callable[[FunctionBody, ir.Value, Sequence[ir.Value]], ir.Value]
"""(body, x [n, rows, H], (gate_up [n, 2I, H], down [n, H, I], perhaps input_scales [n, 3])) -> [n, rows, H]."""
OfBlocks = Callable[[FunctionBody, ir.Value, ir.Value], ir.Value]
"""(body, x [n, rows, H], expert [n]) -> [n, rows, H]."""


@dataclass(frozen=True)
class _Blocks:
    """How pairs are laid out: vectors of one element. `spare` is `divisor` - 1, `divisor` is `rows`, or 1 for 0."""

    blocks: ir.Value
    rows: ir.Value
    divisor: ir.Value
    spare: ir.Value


def _by_token(body: FunctionBody, swiglu: SwiGLU) -> ir.Value:
    op, one, _ = body.op, body.integers(1), body.integers(0)
    given, experts, weights, gate_up, *_ = body.inputs

    # leading axes become one of tokens; `given` keeps the shape to return to
    width = body.size(given, -1)
    x = op("Reshape", given, op("Concat", body.integers(-1), width, axis=0))
    tokens, k = body.size(x, 0), body.size(experts, -1)
    count = body.size(gate_up, 0)
    pairs = op("Mul", tokens, k)
    rows = op("Max", op("Div", op("Sub", op("Add", pairs, count), one), count), one)
    spare = op("Sub", rows, one)
    blocks = op("Div", op("Add", pairs, op("Mul", spare, op("Min", count, pairs))), rows)
    layout = _Blocks(blocks, rows, rows, spare)
    sizes = tokens, k, count, width
    y = _in_blocks(body, x, experts, weights, sizes, pairs, layout, _of_blocks(swiglu))
    return op("Reshape", op("CastLike", y, x), op("Shape", given))


def _by_token_for_tensorrt(body: FunctionBody, rounded_in: ir.DataType | None) -> ir.Value:
    op, one, zero = body.op, body.integers(1), body.integers(0)
    given, experts, weights, gate_up, *_ = body.inputs
    width, k, count = body.size(given, -1), body.size(experts, -1), body.size(gate_up, 0)
    flat = [
        op("Reshape", value, op("Concat", body.integers(-1), size, axis=0))
        for value, size in ((given, width), (experts, k), (weights, k))
    ]
    x = flat[0]
    tokens = body.size(x, 0)
    most = op("Div", count, k)
    few = op("Min", op("Div", most, op("Max", tokens, one)), one)  # 1 or 0
    direct = op("Mul", few, op("Min", tokens, most))
    first = (op("Slice", value, zero, direct, zero) for value in flat)
    one_by_one = _one_by_one(body, *first, rounded_in=rounded_in)

    left_x, left_experts, left_weights = (
        op("Slice", value, direct, tokens, zero) for value in flat
    )
    left = body.size(left_x, 0)
    pairs = op("Mul", left, k)
    rows = op("Div", op("Sub", op("Add", pairs, count), one), count)
    divisor = op("Max", rows, one)
    layout = _Blocks(
        op("Min", op("Mul", count, body.integers(2)), pairs), rows, divisor, op("Sub", divisor, one)
    )
    sizes = left, k, count, width
    in_blocks = _in_blocks(
        body, left_x, left_experts, left_weights, sizes, pairs, layout, _of_rows(rounded_in)
    )
    y = op("Concat", one_by_one, in_blocks, axis=0)
    return op("Reshape", op("CastLike", y, x), op("Shape", given))


def _one_by_one(
    body: FunctionBody,
    x: ir.Value,
    experts: ir.Value,
    weights: ir.Value,
    *,
    rounded_in: ir.DataType | None,
) -> ir.Value:
    """x [T, H], experts and weights [T, k] -> fp32 [T, H]. Sums are fp32, products are rounded as a matmul's."""
    op = body.op

    def product(matrix: ir.Value, chosen: ir.Value, rows: ir.Value) -> ir.Value:
        vector = op("Unsqueeze", rows, body.integers(2))
        vector = _ordered(body, matrix, vector, experts, axis=2)
        terms = op("Mul", op("Cast", chosen, to=FLOAT), op("Cast", vector, to=FLOAT))
        return op("CastLike", op("ReduceSum", terms, body.integers(-1), keepdims=0), x)

    scales = _scales_of(body, experts)
    by_token = op("Unsqueeze", x, body.integers(1))
    outer = _swiglu_of_chosen(body, by_token, experts, product, scales, rounded_in)
    parts = op("Mul", op("Cast", outer, to=FLOAT), op("Unsqueeze", weights, body.integers(-1)))
    return op("ReduceSum", parts, body.integers(1), keepdims=0)


def _in_blocks(
    body: FunctionBody,
    x: ir.Value,
    experts: ir.Value,
    weights: ir.Value,
    sizes: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    pairs: ir.Value,
    layout: _Blocks,
    swiglu: OfBlocks,
) -> ir.Value:
    """x [T, H], experts and weights [..., k] -> fp32 [T, H]. `sizes` are T, k, E and H, `pairs` is T k."""
    op, one, zero = body.op, body.integers(1), body.integers(0)
    tokens, k, count, width = sizes
    blocks, rows = layout.blocks, layout.rows

    # the place of each pair: its expert's first block, then its rank among that expert's pairs
    flat = op("Reshape", experts, body.integers(-1))
    column = op("Unsqueeze", flat, one)
    chosen = op("Cast", op("Equal", column, body.arange(count)), to=INT64)
    running = op("CumSum", chosen, body.integer(0))
    rank = op("Sub", op("Squeeze", op("GatherElements", running, column, axis=1), one), one)
    group = op("ReduceSum", chosen, zero, keepdims=0)
    group_blocks = op("Div", op("Add", group, layout.spare), layout.divisor)
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
    outer = swiglu(body, gathered, expert)
    by_row = op("Reshape", outer, op("Concat", body.integers(-1), width, axis=0))
    by_pair = op("Reshape", op("Gather", by_row, place), op("Concat", tokens, k, width, axis=0))

    parts = op("Cast", by_pair, to=FLOAT)
    factors = op("Reshape", weights, op("Concat", tokens, k, one, axis=0))
    return op("ReduceSum", op("Mul", parts, factors), one, keepdims=0)


def _by_expert(body: FunctionBody, swiglu: SwiGLU) -> ir.Value:
    """Every expert has the same number of tokens: one batched matmul, then a sum over each token's rows."""
    op = body.op
    x, tokens, weights, *stacks = body.inputs
    outer = swiglu(body, op("Gather", x, tokens), stacks)
    parts = op("Cast", outer, to=FLOAT)
    weighted = op("Mul", parts, op("Unsqueeze", weights, body.integers(-1)))
    rows = op("Reshape", weighted, op("Concat", body.integers(-1), body.size(x, 1), axis=0))
    zeros = op("Expand", op("Cast", body.integer(0), to=FLOAT), op("Shape", x))
    row_tokens = op("Reshape", tokens, body.integers(-1, 1))
    return op("CastLike", op("ScatterND", zeros, row_tokens, rows, reduction="add"), x)


def _of_blocks(swiglu: SwiGLU) -> OfBlocks:
    """`swiglu` of each block's expert."""

    def apply(body: FunctionBody, x: ir.Value, expert: ir.Value) -> ir.Value:
        return swiglu(body, x, [body.op("Gather", stack, expert) for stack in body.inputs[3:]])

    return apply


def _swiglu(body: FunctionBody, x: ir.Value, stacks: Sequence[ir.Value]) -> ir.Value:
    """A SwiGLU. Weights keep their layout, [out, in]; activations are transposed instead."""
    gate_up, down = stacks
    return _outer(body, _inner(body, x, gate_up), down)


def _swiglu_rounded(body: FunctionBody, x: ir.Value, stacks: Sequence[ir.Value]) -> ir.Value:
    """The same with the inner activations rounded to FP8, each row by itself."""
    gate_up, down = stacks
    op, inner = body.op, _inner(body, x, gate_up)

    def number(value: float) -> ir.Value:
        return op("CastLike", op("Constant", value_float=value), x)

    largest = op("ReduceMax", op("Abs", inner), body.integers(1), keepdims=1)
    scale = op("Div", largest, number(LARGEST_FP8))
    # T's epsilon: what is left of 3 (4 / 3 - 1) - 1 in T
    third = op("Sub", op("Div", number(4.0), number(3.0)), number(1.0))
    epsilon = op("Abs", op("Sub", op("Mul", number(3.0), third), number(1.0)))
    scale = op("Where", op("Equal", scale, number(0.0)), epsilon, scale)
    return _outer(body, _with_scale(body, inner, scale), down)


def _swiglu_of_scales(body: FunctionBody, x: ir.Value, stacks: Sequence[ir.Value]) -> ir.Value:
    """The same with what gate, up and down multiply rounded to FP8, with the expert's scales."""
    gate_up, down, scales = stacks
    op = body.op
    by_linear = body.ops(
        3, "Split", op("Unsqueeze", scales, body.integers(2)), axis=1, num_outputs=3
    )
    turned = op("Transpose", x, perm=[0, 2, 1])
    gate, up = (
        op("MatMul", half, _with_scale(body, turned, scale))
        for half, scale in zip(
            body.ops(2, "Split", gate_up, axis=1, num_outputs=2), by_linear[:2], strict=True
        )
    )
    return _outer(body, _with_scale(body, _gated(body, gate, up), by_linear[2]), down)


def _with_scale(body: FunctionBody, x: ir.Value, scale: ir.Value) -> ir.Value:
    """x rounded to FP8 with a scale that broadcasts to it."""
    op = body.op
    codes = op("Cast", op("Div", x, scale), to=FLOAT8, saturate=1)
    return op("Mul", op("CastLike", codes, x), scale)


def _inner(body: FunctionBody, x: ir.Value, gate_up: ir.Value) -> ir.Value:
    """x [n, rows, H], gate_up [n, 2I, H] -> silu(gate) * up, [n, I, rows]."""
    op = body.op
    both = op("MatMul", gate_up, op("Transpose", x, perm=[0, 2, 1]))
    return _gated(body, *body.ops(2, "Split", both, axis=1, num_outputs=2))


def _gated(body: FunctionBody, gate: ir.Value, up: ir.Value) -> ir.Value:
    return body.op("Mul", body.op("Mul", gate, body.op("Sigmoid", gate)), up)


def _outer(body: FunctionBody, inner: ir.Value, down: ir.Value) -> ir.Value:
    """inner [n, I, rows], down [n, H, I] -> [n, rows, H]."""
    return body.op("Transpose", body.op("MatMul", down, inner), perm=[0, 2, 1])


def _of_rows(rounded_in: ir.DataType | None) -> OfBlocks:
    return lambda body, x, expert: _swiglu_of_rows(body, x, expert, rounded_in)


def _swiglu_of_rows(
    body: FunctionBody, x: ir.Value, expert: ir.Value, rounded_in: ir.DataType | None
) -> ir.Value:
    """The same with the weights transposed, which TensorRT's matmuls do as they read them; they then pad nothing."""
    op = body.op

    def product(matrix: ir.Value, chosen: ir.Value, rows: ir.Value) -> ir.Value:
        rows = _ordered(body, matrix, rows, expert, axis=1)
        return op("MatMul", rows, op("Transpose", chosen, perm=[0, 2, 1]))

    scales = _scales_of(body, op("Unsqueeze", expert, body.integers(1)))
    return _swiglu_of_chosen(body, x, expert, product, scales, rounded_in)


def _swiglu_of_chosen(
    body: FunctionBody,
    x: ir.Value,
    experts: ir.Value,
    product: Callable[[ir.Value, ir.Value, ir.Value], ir.Value],
    scales: Sequence[ir.Value] | None,
    rounded_in: ir.DataType | None,
) -> ir.Value:
    """A SwiGLU of chosen experts for TensorRT.

    Args:
        body: the function's.
        x: [n, m, H].
        experts: the chosen ones.
        product: (gate_up or down, what is chosen of it or its half, rows [n, m, K]) -> [n, m, rows of the weight].
        scales: of what gate, up and down multiply, which broadcast to x; or None.
        rounded_in: see `tensorrt_body`.
    """
    op = body.op
    gate_up, down = body.inputs[3:5]
    chosen = op("Gather", gate_up, experts)
    if scales is None:
        both = product(gate_up, chosen, x)
        active = _gated(body, *body.ops(2, "Split", both, axis=2, num_outputs=2))
        if rounded_in is not None:
            active = _codes_of(body, active, _scale_of_rows(body, active, rounded_in), rounded_in)
    else:
        assert rounded_in is not None
        halves = body.ops(2, "Split", chosen, axis=-2, num_outputs=2)
        gate, up = (
            product(gate_up, half, _codes_of(body, x, scale, rounded_in))
            for half, scale in zip(halves, scales[:2], strict=True)
        )
        active = _codes_of(body, _gated(body, gate, up), scales[2], rounded_in)
    return product(down, op("Gather", down, experts), active)


def _scales_of(body: FunctionBody, experts: ir.Value) -> Sequence[ir.Value] | None:
    """The scales of the chosen experts' gate, up and down, [..., 1] for experts [...]; None if there are none."""
    for value in body.inputs:
        if value.name == INPUT_SCALES:
            return body.ops(3, "Split", body.op("Gather", value, experts), axis=-1, num_outputs=3)
    return None


def _constant(body: FunctionBody, value: float, dtype: ir.DataType) -> ir.Value:
    return body.op("Constant", value=ir.tensor(np.array(value, dtype.numpy()), dtype=dtype))


def _scale_of_rows(body: FunctionBody, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The scale of each row of x [..., I] in `dtype`. TensorRT's divisions by a constant are exact only in fp32."""
    op = body.op
    largest = op("ReduceMax", op("Abs", x), body.integers(-1), keepdims=1)
    most = _constant(body, LARGEST_FP8, ir.DataType.FLOAT)
    scale = op("Cast", op("Div", op("Cast", largest, to=FLOAT), most), to=int(dtype))
    epsilon = float(ml_dtypes.finfo(dtype.numpy()).eps)
    zero = _constant(body, 0.0, dtype)
    return op("Where", op("Equal", scale, zero), _constant(body, epsilon, dtype), scale)


def _codes_of(body: FunctionBody, x: ir.Value, scale: ir.Value, dtype: ir.DataType) -> ir.Value:
    """x in `dtype`, rounded to FP8 with a scale that broadcasts to it. TensorRT has no casts to FP8."""
    op, one = body.op, _constant(body, 1.0, dtype)
    codes = op("QuantizeLinear", op("Div", x, scale), one, output_dtype=FLOAT8, saturate=1)
    return op("Mul", op("DequantizeLinear", codes, one), scale)


def _ordered(
    body: FunctionBody, matrix: ir.Value, x: ir.Value, experts: ir.Value, *, axis: int
) -> ir.Value:
    """x [..., K] in the order of the columns of the chosen experts' weights, if there is one.

    Args:
        body: the function's.
        matrix: which of its weights.
        x: broadcasts to the experts, with an axis more at `axis`, and K.
        experts: the chosen ones, [...].
        axis: of x, between those of `experts` and its last.
    """
    column = COLUMNS[body.inputs.index(matrix) - 3]
    found = [value for value in body.inputs if value.name == column]
    if not found:
        return x
    op = body.op
    order = op("Unsqueeze", op("Gather", found[0], experts), body.integers(axis))
    rows = op("Concat", op("Shape", experts), body.integers(1, 1), axis=0)
    x = op("Expand", x, rows)
    width = op("Concat", op("Shape", x, end=-1), body.integers(1), axis=0)
    return op("GatherElements", x, op("Expand", order, width), axis=-1)
