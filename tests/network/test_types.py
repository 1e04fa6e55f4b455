"""Strong typing: in bf16 and fp16 every layer is fp32 arithmetic on the values given, rounded once to the layer's type.

The expected values are NumPy's and ml_dtypes'. Where fp32 has one right answer they are equal: an operation of IEEE
754, or sums of numbers that are so short that fp32 holds every partial sum. Functions that two libraries compute
differently in the last digits of fp32 may fall to either side of a rounding border: neighbours are accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qwenport.validate.errors import NetworkError
from qwenport.validate.network import Interpreter, parse_model

from .models import (
    BF16,
    FP16,
    FP32,
    INT32,
    INT64,
    Array,
    draw_array,
    element,
    evaluate,
    int64,
    one,
    parse,
    proto,
    random_array,
    same,
    seeds,
    shapes,
    to_numpy,
    to_torch,
)

HALVES = pytest.mark.parametrize("half", [BF16, FP16], ids=["bf16", "fp16"])
few = settings(max_examples=15)


def value_of(model: Any, inputs: dict[str, Array], *, exact: bool = False) -> Array:
    (got,) = evaluate(parse(model), inputs, ["y"], exact=exact)
    return got


def rounded(values: Array, half: Any) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(half)


def bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.int16)


def neighbours(got: Array, want: Array) -> None:
    """Equal, or next to each other among the numbers of the type."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    places = [np.where(b < 0, -32768 - b, b) for b in (bits(x).astype(int) for x in (got, want))]
    assert (np.abs(places[0] - places[1]) <= 1).all()


