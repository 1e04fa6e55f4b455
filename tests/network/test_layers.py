"""Every layer kind of the interpreter against onnxruntime: one operator, drawn shapes, attributes and values.

Where values are only moved, or an operation is one rounded operation of IEEE 754, the results are equal. Sums and
products differ by the order of summation: n terms by at most n x 6e-8 of the sum of their magnitudes, and no test
has more than 100 terms, so 1e-5 of that sum is allowed. Transcendental functions of two libraries differ by a few
units in the last place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qwenport.validate.network import layers

from .models import (
    BOOL,
    FP16,
    FP32,
    INT32,
    INT64,
    Array,
    check,
    draw_array,
    draw_stated,
    evaluate,
    int64,
    one,
    parse,
    proto,
    random_array,
    same,
    seeds,
    shapes,
    sizes,
)

SUM_ERROR = 1e-5  # of the sum of the terms' magnitudes
FUNCTION_ERROR = 2e-6  # relative, of one transcendental function
ONE_ULP = 2.0**-23  # of fp32, relative
NUMBERS = (FP32, INT32, INT64)
MOVED = (FP32, FP16, INT32, INT64, BOOL)
few = settings(max_examples=20)

TESTED: set[str] = set()
"""What `kinds_of` would name; filled where tests are defined."""


def about(*kinds: str) -> Any:
    TESTED.update(kinds)
    return lambda test: test


def draw_axis(draw: st.DrawFn, rank: int) -> int:
    return draw(st.integers(-rank, rank - 1))


def draw_spelling(draw: st.DrawFn, axis: int, rank: int) -> int:
    """The same axis, counted from the front or from the back."""
    return draw(st.sampled_from([axis, axis - rank]))


def draw_broadcast(draw: st.DrawFn, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that can be broadcast to another: leading axes missing, some sizes 1."""
    kept = shape[draw(st.integers(0, len(shape))) :]
    return tuple(size if draw(st.booleans()) else 1 for size in kept)


def draw_operands(draw: st.DrawFn, names: str, dtype: Any) -> dict[str, Array]:
    """Values whose shapes can be broadcast together; one of them has the full shape."""
    shape = draw(shapes(0))
    full = draw(st.sampled_from(names))
    return {
        name: draw_array(draw, shape if name == full else draw_broadcast(draw, shape), dtype)
        for name in names
    }


# ---- arithmetic

ELEMENTWISE = {
    "SUM": ("Add", NUMBERS),
    "SUB": ("Sub", NUMBERS),
    "PROD": ("Mul", NUMBERS),
    "MAX": ("Max", NUMBERS),
    "MIN": ("Min", NUMBERS),
    "DIV": ("Div", NUMBERS),
    "POW": ("Pow", NUMBERS),
    "FLOOR_DIV": ("Mod", (INT32, INT64)),
    "EQUAL": ("Equal", (*NUMBERS, BOOL)),
    "GREATER": ("Greater", NUMBERS),
    "LESS": ("Less", NUMBERS),
    "AND": ("And", (BOOL,)),
    "OR": ("Or", (BOOL,)),
    "XOR": ("Xor", (BOOL,)),
}


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


UNARY = {
    "EXP": ("Exp", FUNCTION_ERROR),
    "LOG": ("Log", FUNCTION_ERROR),
    "SQRT": ("Sqrt", ONE_ULP),  # torch's is not always the nearest number
    "RECIP": ("Reciprocal", 0),
    "ABS": ("Abs", 0),
    "NEG": ("Neg", 0),
    "SIN": ("Sin", FUNCTION_ERROR),
    "COS": ("Cos", FUNCTION_ERROR),
    "CEIL": ("Ceil", 0),
    "FLOOR": ("Floor", 0),
    "ROUND": ("Round", 0),
    "ERF": ("Erf", FUNCTION_ERROR),
    "SIGN": ("Sign", 0),
    "NOT": ("Not", 0),
    "ISNAN": ("IsNaN", 0),
    "ISINF": ("IsInf", 0),
}


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


REDUCTIONS = {"SUM": "ReduceSum", "AVG": "ReduceMean", "MAX": "ReduceMax", "MIN": "ReduceMin"}


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


# ---- movement: results are equal


