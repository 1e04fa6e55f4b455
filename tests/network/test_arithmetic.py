"""Arithmetic of the interpreter against onnxruntime: drawn shapes, attributes and values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .layer_nets import (
    ELEMENTWISE,
    FUNCTION_ERROR,
    NUMBERS,
    REDUCTIONS,
    SUM_ERROR,
    UNARY,
    about,
    draw_axis,
    draw_broadcast,
    draw_operands,
    draw_spelling,
    few,
)
from .models import (
    BOOL,
    FP32,
    INT64,
    check,
    draw_array,
    draw_stated,
    int64,
    one,
    shapes,
    sizes,
)


@about("ELEMENTWISE", *(f"ELEMENTWISE {name}" for name in ELEMENTWISE))
@pytest.mark.parametrize("operation", ELEMENTWISE)
@given(st.data())
@few
def test_elementwise(operation: str, data: st.DataObject) -> None:
    operator, dtypes = ELEMENTWISE[operation]
    dtype = data.draw(st.sampled_from(dtypes))
    inputs = draw_operands(data.draw, "ab", dtype)
    if operation == "POW":
        inputs["b"] = np.abs(inputs["b"])
        if dtype == FP32:
            inputs["a"] = np.abs(inputs["a"])  # no power of a negative number is real
    if operation in ("DIV", "FLOOR_DIV") and dtype != FP32:
        inputs["b"][inputs["b"] == 0] = -3  # onnxruntime refuses to divide integers by 0
    check(
        one(operator, inputs, stated=draw_stated(data.draw, inputs)),
        inputs,
        f"ELEMENTWISE {operation}",
        rtol=FUNCTION_ERROR if operation == "POW" else 0,
    )


@pytest.mark.parametrize("operator", ["Add", "Mul", "Max", "Less", "Equal"])
@given(st.data())
@settings(max_examples=10)
def test_elementwise_with_a_constant_of_any_rank(operator: str, data: st.DataObject) -> None:
    inputs = draw_operands(data.draw, "ab", data.draw(st.sampled_from(NUMBERS)))
    fixed = data.draw(st.sampled_from("ab"))
    model = one(operator, inputs, constant=fixed, stated=draw_stated(data.draw, inputs))
    inputs.pop(fixed)
    check(model, inputs, "CONSTANT", "ELEMENTWISE")


def test_comparisons_and_arithmetic_of_zeros_and_infinities() -> None:
    values = np.array([-math.inf, -1, -0.0, 0.0, 1, math.inf], dtype=np.float32)
    inputs = {"a": values[:, None], "b": values}
    for operator in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Greater", "Less"):
        check(one(operator, inputs), inputs, "ELEMENTWISE")


@about("UNARY", *(f"UNARY {name}" for name in UNARY))
@pytest.mark.parametrize("operation", UNARY)
@given(st.data())
@few
def test_unary(operation: str, data: st.DataObject) -> None:
    operator, error = UNARY[operation]
    dtype = BOOL if operation == "NOT" else FP32
    if operation in ("ABS", "SIGN"):
        dtype = data.draw(st.sampled_from(NUMBERS))
    if operation == "NEG":
        dtype = data.draw(st.sampled_from((FP32, INT64)))  # int32 is made a difference
    x = draw_array(data.draw, data.draw(shapes(0)), dtype)
    if operation in ("LOG", "SQRT"):
        x = np.abs(x)
    if operation == "ROUND":
        x = np.round(x * 2) / 2  # halves, where rounding differs
    if operation in ("ISNAN", "ISINF"):
        x = np.asarray(np.float32([math.nan, math.inf, -math.inf, 1])[np.abs(x).astype(int) % 4])
    check(
        one(operator, {"x": x}, stated=draw_stated(data.draw, {"x": x})),
        {"x": x},
        f"UNARY {operation}",
        rtol=error,
        atol=error,
    )


ACTIVATIONS = {
    "SIGMOID": ("Sigmoid", {}),
    "TANH": ("Tanh", {}),
    "RELU": ("Relu", {}),
    "GELU_ERF": ("Gelu", {}),
    "GELU_TANH": ("Gelu", {"approximate": "tanh"}),
}


@about("ACTIVATION", *(f"ACTIVATION {name}" for name in ACTIVATIONS))
@pytest.mark.parametrize("operation", ACTIVATIONS)
@given(st.data())
@few
def test_activation(operation: str, data: st.DataObject) -> None:
    operator, attributes = ACTIVATIONS[operation]
    x = draw_array(data.draw, data.draw(shapes(0)))
    check(
        one(operator, {"x": x}, stated=draw_stated(data.draw, {"x": x}), **attributes),
        {"x": x},
        f"ACTIVATION {operation}",
        rtol=FUNCTION_ERROR,
        atol=FUNCTION_ERROR,  # tails: 1 + erf(x) for x far below 0
    )


@about("REDUCE", *(f"REDUCE {name}" for name in REDUCTIONS))
@pytest.mark.parametrize("operation", REDUCTIONS)
@given(st.data())
@settings(max_examples=30)
def test_reduce(operation: str, data: st.DataObject) -> None:
    # TensorRT's mean of integers is not in the table
    dtype = FP32 if operation == "AVG" else data.draw(st.sampled_from(NUMBERS))
    x = draw_array(data.draw, data.draw(shapes(1)), dtype)
    chosen = data.draw(st.lists(st.integers(0, x.ndim - 1), unique=True))
    axes = int64(*(draw_spelling(data.draw, axis, x.ndim) for axis in chosen))
    keep = data.draw(st.integers(0, 1))
    model = one(
        REDUCTIONS[operation],
        {"x": x, "axes": axes},
        constant=["axes"],
        stated=draw_stated(data.draw, {"x": x}),
        keepdims=keep,
    )
    over = tuple(chosen) if chosen else tuple(range(x.ndim))
    atol: Any = 0
    if dtype == FP32 and operation in ("SUM", "AVG"):
        total = np.abs(x).sum(over, keepdims=bool(keep))
        atol = SUM_ERROR * (total if operation == "SUM" else total * total.size / x.size)
    check(model, {"x": x}, f"REDUCE {operation}", atol=atol)


@about("SOFTMAX")
@given(st.data())
@settings(max_examples=30)
def test_softmax_over_any_axis(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(2)), spread=data.draw(st.sampled_from([1, 100])))
    operator = data.draw(st.sampled_from(["Softmax", "LogSoftmax"]))
    # TensorRT has no softmax of a vector
    if operator == "LogSoftmax":
        x = x / 100  # TensorRT takes the logarithm of what may be 0, onnxruntime does not
    model = one(
        operator,
        {"x": x},
        stated=draw_stated(data.draw, {"x": x}),
        axis=draw_axis(data.draw, x.ndim),
    )
    check(model, {"x": x}, "SOFTMAX", rtol=SUM_ERROR, atol=1e-7)


@about("MATRIX_MULTIPLY")
@given(st.data())
@settings(max_examples=40)
def test_products_with_broadcast_batches_and_vectors(data: st.DataObject) -> None:
    draw = data.draw
    inner = draw(st.integers(1, 33))
    batch = draw(shapes(0, 2))
    left = (*draw_broadcast(draw, batch), draw(sizes), inner)
    right = (*draw_broadcast(draw, batch), inner, draw(sizes))
    vector = draw(st.sampled_from(["neither", "neither", "left", "right"]))  # both: refused
    inputs = {
        "a": draw_array(draw, left[-1:] if vector == "left" else left),
        "b": draw_array(draw, right[-2:-1] if vector == "right" else right),
    }
    if vector == "left":
        # with several matrices TensorRT's parser drops the first axis of the result instead of the vector's
        inputs["b"] = inputs["b"].reshape(-1, *right[-2:])[0]
    fixed = draw(st.sampled_from(["", "a", "b"]))
    model = one("MatMul", inputs, constant=fixed, stated=draw_stated(draw, inputs))
    atol = SUM_ERROR * np.matmul(np.abs(inputs["a"]), np.abs(inputs["b"]))
    inputs.pop(fixed, None)
    check(model, inputs, "MATRIX_MULTIPLY", atol=atol)


@given(st.data())
@few
def test_gemm_with_either_side_transposed(data: st.DataObject) -> None:
    draw = data.draw
    rows, inner, columns = draw(sizes), draw(st.integers(1, 33)), draw(sizes)
    first, second = draw(st.booleans()), draw(st.booleans())
    inputs = {
        "a": draw_array(draw, (inner, rows) if first else (rows, inner)),
        "b": draw_array(draw, (columns, inner) if second else (inner, columns)),
        "c": draw_array(draw, draw_broadcast(draw, (rows, columns))),
    }
    attributes = {"transA": int(first), "transB": int(second), "alpha": 0.5, "beta": 2.0}
    a, b = (np.abs(inputs[n].T if t else inputs[n]) for n, t in (("a", first), ("b", second)))
    check(
        one("Gemm", inputs, stated=draw_stated(draw, inputs), **attributes),
        inputs,
        "MATRIX_MULTIPLY",
        atol=SUM_ERROR * (a @ b + 2 * np.abs(inputs["c"])),
    )


@about("CUMULATIVE")
@given(st.data())
@settings(max_examples=40)
def test_cumulative_sums_exclusive_and_reversed(data: st.DataObject) -> None:
    draw = data.draw
    x = draw_array(draw, draw(shapes(1)), draw(st.sampled_from(NUMBERS)))
    axis = np.array(draw_axis(draw, x.ndim))
    model = one(
        "CumSum",
        {"x": x, "axis": axis},
        constant=["axis"],
        stated=draw_stated(draw, {"x": x}),
        exclusive=draw(st.integers(0, 1)),
        reverse=draw(st.integers(0, 1)),
    )
    atol = SUM_ERROR * np.abs(x).sum(int(axis), keepdims=True) if x.dtype == FP32 else 0
    check(model, {"x": x}, "CUMULATIVE", atol=atol)


@pytest.mark.parametrize("reverse", [0, 1])
def test_an_exclusive_sum_does_not_contain_the_slot_itself(reverse: int) -> None:
    """1e10 swallows what is added to it in fp32; the sums before it have not met it yet."""
    x = np.array([1, 1e10, 2], dtype=np.float32)[:: 1 - 2 * reverse].copy()
    model = one(
        "CumSum", {"x": x, "axis": np.array(0)}, constant=["axis"], exclusive=1, reverse=reverse
    )
    check(model, {"x": x}, "CUMULATIVE")


COMPOSED: dict[str, dict[str, Any]] = {
    "ReduceL1": {},
    "ReduceL2": {},
    "ReduceSumSquare": {},
    "ReduceLogSumExp": {},
    "GreaterOrEqual": {"operands": "ab", "of_few": True},
    "LessOrEqual": {"operands": "ab", "of_few": True},
    "Mod": {"operands": "ab", "fmod": 1},
    "Mean": {"operands": "abc"},
    "Sum": {"operands": "abc"},
    "Max": {"operands": "abc"},
    "Size": {},
    "Flatten": {},
    "GlobalAveragePool": {"rank": 3},
    "Clip": {"operands": "xab", "scalars": "ab"},
    "Celu": {"alpha": 0.5},
    "Shrink": {"lambd": 1.0, "bias": 0.25},
    "LpNormalization": {},
    "ArgMax": {"rank": 2, "of_few": True},  # TensorRT has none of a vector
    "ArgMin": {"rank": 2, "of_few": True},
}


@pytest.mark.parametrize("operator", COMPOSED)
@given(st.data())
@settings(max_examples=10)
def test_operators_that_become_several_layers(operator: str, data: st.DataObject) -> None:
    options = dict(COMPOSED[operator])
    names, of_few = options.pop("operands", "a"), options.pop("of_few", False)
    if names == "a":
        inputs = {"a": draw_array(data.draw, data.draw(shapes(options.pop("rank", 1))))}
    else:
        inputs = draw_operands(data.draw, names, FP32)
    for name in options.pop("scalars", ""):
        inputs[name] = np.asarray(inputs[name].reshape(-1)[0])
    if of_few:
        inputs = {name: np.round(value / 3) for name, value in inputs.items()}
    if operator in ("Flatten", "ArgMax", "ArgMin"):
        options["axis"] = draw_axis(data.draw, inputs["a"].ndim)
    if operator == "Mod":
        inputs["b"] = np.where(inputs["b"] == 0, 1, inputs["b"]).astype(np.float32)
    model = one(operator, inputs, stated=draw_stated(data.draw, inputs), **options)
    # TensorRT's fmod is a - b x trunc(a / b), which loses what |a| / |b| takes of the digits
    check(model, inputs, rtol=SUM_ERROR, atol=1e-4 if operator == "Mod" else 1e-6)


@given(st.data())
@few
def test_rms_normalization(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(1)))
    axis = draw_axis(data.draw, x.ndim)
    inputs = {"x": x, "scale": draw_array(data.draw, x.shape[axis:], spread=1)}
    fixed = data.draw(st.sampled_from(["", "scale"]))
    epsilon = data.draw(st.sampled_from([1e-6, 1e-5, 1.0]))
    model = one(
        "RMSNormalization",
        inputs,
        constant=[fixed] if fixed else [],
        stated=draw_stated(data.draw, inputs),
        axis=axis,
        epsilon=epsilon,
    )
    inputs.pop(fixed, None)
    check(model, inputs, "REDUCE AVG", "UNARY SQRT", rtol=SUM_ERROR)
