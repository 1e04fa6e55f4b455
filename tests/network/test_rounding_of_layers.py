"""Half precision: one operation, one rounding; sums and attention."""

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
from onnx import TensorProto, helper

from qwenport.validate.network import parse_model

from .models import (
    BF16,
    FP16,
    Array,
    element,
    evaluate,
    int64,
    one,
    proto,
    random_array,
    same,
    seeds,
    shapes,
)
from .typed_nets import HALVES, bits, few, rounded, short, spread_out, value_of


def neighbours(got: Array, want: Array) -> None:
    """Equal, or next to each other among the numbers of the type."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    places = [np.where(b < 0, -32768 - b, b) for b in (bits(x).astype(int) for x in (got, want))]
    assert (np.abs(places[0] - places[1]) <= 1).all()


# --- one operation, one rounding


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


# --- sums


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


# --- attention


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