@about("SHAPE")
@given(st.data())
@few
def test_shape(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(1)), data.draw(st.sampled_from(MOVED)))
    cut = {
        key: data.draw(st.integers(-x.ndim - 1, x.ndim + 1))
        for key in data.draw(st.sampled_from([[], ["start"]]))
    }
    check(one("Shape", {"x": x}, stated=draw_stated(data.draw, {"x": x}), **cut), {"x": x}, "SHAPE")


@about("IDENTITY")
@given(st.data())
@few
def test_identity(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(0)), data.draw(st.sampled_from(MOVED)))
    check(one("Identity", {"x": x}, stated=draw_stated(data.draw, {"x": x})), {"x": x}, "IDENTITY")


TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


@about("CAST")
@given(
    st.sampled_from([FP32, INT32, INT64, BOOL]),
    st.lists(st.sampled_from(sorted(TYPES)), min_size=1, max_size=4),
    seeds,
)
@settings(max_examples=100)
def test_chains_of_casts(start: Any, chain: list[str], seed: int) -> None:
    """Values are small enough for every type: what a cast does beyond a type's range is not defined."""
    x = random_array(seed, (4, 5), start, 100.0)
    names = ["x", *(f"t{index}" for index in range(len(chain)))]
    nodes = [
        helper.make_node("Cast", [before], [after], to=TYPES[kind])
        for before, after, kind in zip(names, names[1:], chain, strict=False)
    ]
    nodes.append(helper.make_node("Cast", [names[-1]], ["y"], to=TensorProto.FLOAT))
    check(proto(nodes, {"x": x}, ["y"]), {"x": x}, "CAST")


def test_casts_beyond_the_range_of_fp16_and_below_it() -> None:
    x = np.array([65504, 65519.9, 65520, -1e6, 6e-8, 2.9e-8, math.inf, -0.0], dtype=np.float32)
    for half in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        nodes = [
            helper.make_node("Cast", ["x"], ["h"], to=half),
            helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
        ]
        check(proto(nodes, {"x": x}, ["y"]), {"x": x}, "CAST")


def draw_reshape(draw: st.DrawFn, shape: Sequence[int]) -> list[int]:
    """A target of Reshape: the shape regrouped, with 0 for sizes that stay and at most one -1."""
    cuts = sorted(draw(st.lists(st.integers(0, len(shape)), max_size=3)))
    bounds = [0, *cuts, len(shape)]
    target = [math.prod(shape[a:b]) for a, b in itertools.pairwise(bounds)]
    for axis, size in enumerate(target):
        if axis < len(shape) and shape[axis] == size and draw(st.booleans()):
            target[axis] = 0
    if draw(st.booleans()):
        target[draw(st.integers(0, len(target) - 1))] = -1
    return target


@about("SHUFFLE")
@given(st.data())
@settings(max_examples=40)
def test_reshapes_to_constant_shapes(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(1)), data.draw(st.sampled_from(MOVED)))
    target = int64(*draw_reshape(data.draw, x.shape))
    model = one(
        "Reshape",
        {"x": x, "target": target},
        constant=["target"],
        stated=draw_stated(data.draw, {"x": x}),
    )
    check(model, {"x": x}, "SHUFFLE")


@given(st.data())
@few
def test_reshapes_to_shapes_known_when_it_runs(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(1)), data.draw(st.sampled_from(MOVED)))
    inputs = {"x": x, "target": int64(*draw_reshape(data.draw, x.shape))}
    stated = {("target", 0), *draw_stated(data.draw, {"x": x})}  # its length must be stated
    check(one("Reshape", inputs, stated=stated), inputs, "SHUFFLE")


