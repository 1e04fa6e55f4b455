"""What moves values, against onnxruntime: results are equal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from .layer_nets import NUMBERS, about, draw_axis, draw_broadcast, draw_operands, draw_spelling, few
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
    int64,
    one,
    proto,
    random_array,
    seeds,
    shapes,
    sizes,
)

MOVED = (FP32, FP16, INT32, INT64, BOOL)


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


@given(st.data())
@few
def test_padding_with_zeros(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any))
    pads = np.array(drawn, np.int64)  # with none at all there is no layer
    check(one("Pad", {"x": x, "pads": pads}, constant=["pads"]), {"x": x}, "SLICE")


@about("QUANTIZE")
@given(st.data(), st.sampled_from([0.03, 1.0, 2.5]))
@few
def test_rounding_to_fp8_saturates_and_takes_the_nearest_code(
    data: st.DataObject, scale: float
) -> None:
    shape = data.draw(shapes(1))
    x = np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32) * 500
    nodes = [
        helper.make_node(
            "QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.FLOAT8E4M3FN
        ),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    model = proto(nodes, {"x": x}, ["y"], constants={"s": np.array(scale, np.float32)})
    check(model, {"x": x}, "QUANTIZE", "DEQUANTIZE", rtol=2.0**-23)


@about("DEQUANTIZE")
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 2, 4]))
@few
def test_codes_times_the_scales_of_rows_and_of_blocks(
    rows: int, blocks: int, size: int | None
) -> None:
    assume(size is None or rows * blocks > 1)  # the parser refuses a single block
    random = np.random.default_rng(rows)
    codes = random.integers(-128, 128, (rows, blocks * (size or 3)), dtype=np.int8)
    shape = (rows,) if size is None else (rows, blocks)
    scales = random.uniform(0.1, 2, shape).astype(np.float32)
    how = {"axis": 0} if size is None else {"axis": 1, "block_size": size}
    model = one("DequantizeLinear", {"q": codes, "s": scales}, constant=["q", "s"], **how)
    check(model, {}, "DEQUANTIZE")
