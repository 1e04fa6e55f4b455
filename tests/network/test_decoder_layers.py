"""The layers that a decoder is made of, against onnxruntime, and TensorRT's own against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from qwenport.validate.network import layers

from .layer_nets import REDUCTIONS, SUM_ERROR, TESTED, about
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

# --- the layers of a decoder


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


# --- layers of TensorRT's that the parser makes of none of these, against NumPy


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


# --- the table


def test_every_kind_and_every_operation_of_the_tables_is_tested() -> None:
    operations = {
        *(f"ELEMENTWISE {name}" for name in layers._ARITHMETIC),
        *(f"UNARY {name}" for name in layers._UNARY),
        *(f"ACTIVATION {name}" for name in layers._ACTIVATIONS),
        *(f"REDUCE {name}" for name in REDUCTIONS),
    }
    assert {*layers.KINDS, *operations} == TESTED