@given(st.data())
@few
def test_reshapes_to_the_shape_of_another_tensor(data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(shapes(1, 3))
    inputs = {
        "x": draw_array(draw, draw(st.permutations(shape)), draw(st.sampled_from(MOVED))),
        "like": draw_array(draw, shape),
    }
    nodes = [
        helper.make_node("Shape", ["like"], ["target"]),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    check(proto(nodes, inputs, ["y"], stated=draw_stated(draw, inputs)), inputs, "SHAPE", "SHUFFLE")


def test_reshape_with_allowzero_means_an_empty_axis() -> None:
    operands = {"x": np.zeros((2, 0, 4), np.float32), "target": int64(0, 7)}
    model = one("Reshape", operands, constant=["target"], allowzero=1)
    check(model, {"x": operands["x"]}, "SHUFFLE")


@given(st.data())
@few
def test_transposes(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(1)), data.draw(st.sampled_from(MOVED)))
    order = {"perm": data.draw(st.permutations(range(x.ndim)))} if data.draw(st.booleans()) else {}
    model = one("Transpose", {"x": x}, stated=draw_stated(data.draw, {"x": x}), **order)
    check(model, {"x": x}, "SHUFFLE")


FAR = np.iinfo(np.int64).max  # what "to the end" is often written as


@st.composite
def slices(draw: st.DrawFn) -> tuple[Array, dict[str, Array]]:
    """A tensor and operands of ONNX's Slice: from anywhere to anywhere, outside of the tensor, too."""
    x = draw_array(draw, draw(shapes(1)), draw(st.sampled_from(MOVED)))
    chosen = draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True))
    forward = [1] * len(chosen)
    steps = [draw(st.sampled_from([1, 2, 3, -1, -2, -3])) for _ in chosen]
    steps = draw(st.sampled_from([forward, steps]))
    place = st.integers(-8, 8)
    # FAR with a negative step is the end of the tensor in ONNX, and its beginning in onnxruntime
    far = [draw(st.sampled_from([FAR, -FAR] if step > 0 else [-FAR])) for step in steps]
    operands = {
        "starts": int64(*(draw(place) for _ in chosen)),
        "ends": int64(*(draw(st.one_of(place, st.just(end))) for end in far)),
        "axes": int64(*(draw_spelling(draw, axis, x.ndim) for axis in chosen)),
    }
    return x, operands if steps is forward else {**operands, "steps": int64(*steps)}


@about("SLICE")
@given(slices(), st.data())
@settings(max_examples=80)
def test_slices_with_constant_places(drawn: Any, data: st.DataObject) -> None:
    x, operands = drawn
    model = one(
        "Slice",
        {"x": x, **operands},
        constant=list(operands),
        stated=draw_stated(data.draw, {"x": x}),
    )
    check(model, {"x": x}, "SLICE")


@given(slices(), st.data())
@settings(max_examples=40)
def test_slices_with_places_known_when_it_runs(drawn: Any, data: st.DataObject) -> None:
    x, operands = drawn
    # TensorRT needs to know which axes are cut; the places' number must be stated
    fixed = {"axes", "steps"} & operands.keys()
    stated = {("starts", 0), ("ends", 0), *draw_stated(data.draw, {"x": x})}
    model = one("Slice", {"x": x, **operands}, constant=sorted(fixed), stated=stated)
    inputs = {name: value for name, value in operands.items() if name not in fixed}
    check(model, {"x": x, **inputs}, "SLICE")


@given(st.data())
@few
def test_splits(data: st.DataObject) -> None:
    draw = data.draw
    parts = draw(st.lists(sizes, min_size=1, max_size=3))
    x = draw_array(draw, draw(shapes(1)), draw(st.sampled_from(MOVED)))
    axis = draw_axis(draw, x.ndim)
    x = np.concatenate([x] * sum(parts), axis).take(range(sum(parts)), axis)
    model = one(
        "Split",
        {"x": x, "parts": int64(*parts)},
        constant=["parts"],
        stated=draw_stated(draw, {"x": x}),
        outputs=[f"y{index}" for index in range(len(parts))],
        axis=axis,
    )
    check(model, {"x": x}, "SLICE")