def spread_out(seed: int, shape: tuple[int, ...], half: Any) -> Array:
    """Numbers of very different magnitudes, and now and then a large one."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)
    return rounded(np.where(rng.random(shape) < 0.05, values * 2.0**12, values), half)


def short(seed: int, shape: tuple[int, ...], half: Any) -> Array:
    """Multiples of 1/8 below 16: every product and sum of a hundred of them is exact in fp32."""
    return (np.random.default_rng(seed).integers(-127, 128, shape) / 8).astype(half)


# ---- one operation, one rounding

ONE_ROUNDING: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Abs": np.abs,
    "Neg": np.negative,
    "Ceil": np.ceil,
    "Floor": np.floor,
    "Round": np.round,
    "Sign": np.sign,
    "Reciprocal": np.reciprocal,
    "Relu": lambda x: np.maximum(x, 0),
}


@HALVES
@pytest.mark.parametrize("operator", ONE_ROUNDING)
@given(shapes(0, 3), seeds)
@few
def test_one_operation_is_rounded_once(
    half: Any, operator: str, shape: tuple[int, ...], seed: int
) -> None:
    function = ONE_ROUNDING[operator]
    names = "ab" if isinstance(function, np.ufunc) and function.nin == 2 else "a"
    inputs = {name: spread_out(seed + i, shape, half) for i, name in enumerate(names)}
    wide = [value.astype(np.float32) for value in inputs.values()]
    with np.errstate(divide="ignore"):
        want = np.asarray(function(*wide), np.float32)
    model = one(operator, inputs)
    same(value_of(model, inputs), rounded(want, half))
    # exact: the same without the rounding
    exact = dict(zip(inputs, wide, strict=True))
    same(value_of(model, exact, exact=True), want)


@HALVES
@pytest.mark.parametrize("operator", ["Equal", "Greater", "Less", "IsInf", "IsNaN"])
def test_questions_about_halves_have_exact_answers(half: Any, operator: str) -> None:
    a = rounded(np.array([1, 1.01, -2, math.inf, math.nan]), half)
    inputs = {"a": a} if operator.startswith("Is") else {"a": a, "b": a[::-1].copy()}
    functions = {"Equal": np.equal, "Greater": np.greater, "Less": np.less}
    functions |= {"IsInf": np.isinf, "IsNaN": np.isnan}
    want = functions[operator](*(value.astype(np.float32) for value in inputs.values()))
    same(value_of(one(operator, inputs), inputs), want)


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FUNCTIONS: dict[str, tuple[str, dict[str, Any], Callable[[Array], Array]]] = {
    "EXP": ("Exp", {}, np.exp),
    "LOG": ("Log", {}, np.log),
    "SQRT": ("Sqrt", {}, np.sqrt),
    "SIN": ("Sin", {}, np.sin),
    "COS": ("Cos", {}, np.cos),
    "ERF": ("Erf", {}, np.vectorize(math.erf)),
    "SIGMOID": ("Sigmoid", {}, lambda x: 1 / (1 + np.exp(-x))),
    "TANH": ("Tanh", {}, np.tanh),
    "GELU": ("Gelu", {}, gelu),
    "GELU tanh": ("Gelu", {"approximate": "tanh"}, gelu_tanh),
}


@HALVES
@pytest.mark.parametrize("name", FUNCTIONS)
@given(seeds)
@few
def test_a_function_is_computed_in_fp32(half: Any, name: str, seed: int) -> None:
    operator, attributes, function = FUNCTIONS[name]
    x = rounded(random_array(seed, (64,), spread=2), half)
    if name in ("LOG", "SQRT"):
        x = np.abs(x)
    if name.startswith("GELU"):
        x = x.clip(-2, 2).astype(half)  # far below 0 nothing is left of 1 + erf(x) in fp32
    want = rounded(function(x.astype(np.float64)), half)
    neighbours(value_of(one(operator, {"x": x}, **attributes), {"x": x}), want)


@HALVES
@given(seeds)
@few
def test_powers_are_computed_in_fp32(half: Any, seed: int) -> None:
    inputs = {
        "a": np.abs(rounded(random_array(seed, (64,)), half)),
        "b": rounded(random_array(seed + 1, (64,), spread=1), half),
    }
    a, b = (value.astype(np.float64) for value in inputs.values())
    neighbours(value_of(one("Pow", inputs), inputs), rounded(a**b, half))


# ---- sums


@HALVES
@given(st.data())
@settings(max_examples=30)
def test_products_are_summed_in_fp32_and_rounded_once(half: Any, data: st.DataObject) -> None:
    rows, inner, columns = (data.draw(st.integers(1, 33)) for _ in range(3))
    seed = data.draw(seeds)
    inputs = {
        "a": short(seed, (2, rows, inner), half),
        "b": short(seed + 1, (inner, columns), half),
    }
    wide = {name: value.astype(np.float32) for name, value in inputs.items()}
    want = wide["a"] @ wide["b"]
    fixed = data.draw(st.sampled_from(["", "b"]))
    model = one("MatMul", inputs, constant=fixed)
    for given_ in (inputs, wide):
        given_.pop(fixed, None)
    same(value_of(model, inputs), rounded(want, half))
    same(value_of(model, wide, exact=True), want)


REDUCTIONS = {"ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min}


@HALVES
@pytest.mark.parametrize("operator", [*REDUCTIONS, "ReduceMean"])
@given(st.data())
@few
def test_reductions_are_summed_in_fp32_and_rounded_once(
    half: Any, operator: str, data: st.DataObject
) -> None:
    x = short(data.draw(seeds), data.draw(shapes(1, 4)), half)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    wide = x.astype(np.float32)
    if operator == "ReduceMean":
        want = wide.sum(axis, keepdims=True) / np.float32(x.shape[axis])
    else:
        want = REDUCTIONS[operator](wide, axis, keepdims=True)
    model = one(operator, {"x": x, "axes": int64(axis)}, constant=["axes"])
    same(value_of(model, {"x": x}), rounded(want, half))


@HALVES
@pytest.mark.parametrize("exclusive", [0, 1])
@given(st.data())
@few
def test_cumulative_sums_are_fp32_and_rounded_once(
    half: Any, exclusive: int, data: st.DataObject
) -> None:
    """As one layer: the running total is not rounded on its way, only what is written down."""
    x = short(data.draw(seeds), (data.draw(st.integers(1, 40)), 3), half)
    total = np.cumsum(x.astype(np.float32), axis=0)
    want = total - x.astype(np.float32) * exclusive
    axis = np.array(0)
    model = one("CumSum", {"x": x, "axis": axis}, constant=["axis"], exclusive=exclusive)
    same(value_of(model, {"x": x}), rounded(want, half))


@HALVES
@given(shapes(2, 3), seeds)
@few
def test_softmax_is_computed_in_fp32(half: Any, shape: tuple[int, ...], seed: int) -> None:
    x = rounded(random_array(seed, shape), half)
    powers = np.exp(x.astype(np.float64) - x.astype(np.float64).max(-1, keepdims=True))
    want = rounded(powers / powers.sum(-1, keepdims=True), half)
    neighbours(value_of(one("Softmax", {"x": x}, axis=-1), {"x": x}), want)


@HALVES
@given(seeds)
@few
def test_each_layer_of_a_chain_is_rounded(half: Any, seed: int) -> None:
    """And to its own type: in the middle a product is fp32, because the model says so."""
    inputs = {name: rounded(random_array(seed + i, (50,)), half) for i, name in enumerate("abc")}
    nodes = [
        helper.make_node("Mul", ["a", "b"], ["ab"]),
        helper.make_node("Add", ["ab", "c"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "wide"], ["square"]),
        helper.make_node("Add", ["square", "wide"], ["wider"]),
        helper.make_node("Cast", ["wider"], ["y"], to=element(inputs["a"])),
    ]
    model = proto(nodes, inputs, ["y"])
    a, b, c = (value.astype(np.float32) for value in inputs.values())
    wide = rounded(rounded(a * b, half).astype(np.float32) + c, half).astype(np.float32)
    same(value_of(model, inputs), rounded(wide * wide + wide, half))
    exact = a * b + c
    got = value_of(model, dict(zip("abc", (a, b, c), strict=True)), exact=True)
    same(got, exact * exact + exact)


@HALVES
@given(seeds)
@few
def test_rms_normalization_is_fp32_until_the_scale(half: Any, seed: int) -> None:
    inputs = {
        "x": rounded(random_array(seed, (6, 32)), half),
        "scale": rounded(random_array(seed + 1, (32,), spread=1), half),
    }
    x = inputs["x"].astype(np.float64)
    normal = rounded(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6), half)
    got = value_of(one("RMSNormalization", inputs, epsilon=1e-6), inputs)
    # each row may be on either side of a border before the scale, so every product of a neighbour is right
    steps = [np.nextafter(normal, half.type(side)) for side in (-math.inf, math.inf)]
    products = [
        rounded(near.astype(np.float32) * inputs["scale"].astype(np.float32), half)
        for near in (normal, *steps)
    ]
    assert np.any([got == product for product in products], axis=0).all()
    assert (got == products[0]).mean() > 0.9


# ---- attention


@HALVES
@pytest.mark.parametrize("mask", ["none", "bool", "causal"])
@given(st.data())
@few
def test_attention_rounds_its_weights_and_its_sums_once(
    half: Any, mask: str, data: st.DataObject
) -> None:
    """All scores are 0, so that each of n keys seen has the weight 1/n, which no half holds for most n."""
    batch, kv_heads, group, queries = (data.draw(st.integers(1, 3)) for _ in range(4))
    keys, seed = data.draw(st.integers(1, 12)), data.draw(seeds)
    heads = kv_heads * group
    inputs = {
        "q": np.zeros((batch, heads, queries, 4), half),
        "k": short(seed, (batch, kv_heads, keys, 4), half),
        "v": short(seed + 1, (batch, kv_heads, keys, 4), half),
    }
    seen = np.ones((batch, 1, queries, keys), bool)
    if mask == "bool":
        seen = inputs["mask"] = random_array(seed, seen.shape, bool) | (np.arange(keys) == 0)
    if mask == "causal":
        seen = seen & (np.arange(keys) <= np.arange(queries)[:, None])
    model = one("Attention", inputs, scale=1.0, is_causal=int(mask == "causal"))
    ones = seen.astype(np.float32)
    weights = rounded(ones / ones.sum(-1, keepdims=True), half).astype(np.float32)
    want = weights @ inputs["v"].astype(np.float32).repeat(group, axis=1)
    same(value_of(model, inputs), rounded(want, half))


@HALVES
@given(seeds)
@few
def test_attention_of_any_scores(half: Any, seed: int) -> None:
    """Scores are not rounded. The query and the keys are scaled first, each by a half and rounded."""
    inputs = {
        name: rounded(random_array(seed + i, (2, 3, 9, 16), spread=1), half)
        for i, name in enumerate("qkv")
    }
    scale = 0.3
    factor = rounded(np.sqrt(np.float32(scale)), half).astype(np.float32)
    q, k = (rounded(inputs[n].astype(np.float32) * factor, half).astype(np.float64) for n in "qk")
    scores = q @ k.swapaxes(-1, -2)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    weights = rounded(powers / powers.sum(-1, keepdims=True), half).astype(np.float64)
    v = inputs["v"].astype(np.float64)
    got = value_of(one("Attention", inputs, scale=scale), inputs)
    # a weight may lie on either side of a border of rounding; that moves the sum by one step of the weight, and the
    # sum itself may round either way
    step = float(np.finfo(np.float16).eps if half == FP16 else 2.0**-7)
    bound = step * (weights.max(-1)[..., None] * np.abs(v).max() / 8 + np.abs(weights @ v))
    assert (np.abs(got.astype(np.float64) - weights @ v) <= bound).all()
    assert (got == rounded(weights @ v, half)).mean() > 0.95


def test_attention_in_exact_mode_rounds_nothing() -> None:
    inputs = {name: random_array(seed, (2, 4, 9, 16), spread=1) for seed, name in enumerate("qkv")}
    halves = {name: value.astype(BF16) for name, value in inputs.items()}
    exact = value_of(one("Attention", halves, scale=0.3), inputs, exact=True)
    # the network of the fp32 model has nothing to round; only the scale's root is a constant, and not rounded either
    same(exact, value_of(one("Attention", inputs, scale=0.3), inputs))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(None, {"bf16", "fp16"}), ("bf16", {"bf16"}), ("fp16", {"fp16"}), ("fp32", set())],
)
def test_exact_mode_widens_the_models_own_dtype_and_no_other(
    dtype: str | None, kept: set[str]
) -> None:
    """A cast to another type is in the model because somebody wanted it there."""
    x = random_array(1, (50,))
    nodes = []
    for name, kind in (("bf16", TensorProto.BFLOAT16), ("fp16", TensorProto.FLOAT16)):
        nodes += [
            helper.make_node("Cast", ["x"], [f"{name}.half"], to=kind),
            helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT),
        ]
    parsed = parse_model(ir.from_proto(proto(nodes, {"x": x}, ["bf16", "fp16"])), Path(), dtype)
    values = evaluate(parsed, {"x": x}, ["bf16", "fp16"], exact=True)
    for name, half, got in zip(("bf16", "fp16"), (BF16, FP16), values, strict=True):
        same(got, x if name in kept else rounded(x, half).astype(np.float32))


# ---- range


def test_fp16_overflows_to_infinity_and_exact_mode_does_not() -> None:
    inputs = {"a": np.array([300, -300, 200], FP16), "b": np.array([300, 300, 300], FP16)}
    model = one("Mul", inputs)
    same(value_of(model, inputs), np.array([math.inf, -math.inf, 60000], FP16))
    wide = {name: value.astype(np.float32) for name, value in inputs.items()}
    same(value_of(model, wide, exact=True), np.array([90000, -90000, 60000], np.float32))
    x = np.array([12.0, -20.0], FP16)
    same(value_of(one("Exp", {"x": x}), {"x": x})[:1], np.array([math.inf], FP16))


def test_a_sum_in_fp16_overflows_only_in_the_end() -> None:
    x = np.array([[60000, 60000, -60000], [60000, 60000, 0]], FP16)
    model = one("ReduceSum", {"x": x, "axes": int64(1)}, constant=["axes"], keepdims=0)
    same(value_of(model, {"x": x}), np.array([60000, math.inf], FP16))
    inputs = {"a": x, "b": np.ones((3, 1), FP16)}
    same(value_of(one("MatMul", inputs), inputs), np.array([[60000], [math.inf]], FP16))


def test_small_numbers_of_fp16_keep_their_last_digits() -> None:
    inputs = {"a": np.array([2.0**-14, 6e-8, 1e-4], FP16), "b": np.array([0.5, 0.5, 2.0], FP16)}
    a, b = (value.astype(np.float32) for value in inputs.values())
    want = (a * b).astype(FP16)
    assert want[1] == 0 and want[0] != 0
    same(value_of(one("Mul", inputs), inputs), want)


# ---- movement: not a bit changes

EVERY_BIT_PATTERN = np.arange(2**16, dtype=np.uint16).reshape(256, 256)


@HALVES
@pytest.mark.parametrize(
    ("operator", "operands", "function"),
    [
        ("Identity", {}, lambda x: x),
        ("Transpose", {}, np.transpose),
        ("Reshape", {"c": int64(-1, 64)}, lambda x: x.reshape(-1, 64)),
        (
            "Slice",
            {"c": int64(250), "d": int64(-257), "e": int64(1), "f": int64(-3)},
            lambda x: x[:, 250::-3],
        ),
        ("Gather", {"c": int64(3, 0, 200)}, lambda x: x[[3, 0, 200]]),
        ("Unsqueeze", {"c": int64(1)}, lambda x: x[:, None]),
        ("Expand", {"c": int64(2, 256, 256)}, lambda x: np.broadcast_to(x, (2, 256, 256))),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_what_moves_a_half_keeps_every_bit(
    half: Any, operator: str, operands: dict[str, Array], function: Any, constant: bool
) -> None:
    """NaNs with their payloads, too; the tensor is an input or a constant."""
    x = EVERY_BIT_PATTERN.view(half)
    fixed = [*operands, *(["x"] if constant else [])]
    model = one(operator, {"x": x, **operands}, constant=fixed)
    got = value_of(model, {} if constant else {"x": x})
    assert got.dtype == half
    np.testing.assert_array_equal(bits(got), bits(function(x)))


@HALVES
@given(st.data())
@few
def test_what_chooses_among_halves_keeps_every_bit(half: Any, data: st.DataObject) -> None:
    x, z = (draw_array(data.draw, (4, 6), half) for _ in range(2))
    chosen = draw_array(data.draw, (4, 6), bool)
    inputs = {"c": chosen, "x": x, "z": z}
    same(value_of(one("Where", inputs), inputs), np.where(chosen, x, z))
    inputs = {"x": x, "z": z}
    same(value_of(one("Concat", inputs, axis=1), inputs), np.concatenate([x, z], 1))
    order = np.argsort(-x.astype(np.float32), axis=1, kind="stable")[:, :3]
    operands = {"x": x, "k": int64(3)}
    model = one("TopK", operands, constant=["k"], outputs=["y", "i"])
    got, indices = evaluate(parse(model), {"x": x}, ["y", "i"])
    same(indices, order)
    same(got, np.take_along_axis(x, order, 1))
    inputs = {"x": x, "i": order, "u": z[:, :3].copy()}
    want = x.copy()
    np.put_along_axis(want, order, inputs["u"], 1)
    same(value_of(one("ScatterElements", inputs, axis=1), inputs), want)
    inputs = {"x": x, "i": order}
    same(value_of(one("GatherElements", inputs, axis=1), inputs), np.take_along_axis(x, order, 1))


@HALVES
def test_a_cache_of_halves_is_updated_in_place(half: Any) -> None:
    past, update = (rounded(random_array(seed, (2, 3, n, 4)), half) for seed, n in ((1, 8), (2, 2)))
    inputs = {"past": past, "update": update, "first": int64(6, 1)}
    program = Interpreter(parse(one("TensorScatter", inputs, axis=2))).program(list(inputs), ["y"])
    given_ = {name: to_torch(value) for name, value in inputs.items()}
    made = program.run(given_)["y"]
    want = past.copy()
    want[0, :, 6:8], want[1, :, 1:3] = update
    same(to_numpy(made), want)
    assert made.data_ptr() == given_["past"].data_ptr()


@HALVES
@pytest.mark.parametrize("interleaved", [0, 1])
@given(seeds)
@few
def test_rotary_embedding_is_rounded_once(half: Any, interleaved: int, seed: int) -> None:
    x = short(seed, (2, 3, 5, 8), half)
    cos, sin = (short(seed + i, (20, 4), half) for i in (1, 2))
    inputs = {"x": x, "cos": cos, "sin": sin, "p": np.arange(10).reshape(2, 5) * 2}
    got = value_of(one("RotaryEmbedding", inputs, interleaved=interleaved), inputs)
    c, s = (table.astype(np.float32)[inputs["p"]][:, None] for table in (cos, sin))
    pairs = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
    a, b = (part.astype(np.float32) for part in pairs)
    want = np.zeros(x.shape, np.float32)
    places = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(4), slice(4, 8))
    want[..., places[0]], want[..., places[1]] = a * c - b * s, a * s + b * c
    same(got, rounded(want, half))


# ---- casts

types = st.sampled_from([FP32, FP16, BF16, INT32, INT64])


@given(types, st.lists(types, min_size=1, max_size=5), seeds)
@settings(max_examples=60)
def test_chains_of_casts(start: Any, chain: list[Any], seed: int) -> None:
    """Every tensor on the way is the one before it, converted. Exactly: halves are not rounded, integers are cut."""
    x = random_array(seed, (20,), FP32, 500.0).astype(start)
    names = ["x", *(f"t{index}" for index in range(len(chain)))]
    nodes = [
        helper.make_node(
            "Cast", [before], [after], to=helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        )
        for before, after, kind in zip(names[:-1], names[1:], chain, strict=True)
    ]
    parsed = parse(proto(nodes, {"x": x}, names[1:]))
    declared, exact = x, (x.astype(np.float32) if start in (FP16, BF16) else x)
    got_declared = evaluate(parsed, {"x": declared}, names[1:])
    got_exact = evaluate(parsed, {"x": exact}, names[1:], exact=True)
    for kind, first, second in zip(chain, got_declared, got_exact, strict=True):
        declared = declared.astype(kind)
        exact = exact.astype(FP32 if kind in (FP16, BF16) else kind)
        same(first, declared)
        same(second, exact)


def test_a_cast_to_bf16_rounds_to_nearest_even() -> None:
    x = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF], np.uint32)
    model = one("Cast", {"x": x.view(np.float32)}, to=TensorProto.BFLOAT16)
    got = value_of(model, {"x": x.view(np.float32)})
    want = np.array([0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80], np.uint16)
    np.testing.assert_array_equal(got.view(np.uint16), want)


# ---- constants


@HALVES
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 1, 2)], ids=str)
def test_inline_constants_of_any_rank(half: Any, shape: tuple[int, ...]) -> None:
    w = spread_out(3, shape, half)
    x = rounded(random_array(4, (2, 3)) if shape != (1, 1, 2) else random_array(4, (2,)), half)
    model = one("Mul", {"x": x, "w": w}, constant=["w"])
    want = rounded(x.astype(np.float32) * w.astype(np.float32), half)
    same(value_of(model, {"x": x}), want)


def external(name: str, values: Array, file: str, offset: int) -> ir.Value:
    """An initializer whose values lie in a file."""
    tensor = ir.ExternalTensor(
        file,
        offset,
        values.nbytes,
        ir.DataType(element(values)),
        shape=ir.Shape(values.shape),
        name=name,
    )
    return ir.Value(
        name=name,
        shape=ir.Shape(values.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ir.Model, dict[str, Array]]:
    """A model whose outputs are its initializers, which lie in a file behind a header of an odd length."""
    folder = tmp_path_factory.mktemp("beside")
    values = {
        "bf16": EVERY_BIT_PATTERN.view(BF16),
        "fp16": EVERY_BIT_PATTERN.view(FP16),
        "fp32": random_array(1, (7, 5)),
        "int64": np.arange(-3, 9) * 2**40,
    }
    (folder / "weights").mkdir()
    with (folder / "weights" / "model.safetensors").open("wb") as file:
        file.write(b"\x07" + bytes(6))
        offsets = {}
        for name, array in values.items():
            offsets[name] = file.tell()
            file.write(array.tobytes())
    nodes = [helper.make_node("Identity", [name], [f"{name}.same"]) for name in values]
    model = ir.from_proto(proto(nodes, {}, [f"{name}.same" for name in values], constants=values))
    for name, array in values.items():
        place = "weights/model.safetensors"
        initializer = model.graph.initializers[name]
        initializer.const_value = external(name, array, place, offsets[name]).const_value
    return folder, model, values


@pytest.mark.parametrize("exact", [False, True])
def test_constants_in_a_file_come_out_bit_by_bit(beside: Any, exact: bool) -> None:
    folder, model, values = beside
    program = Interpreter(parse_model(model, folder), exact=exact).program(
        [], [f"{name}.same" for name in values]
    )
    for _ in range(2):
        got = program.run({})
        for name, array in values.items():
            # widening a half is exact, and so is narrowing it again
            found = to_numpy(got[f"{name}.same"])
            if exact and name in ("bf16", "fp16"):
                assert found.dtype == FP32
                same(found, array.astype(np.float32))
            else:
                assert found.dtype == array.dtype
                assert found.tobytes() == array.tobytes()
        program.release()


@HALVES
def test_a_constant_in_a_file_is_multiplied_as_an_inline_one(half: Any, tmp_path: Path) -> None:
    x, w = (rounded(random_array(seed, (9, 9)), half) for seed in (1, 2))
    inline = one("MatMul", {"x": x, "w": w}, constant=["w"])
    model = ir.from_proto(inline)
    (tmp_path / "data").write_bytes(b"odd" + w.tobytes())
    model.graph.initializers["w"].const_value = external("w", w, "data", 3).const_value
    (got,) = evaluate(parse_model(model, tmp_path), {"x": x}, ["y"])
    same(got, value_of(inline, {"x": x}))


@pytest.mark.parametrize("dtype", [FP32, FP16, INT32, INT64], ids=str)
def test_constants_that_the_parser_makes_of_nodes(dtype: Any) -> None:
    w = random_array(5, (3, 4), dtype, 1000.0)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w)),
        helper.make_node("Identity", ["w"], ["y"]),
    ]
    same(value_of(proto(nodes, {}, ["y"]), {}), w)


def test_a_constant_node_in_bf16_is_right_or_refused() -> None:
    """NumPy has no bf16, and TensorRT's Python gives no other way to a constant's values."""
    w = rounded(random_array(5, (3, 4)), BF16)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w), name="made"),
        helper.make_node("Identity", ["w"], ["y"]),
    ]
    try:
        got = value_of(proto(nodes, {}, ["y"]), {})
    except NetworkError:
        return
    same(got, w)
