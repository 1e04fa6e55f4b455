"""Types: ranges, movement, casts and constants, to the bit."""

from __future__ import annotations

import math
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
    to_numpy,
    to_torch,
)
from .typed_nets import HALVES, bits, few, rounded, short, spread_out, value_of

# --- range


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


# --- movement: not a bit changes


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


# --- casts


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


# --- constants


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