@given(st.data())
@few
def test_expand_to_constant_and_to_computed_shapes(data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(shapes(1))
    x = draw_array(draw, draw_broadcast(draw, shape), draw(st.sampled_from(MOVED)))
    if draw(st.booleans()):
        operands = {"x": x, "target": int64(*shape)}
        stated = draw_stated(draw, {"x": x})
        check(one("Expand", operands, constant=["target"], stated=stated), {"x": x}, "SLICE")
        return
    inputs = {"x": x, "like": draw_array(draw, shape)}
    nodes = [
        helper.make_node("Shape", ["like"], ["target"]),
        helper.make_node("Expand", ["x", "target"], ["y"]),
    ]
    check(proto(nodes, inputs, ["y"], stated=draw_stated(draw, inputs)), inputs, "SLICE")


@given(shapes(1), st.sampled_from([FP32, INT64, INT32]), st.integers(-9, 9))
@settings(max_examples=10)
def test_constant_of_shape(shape: tuple[int, ...], dtype: Any, value: int) -> None:
    like = np.zeros(shape, np.float32)
    nodes = [
        helper.make_node("Shape", ["like"], ["target"]),
        helper.make_node(
            "ConstantOfShape",
            ["target"],
            ["y"],
            value=numpy_helper.from_array(np.array([value], dtype)),
        ),
    ]
    check(proto(nodes, {"like": like}, ["y"], stated=()), {"like": like}, "SLICE")


@about("CONCATENATION")
@given(st.data())
@few
def test_concatenations(data: st.DataObject) -> None:
    draw = data.draw
    shape, dtype = draw(shapes(1)), draw(st.sampled_from(MOVED))
    axis = draw_axis(draw, len(shape))
    inputs = {}
    for index in range(draw(st.integers(1, 4))):
        part = list(shape)
        part[axis] = draw(st.integers(0, 4))
        inputs[f"x{index}"] = draw_array(draw, part, dtype)
    model = one("Concat", inputs, stated=draw_stated(draw, inputs), axis=axis)
    check(model, inputs, "CONCATENATION")


@about("GATHER")
@given(st.data())
@settings(max_examples=40)
def test_gather(data: st.DataObject) -> None:
    """Indices are not negative: TensorRT's Gather does not say that they may be."""
    draw = data.draw
    x = draw_array(draw, draw(shapes(1, 3)), draw(st.sampled_from(MOVED)))
    axis = draw_axis(draw, x.ndim)
    indices = np.random.default_rng(draw(seeds)).integers(0, x.shape[axis], draw(shapes(0, 3)))
    inputs = {"x": x, "i": np.asarray(indices).astype(draw(st.sampled_from([INT32, INT64])))}
    fixed = draw(st.sampled_from(["", "x", "i"]))
    model = one("Gather", inputs, constant=fixed, stated=draw_stated(draw, inputs), axis=axis)
    inputs.pop(fixed, None)
    check(model, inputs, "GATHER")


@pytest.mark.parametrize("index", [0, 2])
def test_gather_of_one_number_from_a_vector(index: int) -> None:
    """What Shape and Gather make a size of: a tensor without axes."""
    inputs = {"x": np.arange(5), "i": np.array(index)}
    check(one("Gather", inputs, axis=0), inputs, "GATHER")


@given(st.data())
@few
def test_gather_elements(data: st.DataObject) -> None:
    draw = data.draw
    x = draw_array(draw, draw(shapes(1)), draw(st.sampled_from(MOVED)))
    axis = draw_axis(draw, x.ndim)
    shape = [draw(st.integers(1, size)) for size in x.shape]
    shape[axis] = draw(sizes)
    indices = np.random.default_rng(draw(seeds)).integers(0, x.shape[axis], shape)
    inputs = {"x": x, "i": indices.astype(draw(st.sampled_from([INT32, INT64])))}
    model = one("GatherElements", inputs, stated=draw_stated(draw, inputs), axis=axis)
    check(model, inputs, "GATHER")


@about("SELECT")
@given(st.data())
@few
def test_where(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from((FP32, FP16, INT32, INT64)))  # onnxruntime has none of bool
    inputs = draw_operands(data.draw, "cab", dtype)
    inputs["c"] = inputs["c"] > 0
    check(one("Where", inputs, stated=draw_stated(data.draw, inputs)), inputs, "SELECT")


@about("UNSQUEEZE")
@given(st.data())
@few
def test_unsqueeze(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(0, 3)), data.draw(st.sampled_from(MOVED)))
    count = data.draw(st.integers(1, 3))
    rank = x.ndim + count
    chosen = data.draw(st.permutations(range(rank)))[:count]
    axes = int64(*(draw_spelling(data.draw, axis, rank) for axis in chosen))
    model = one(
        "Unsqueeze",
        {"x": x, "axes": axes},
        constant=["axes"],
        stated=draw_stated(data.draw, {"x": x}),
    )
    check(model, {"x": x}, "UNSQUEEZE")


