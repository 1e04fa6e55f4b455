"""The passes of engines for onnxruntime: where weights are placed, and what is computed before anything loads."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qwenport.engines.lowering import (
    ALIGNMENT,
    CutRopeTables,
    DropCasts,
    FoldConstants,
    StoreWeights,
    for_onnxruntime,
    for_onnxruntime_engine,
)

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model_of(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], dtype: int = FLOAT
) -> ir.Model:
    """A model from x fp32 [n] to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", dtype, None)],
        constants,
    )
    imports = [helper.make_opsetid("", 24)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=11))


def stored_model(shapes: list[tuple[int, ...]]) -> ir.Model:
    """Every tensor in a file in bf16, each read by a node; none of the files exists."""
    names = [f"w{n}" for n in range(len(shapes))]
    nodes = [helper.make_node("Sum", ["x", *names], ["y"], name="sum")]
    model = model_of(nodes, [])
    for name, shape in zip(names, shapes, strict=True):
        size = 2 * int(np.prod(shape))
        tensor = ir.ExternalTensor(
            "absent", 0, size, ir.DataType.BFLOAT16, shape=ir.Shape(shape), name=name
        )
        (node,) = model.graph
        value = next(v for v in node.inputs if v is not None and v.name == name)
        value.const_value, value.type = tensor, ir.TensorType(ir.DataType.BFLOAT16)
        value.shape = ir.Shape(shape)
        model.graph.initializers[name] = value
    return model


@given(st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple), min_size=1))
def test_tensors_follow_each_other_and_are_as_aligned_as_their_sizes_allow(shapes) -> None:
    model = stored_model(shapes)
    store = StoreWeights("weights")
    assert store(model).modified
    end = None
    for weight in store.weights:
        entry = weight.entry
        assert end is None or entry.offset == end
        end = entry.offset + entry.length
        assert entry.length == 4 * np.prod(entry.shape)
        assert entry.offset % min(ALIGNMENT, entry.length & -entry.length) == 0
        value = model.graph.initializers[entry.name]
        place = value.const_value
        assert (place.location, place.offset, place.length) == (
            "weights",
            entry.offset,
            entry.length,
        )
        assert value.dtype == place.dtype == ir.DataType.FLOAT and tuple(value.shape) == entry.shape
        assert weight.source.location == "absent"
    assert store.weights[0].entry.offset % ALIGNMENT == 0
    assert {w.entry.name for w in store.weights} == set(model.graph.initializers)


def test_what_is_not_read_is_not_stored() -> None:
    model = stored_model([(2, 3), (4,)])
    (node,) = model.graph
    node.replace_input_with(1, None)
    store = StoreWeights("weights")
    store(model)
    assert [w.entry.name for w in store.weights] == ["w1"] == [*model.graph.initializers]


def test_constants_are_folded_and_the_result_is_the_same() -> None:
    nodes = [
        helper.make_node("Constant", [], ["a"], value_ints=[2, 3]),
        helper.make_node("Constant", [], ["axis"], value_int=0),
        helper.make_node("Gather", ["a", "axis"], ["two"], name="gather"),
        helper.make_node("Cast", ["two"], ["factor"], to=FLOAT, name="cast"),
        helper.make_node("Mul", ["x", "factor"], ["y"], name="product"),
    ]
    model = model_of(nodes, [])
    before = run(model)
    assert FoldConstants()(model).modified
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert [*model.graph.initializers] == ["factor"]
    np.testing.assert_array_equal(run(model), before)


def test_a_tensor_in_a_file_is_no_constant_to_fold() -> None:
    model = stored_model([(2, 3), (4,)])
    (node,) = model.graph
    node.replace_input_with(0, None)
    assert not FoldConstants()(model).modified


@pytest.mark.parametrize("at_end", [True, False])
def test_casts_that_do_nothing_disappear(at_end: bool) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["same"], to=FLOAT, name="first"),
        helper.make_node("Neg", ["same"], ["negative"], name="neg"),
        helper.make_node("Cast", ["negative"], ["y"], to=FLOAT if at_end else INT64, name="last"),
    ]
    model = model_of(nodes, [], FLOAT if at_end else INT64)
    (first, neg, _) = model.graph
    for value in (first.outputs[0], neg.outputs[0]):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    before = run(model)
    assert DropCasts()(model).modified
    assert [node.name for node in model.graph] == (["neg"] if at_end else ["neg", "last"])
    assert model.graph.outputs[0].name == "y"
    np.testing.assert_array_equal(run(model), before)


def test_a_cast_of_an_input_that_is_an_output_stays() -> None:
    model = model_of([helper.make_node("Cast", ["x"], ["y"], to=FLOAT, name="cast")], [])
    assert not DropCasts()(model).modified


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": np.array([1.5, -2.0], dtype=np.float32)})[0]


def test_tables_are_cut_without_being_read(package_of) -> None:
    model = package_of("bf16").read_model()
    before = model.graph.initializers["rope.sin"].const_value
    assert CutRopeTables(7)(model).modified
    after = model.graph.initializers["rope.sin"].const_value
    assert (after.location, after.offset, tuple(after.shape)) == (
        before.location,
        before.offset,
        (7, 16),
    )
    assert after.length == 7 * 16 * 4


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_an_engine_s_graph_has_fewer_nodes_and_the_same_operators(package_of, dtype) -> None:
    package = package_of(dtype)
    lowered = for_onnxruntime(package.read_model(), on_cpu=True)
    engine, weights = for_onnxruntime_engine(package.read_model(), rope_rows=64, file="weights")
    assert len(weights) == package.manifest["weights"]["tensors"] + 2  # the tables
    kinds = [
        [node.op_type for node in m.graph if node.op_type != "Cast"] for m in (lowered, engine)
    ]
    assert kinds[0] == kinds[1]
    assert "Cast" not in {node.op_type for node in engine.graph}
    assert not engine.functions and "qwenport" not in engine.opset_imports
    names = [[v.name for v in (*m.graph.inputs, *m.graph.outputs)] for m in (lowered, engine)]
    assert names[0] == names[1]


def test_the_file_that_a_tensor_is_named_in_does_not_matter(package_of) -> None:
    found = [
        for_onnxruntime_engine(package_of("bf16").read_model(), rope_rows=64, file=file)[1]
        for file in ("a", "another")
    ]
    places = [[(w.entry.name, w.entry.offset) for w in weights] for weights in found]
    assert places[0] == places[1]


def test_a_small_constant_stays_in_the_graph() -> None:
    constant = numpy_helper.from_array(np.float32(2), "two")
    model = model_of([helper.make_node("Mul", ["x", "two"], ["y"], name="m")], [constant])
    assert not StoreWeights("weights")(model).modified