@about("SQUEEZE")
@given(st.data())
@few
def test_squeeze(data: st.DataObject) -> None:
    shape = [1, *data.draw(st.lists(st.sampled_from([1, 2, 3]), max_size=4))]
    shape = data.draw(st.permutations(shape))
    x = draw_array(data.draw, shape, data.draw(st.sampled_from(MOVED)))
    units = [axis for axis, size in enumerate(shape) if size == 1]
    chosen = data.draw(st.lists(st.sampled_from(units), min_size=1, unique=True))
    axes = int64(*(draw_spelling(data.draw, axis, x.ndim) for axis in chosen))
    model = one(
        "Squeeze",
        {"x": x, "axes": axes},
        constant=["axes"],
        stated=draw_stated(data.draw, {"x": x}),
    )
    check(model, {"x": x}, "SQUEEZE")


@about("TOPK")
@given(st.data())
@settings(max_examples=60)
def test_top_k_takes_the_lowest_index_among_equals(data: st.DataObject) -> None:
    draw = data.draw
    x = draw_array(draw, draw(shapes(1, 3)), draw(st.sampled_from(NUMBERS)))
    if draw(st.booleans()):
        x = np.round(x / 4).astype(x.dtype)  # few different values, so that many are equal
    axis = draw_axis(draw, x.ndim)
    inputs = {"x": x, "k": int64(draw(st.integers(1, x.shape[axis])))}
    fixed = draw(st.booleans())
    model = one(
        "TopK",
        inputs,
        constant=["k"] if fixed else [],
        stated={("k", 0), *draw_stated(draw, {"x": x})},  # a k of any length crashes the parser
        outputs=["values", "indices"],
        axis=axis,
        largest=draw(st.integers(0, 1)),
    )
    check(model, {"x": x} if fixed else inputs, "TOPK")


@about("FILL")
@given(st.data())
@few
def test_ranges_of_integers(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([INT32, INT64]))
    start, stop = data.draw(st.integers(-20, 20)), data.draw(st.integers(-20, 20))
    step = data.draw(st.integers(1, 7)) * (1 if stop >= start else -1)
    inputs = {
        name: np.array(value, dtype)
        for name, value in (("start", start), ("stop", stop), ("step", step))
    }
    if start == stop:
        inputs["stop"] = inputs["start"] + np.array(1, dtype)
    fixed = [name for name in inputs if data.draw(st.booleans())]
    model = one("Range", inputs, constant=fixed)
    check(model, {name: value for name, value in inputs.items() if name not in fixed}, "FILL")


@given(st.integers(-8, 8), st.integers(1, 30), st.sampled_from([0.25, 1.5, -0.5]))
@settings(max_examples=10)
def test_ranges_of_floats(start: int, count: int, step: float) -> None:
    """TensorRT has only those whose numbers are constants."""
    operands = {"start": start, "stop": start + count * step, "step": step}
    model = one(
        "Range",
        {name: np.array(value, np.float32) for name, value in operands.items()},
        constant=list(operands),
    )
    check(model, {}, "FILL")


@given(st.data())
@few
def test_triangles(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(2)), data.draw(st.sampled_from([FP32, INT64])))
    diagonal = np.array(data.draw(st.integers(-4, 4)))
    model = one(
        "Trilu",
        {"x": x, "k": diagonal},
        constant=["k"],
        stated=draw_stated(data.draw, {"x": x}),
        upper=data.draw(st.integers(0, 1)),
    )
    check(model, {"x": x}, "FILL", "SELECT")


@about("SCATTER")
@given(st.data())
@settings(max_examples=30)
def test_scatter_elements(data: st.DataObject) -> None:
    """No index twice in a line: which update wins is not defined."""
    draw = data.draw
    x = draw_array(draw, draw(shapes(1)), draw(st.sampled_from(MOVED)))
    axis = draw_axis(draw, x.ndim)
    rng = np.random.default_rng(draw(seeds))
    every = np.broadcast_to(np.arange(x.shape[axis]), np.moveaxis(x, axis, -1).shape)
    indices = np.moveaxis(rng.permuted(every, axis=-1), -1, axis)
    indices = indices[tuple(slice(draw(st.integers(1, size))) for size in x.shape)]
    inputs = {
        "x": x,
        "i": np.ascontiguousarray(indices),
        "u": draw_array(draw, indices.shape, x.dtype),
    }
    model = one("ScatterElements", inputs, stated=draw_stated(draw, inputs), axis=axis)
    check(model, inputs, "SCATTER")


# ---- the layers of a decoder


@about("ROTARY_EMBEDDING")
@given(st.data())
@settings(max_examples=40)
def test_rotary_embedding(data: st.DataObject) -> None:
    draw = data.draw
    batch, heads, count = draw(sizes), draw(sizes), draw(sizes)
    rows = draw(st.integers(count, 40))  # onnxruntime refuses tables shorter than the text
    half = draw(st.integers(1, 8))
    part = draw(st.sampled_from([0, 2 * half]))
    rest = 2 * draw(st.integers(0, 3)) if part else 0
    by_position = draw(st.booleans())
    table = (rows, half) if by_position else (batch, count, half)
    inputs = {
        "x": draw_array(draw, (batch, heads, count, 2 * half + rest)),
        "cos": draw_array(draw, table, spread=1),
        "sin": draw_array(draw, table, spread=1),
    }
    if by_position:
        rng = np.random.default_rng(draw(seeds))
        inputs["position_ids"] = rng.integers(0, rows, (batch, count))
    sized = {("x", 3), ("cos", len(table) - 1), ("sin", len(table) - 1)}  # must be stated
    per_token = ["position_ids"] if by_position else ["cos", "sin"]
    alike = [
        {("x", 0), *((name, 0) for name in per_token)},
        {("x", 2), *((name, 1) for name in per_token)},
        {("cos", 0), ("sin", 0)},
    ]
    model = one(
        "RotaryEmbedding",
        inputs,
        stated=sized | draw_stated(draw, inputs, alike=alike),
        interleaved=draw(st.integers(0, 1)),
        rotary_embedding_dim=part,
    )
    # two products and their sum; onnxruntime may fuse a multiplication and an addition
    bound = np.abs(inputs["x"]).max() * (np.abs(inputs["cos"]).max() + np.abs(inputs["sin"]).max())
    check(model, inputs, "ROTARY_EMBEDDING", atol=1e-6 * bound)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding_of_heads_side_by_side(interleaved: int) -> None:
    tables = {
        name: random_array(seed, (9, 4), spread=1) for seed, name in enumerate(["cos", "sin"])
    }
    inputs = {
        "x": random_array(2, (2, 3, 5 * 8)),
        **tables,
        "position_ids": np.array([[3, 0, 8], [1, 1, 2]]),
    }
    model = one("RotaryEmbedding", inputs, num_heads=5, interleaved=interleaved)
    check(model, inputs, "ROTARY_EMBEDDING", atol=SUM_ERROR)


@about("KV_CACHE_UPDATE")
@given(st.data())
@settings(max_examples=30)
def test_cache_updates_at_each_rows_own_slot(data: st.DataObject) -> None:
    draw = data.draw
    batch, heads, capacity, size = draw(sizes), draw(sizes), draw(st.integers(1, 9)), draw(sizes)
    count = draw(st.integers(1, capacity))
    dtype = draw(st.sampled_from([FP32, FP16]))
    inputs = {
        "past": draw_array(draw, (batch, heads, capacity, size), dtype),
        "update": draw_array(draw, (batch, heads, count, size), dtype),
        "first": int64(*(draw(st.integers(0, capacity - count)) for _ in range(batch))),
    }
    # heads, capacity and size must be stated
    stated = {(name, axis) for name in ("past", "update") for axis in (1, 3)} | {("past", 2)}
    model = one(
        "TensorScatter",
        inputs,
        stated=stated | draw_stated(draw, inputs),
        axis=draw(st.sampled_from([2, -2])),
        mode="linear",
    )
    check(model, inputs, "KV_CACHE_UPDATE")


@st.composite
def attentions(draw: st.DrawFn, mask: str) -> tuple[dict[str, Array], dict[str, Any], Any]:
    """Operands of Attention, its attributes, and the sizes that the model states."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(sizes)
    queries, keys = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    size = draw(st.sampled_from([2, 4, 8, 16]))
    heads = kv_heads * group
    inputs = {
        "q": draw_array(draw, (batch, heads, queries, size), spread=1),
        "k": draw_array(draw, (batch, kv_heads, keys, size), spread=1),
        "v": draw_array(draw, (batch, kv_heads, keys, size), spread=1),
    }
    if mask in ("bool", "float"):
        leading = [(), (1,), (heads,), (batch, 1), (1, 1), (1, heads), (batch, heads)]
        shape = draw(st.sampled_from(leading))
        seen = draw_array(draw, (*shape, queries, keys), BOOL)
        seen[..., 0] = True  # a query that sees nothing has no weights to speak of
        added = draw_array(draw, seen.shape)
        hidden = np.where(seen, added, np.float32(-np.inf))
        inputs["mask"] = seen if mask == "bool" else draw(st.sampled_from([added, hidden]))
    attributes: dict[str, Any] = {"is_causal": 1} if mask == "causal" else {}
    if draw(st.booleans()):
        attributes["scale"] = draw(st.sampled_from([0.25, 1.0, size**-0.5]))
    # TensorRT derives the default scale from a stated size, and wants heads stated
    stated = {(name, axis) for name in "qkv" for axis in (1, 3)} | {("mask", 0), ("mask", 1)}
    alike = [{("k", axis), ("v", axis)} for axis in (0, 2)]
    return inputs, attributes, stated | draw_stated(draw, inputs, alike=alike)


@about("ATTENTION_INPUT", "ATTENTION_OUTPUT")
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@given(st.data())
@settings(max_examples=30)
def test_attention(mask: str, data: st.DataObject) -> None:
    inputs, attributes, stated = data.draw(attentions(mask))
    model = one("Attention", inputs, stated=stated, **attributes)
    # scores are sums of products, and weights sum to 1
    check(model, inputs, "ATTENTION_INPUT", atol=SUM_ERROR * np.abs(inputs["v"]).max())


@given(st.data())
@settings(max_examples=10)
def test_attention_of_heads_side_by_side(data: st.DataObject) -> None:
    draw = data.draw
    batch, kv_heads, group, size = draw(sizes), draw(sizes), draw(sizes), draw(st.integers(1, 8))
    queries, keys = draw(sizes), draw(sizes)
    heads = kv_heads * group
    inputs = {
        "q": draw_array(draw, (batch, queries, heads * size), spread=1),
        "k": draw_array(draw, (batch, keys, kv_heads * size), spread=1),
        "v": draw_array(draw, (batch, keys, kv_heads * size), spread=1),
    }
    model = one("Attention", inputs, q_num_heads=heads, kv_num_heads=kv_heads, scale=0.5)
    check(model, inputs, "ATTENTION_INPUT", atol=SUM_ERROR * np.abs(inputs["v"]).max())


def test_attention_without_a_stated_head_size_takes_its_scale_from_the_tensor() -> None:
    inputs = {name: random_array(seed, (2, 3, 4, 8), spread=1) for seed, name in enumerate("qkv")}
    check(one("Attention", inputs, stated=()), inputs, "ATTENTION_INPUT", atol=SUM_ERROR)


# ---- layers of TensorRT's that the parser makes of none of these, against NumPy


def parsed_identity(**inputs: Array) -> Any:
    """A network to which a test adds a layer of its own, and its inputs by name."""
    outputs = [f"{name}.same" for name in inputs]
    nodes = [
        helper.make_node("Identity", [name], [out])
        for name, out in zip(inputs, outputs, strict=True)
    ]
    parsed = parse(proto(nodes, inputs, outputs))
    network = parsed.network
    return parsed, [network.get_input(index) for index in range(network.num_inputs)]


@given(st.data())
@settings(max_examples=10)
def test_floor_division_of_floats(data: st.DataObject) -> None:
    inputs = {name: draw_array(data.draw, (3, 4)) for name in "ab"}
    parsed, (a, b) = parsed_identity(**inputs)
    layer = parsed.network.add_elementwise(a, b, parsed.trt.ElementWiseOperation.FLOOR_DIV)
    (got,) = evaluate(parsed, inputs, [layer.get_output(0).name])
    same(got, np.floor(inputs["a"] / inputs["b"]))


@given(st.data())
@settings(max_examples=10)
def test_a_shuffle_transposes_reshapes_and_transposes_again(data: st.DataObject) -> None:
    x = draw_array(data.draw, data.draw(shapes(3, 3)))
    first, second = (data.draw(st.permutations(range(3))) for _ in range(2))
    parsed, (tensor,) = parsed_identity(x=x)
    layer = parsed.network.add_shuffle(tensor)
    layer.first_transpose, layer.second_transpose = first, second
    moved = x.transpose(first)
    layer.reshape_dims = (0, moved.shape[2], -1)
    (got,) = evaluate(parsed, {"x": x}, [layer.get_output(0).name])
    same(got, moved.reshape(moved.shape[0], moved.shape[2], -1).transpose(second))


@pytest.mark.parametrize("how", ["attribute", "input"])
def test_a_slice_of_named_axes(how: str) -> None:
    x = random_array(1, (4, 5, 6))
    parsed, (tensor,) = parsed_identity(x=x)
    layer = parsed.network.add_slice(tensor, (3, 1), (2, 3), (-2, 1))
    if how == "attribute":
        layer.axes = (2, 0)
    else:
        axes = parsed.network.add_constant((2,), np.array([2, 0], np.int32))
        layer.set_input(5, axes.get_output(0))
    (got,) = evaluate(parsed, {"x": x}, [layer.get_output(0).name])
    same(got, x[1:4, :, 3::-2])


@pytest.mark.parametrize("kind", ["FLOAT", "INT32", "INT64"])
def test_a_fill_of_several_axes(kind: str) -> None:
    parsed, _ = parsed_identity(x=np.zeros(1, np.float32))
    trt, network = parsed.trt, parsed.network
    dtype = {"FLOAT": FP32, "INT32": INT32, "INT64": INT64}[kind]
    layer = network.add_fill((2, 3), trt.FillOperation.LINSPACE, getattr(trt.DataType, kind))
    # an INT64 start keeps all of its digits
    start = 2**40 if kind == "INT64" else 7
    layer.set_input(1, network.add_constant((), np.array(start, dtype)).get_output(0))
    layer.set_input(2, network.add_constant((2,), np.array([10, 2], dtype)).get_output(0))
    (got,) = evaluate(parsed, {}, [layer.get_output(0).name])
    same(got, start + np.array([[0, 2, 4], [10, 12, 14]], dtype))


@pytest.mark.parametrize("kind", ["FLOAT", "INT32", "INT64"])
def test_a_fill_whose_numbers_are_attributes(kind: str) -> None:
    parsed, _ = parsed_identity(x=np.zeros(1, np.float32))
    trt = parsed.trt
    dtype = {"FLOAT": FP32, "INT32": INT32, "INT64": INT64}[kind]
    layer = parsed.network.add_fill((5,), trt.FillOperation.LINSPACE, getattr(trt.DataType, kind))
    layer.alpha, layer.beta = 7, -3
    (got,) = evaluate(parsed, {}, [layer.get_output(0).name])
    same(got, np.array([7, 4, 1, -2, -5], dtype))


@given(attentions("none"))
@settings(max_examples=10)
def test_causal_attention_aligned_lower_right_sees_what_came_before(drawn: Any) -> None:
    inputs, _, _ = drawn
    parsed, (q, k, v) = parsed_identity(**inputs)
    softmax = parsed.trt.AttentionNormalizationOp.SOFTMAX
    attention = parsed.network.add_attention(q, k, v, softmax, False)
    attention.causal_kind = parsed.trt.CausalMaskKind.LOWER_RIGHT
    (got,) = evaluate(parsed, inputs, [attention.get_output(0).name])
    queries, keys = inputs["q"].shape[2], inputs["k"].shape[2]
    seen = np.arange(keys) <= np.arange(queries)[:, None] + keys - queries
    if not seen.any(-1).all():
        return  # more queries than keys: the first see nothing
    group = inputs["q"].shape[1] // inputs["k"].shape[1]
    k_, v_ = (inputs[name].repeat(group, axis=1) for name in "kv")
    scores = np.where(seen, inputs["q"] @ k_.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True) @ v_
    same(got, want, atol=SUM_ERROR * np.abs(v_).max())


# ---- the table


def test_every_kind_and_every_operation_of_the_tables_is_tested() -> None:
    operations = {
        *(f"ELEMENTWISE {name}" for name in layers._ARITHMETIC),
        *(f"UNARY {name}" for name in layers._UNARY),
        *(f"ACTIVATION {name}" for name in layers._ACTIVATIONS),
        *(f"REDUCE {name}" for name in REDUCTIONS),
    }
    assert {*layers.KINDS, *operations} == TESTED
