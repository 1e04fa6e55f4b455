"""Signed codes: onnxruntime computes with the lowered graph what numpy computes with the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.contract import DOMAIN, no_progress
from qwenport.engines import LoweringError
from qwenport.engines.lowering import CODES_FILE, MadeFile, UseSignedCodes, write_tensors

from .quantized_graphs import DTYPES, Quantized, count, dequantize_linear, difference, random_weight

TOKENS = 3
FP32_ERROR = 2e-6
HALF = ("fp16", "bf16")


class Graph:
    """A graph of quantized linears, written step by step."""

    def __init__(self, folder: Path, k: int, dtype: str = "fp32") -> None:
        self.folder, self.nodes, self.values = folder, [], []
        self.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(DTYPES[dtype])))
        self.x = ir.Value(name="x", type=self.type, shape=ir.Shape((1, "m", k)))
        self.outputs: list[ir.Value] = []

    def dequantized(self, name: str, weight: Quantized) -> ir.Value:
        values, node = dequantize_linear(self.folder, name, weight)
        self.values += values
        self.nodes.append(node)
        return node.outputs[0]

    def add(self, op: str, inputs: Sequence[ir.Value], name: str, shape: Any, **given: Any) -> Any:
        node = ir.node(op, inputs, attributes=given, name=name)
        (made,) = node.outputs
        made.name, made.type, made.shape = name, self.type, ir.Shape(shape)
        self.nodes.append(node)
        return made

    def product(self, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
        assert weight.shape is not None
        n, k = weight.shape.numpy()
        turned = self.add("Transpose", [weight], f"{name}.t", (k, n), perm=[1, 0])
        y = self.add("MatMul", [x, turned], name, (1, "m", n))
        self.outputs.append(y)
        return y

    def model(self, *inputs: ir.Value) -> ir.Model:
        opsets = {"": 24, DOMAIN: 1}
        graph = ir.Graph(
            inputs or [self.x],
            self.outputs,
            nodes=self.nodes,
            initializers=self.values,
            opset_imports=opsets,
            name="g",
        )
        return ir.Model(graph, ir_version=11)


def lower(model: ir.Model) -> MadeFile:
    made = MadeFile()
    UseSignedCodes(made)(model)
    return made


def run(model: ir.Model, made: MadeFile, folder: Path, **feeds: Any) -> list[Any]:
    """What onnxruntime computes with the lowered graph and the file that it refers to."""
    target = folder / "lowered"
    target.mkdir()
    write_tensors(target / CODES_FILE, made.tensors, no_progress)
    ir.save(model, target / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # no activations in int8
    session = onnxruntime.InferenceSession(target / "model.onnx", options)
    return session.run(None, feeds)


@st.composite
def weights(draw: st.DrawFn) -> list[Quantized]:
    """One to three weights of one input, of any forms."""
    k = draw(st.sampled_from([128, 192, 256, 640]))
    found = []
    for seed in range(draw(st.integers(1, 3))):
        block = draw(st.sampled_from([b for b in (16, 32, 64, 128, k) if k % b == 0]))
        bits, symmetric = draw(st.sampled_from([4, 8])), draw(st.booleans())
        n = 2 * draw(st.integers(1, 5))
        made = random_weight(
            n, k // block, block, bits=bits, dtype="fp32", symmetric=symmetric, seed=seed
        )
        found.append(made)
    return found


@given(given_weights=weights())
def test_lowered_products_are_those_of_the_weights(
    tmp_path_factory: pytest.TempPathFactory, given_weights: list[Quantized]
) -> None:
    folder = tmp_path_factory.mktemp("g")
    k = given_weights[0].codes.shape[1]
    graph = Graph(folder, k)
    for index, weight in enumerate(given_weights):
        graph.product(graph.x, graph.dequantized(f"l{index}", weight), f"y{index}")
    model = graph.model()
    made = lower(model)
    forms = {(w.bits, w.block, w.symmetric) for w in given_weights}
    assert count(model, "DequantizeLinear") == len(forms) == len(made.weights)
    assert not {"UINT4", "UINT8"} & {str(v.dtype) for v in model.graph.initializers.values()}
    x = np.random.default_rng(1).standard_normal((1, TOKENS, k)).astype(np.float32)
    for found, weight in zip(run(model, made, folder, x=x), given_weights, strict=True):
        assert difference(found, x.astype(np.float64) @ weight.exact.T) < FP32_ERROR


def test_products_of_other_inputs_are_not_merged_and_share_no_sums(tmp_path: Path) -> None:
    graph = Graph(tmp_path, 128)
    weight = random_weight(6, 2, 64, bits=4, dtype="fp32", symmetric=False)
    other = graph.add("Neg", [graph.x], "other", (1, "m", 128))
    for index, x in enumerate([graph.x, graph.x, other]):
        graph.product(x, graph.dequantized(f"l{index}", weight), f"y{index}")
    model = graph.model()
    made = lower(model)
    assert count(model, "DequantizeLinear") == count(model, "ReduceSum") == 2
    assert [w.weights for w in made.weights] == [("l0.weight", "l1.weight"), ("l2.weight",)]
    x = np.random.default_rng(1).standard_normal((1, TOKENS, 128)).astype(np.float32)
    first, second, third = run(model, made, tmp_path, x=x)
    assert difference(first, x @ weight.exact.T) < FP32_ERROR
    assert np.array_equal(first, second) and difference(third, -first) < FP32_ERROR


@pytest.mark.parametrize("dtype", HALF)
def test_corrections_are_rounded_once_to_the_scales_dtype(tmp_path: Path, dtype: str) -> None:
    weight = random_weight(6, 3, 32, bits=4, dtype=dtype, symmetric=False)
    graph = Graph(tmp_path, 96, dtype)
    graph.product(graph.x, graph.dequantized("l", weight), "y")
    (signed,) = lower(graph.model()).weights
    assert signed.correction is not None
    found = np.frombuffer(signed.correction.stored(), DTYPES[dtype]).reshape(8, 6)
    exact = (weight.zeros.astype(np.float64) - 8) * weight.scales.astype(np.float64)
    assert np.array_equal(found[:3], exact.T.astype(np.float32).astype(DTYPES[dtype]))
    assert not found[3:].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_that_is_also_the_head_is_dequantized_once(tmp_path: Path, bits: int) -> None:
    weight = random_weight(10, 1, 64, bits=bits, dtype="fp32", symmetric=True)
    graph = Graph(tmp_path, 64)
    table = graph.dequantized("embed", weight)
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((1, "m")))
    rows = graph.add("Gather", [table, ids], "rows", (1, "m", 64), axis=0)
    graph.outputs.append(rows)
    graph.product(rows, table, "logits")
    model = graph.model(ids)
    made = lower(model)
    assert count(model, "DequantizeLinear") == 1
    chosen, logits = run(model, made, tmp_path, ids=np.array([[3, 9, 0]]))
    assert np.array_equal(chosen[0], weight.weight[[3, 9, 0]])
    assert difference(logits[0], weight.exact[[3, 9, 0]] @ weight.exact.T) < FP32_ERROR


def test_an_embedding_alone_is_gathered_from_signed_codes(tmp_path: Path) -> None:
    weight = random_weight(10, 1, 64, bits=8, dtype="fp32", symmetric=True)
    graph = Graph(tmp_path, 64)
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((1, "m")))
    table = graph.dequantized("embed", weight)
    graph.outputs.append(graph.add("Gather", [table, ids], "rows", (1, "m", 64), axis=0))
    model = graph.model(ids)
    (rows,) = run(model, lower(model), tmp_path, ids=np.array([[3, 9, 0]]))
    assert np.array_equal(rows[0], weight.weight[[3, 9, 0]])


def stacked(folder: Path, given: Sequence[Quantized]) -> Graph:
    """The stack of experts as an operator of ours would take it."""
    graph = Graph(folder, 64)
    n, k = given[0].codes.shape
    parts = [graph.dequantized(f"expert{i}", weight) for i, weight in enumerate(given)]
    flat = graph.add("Concat", parts, "flat", (len(given) * n, k), axis=0)
    sizes = ir.tensor(np.array([len(given), n, k], dtype=np.int64), name="sizes")
    shape = ir.Value(
        name="sizes", type=ir.TensorType(sizes.dtype), shape=ir.Shape([3]), const_value=sizes
    )
    graph.values.append(shape)
    stack = graph.add("Reshape", [flat, shape], "stack", (len(given), n, k))
    node = ir.node(
        "MoEExperts", [graph.x, graph.x, graph.x, stack, stack], domain=DOMAIN, name="experts"
    )
    node.outputs[0].name = "y"
    graph.nodes.append(node)
    graph.outputs.append(node.outputs[0])
    return graph


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_become_one_weight_in_their_order(
    tmp_path: Path, symmetric: bool, bits: int
) -> None:
    given = [
        random_weight(4, 2, 32, bits=bits, dtype="fp32", symmetric=symmetric, seed=i)
        for i in range(3)
    ]
    model = stacked(tmp_path, given).model()
    made = lower(model)
    (weight,) = made.weights
    assert weight.weights == ("expert0.weight", "expert1.weight", "expert2.weight")
    assert (count(model, "DequantizeLinear"), count(model, "Concat")) == (1, 0)
    experts = next(node for node in model.graph if node.op_type == "MoEExperts")
    stack = experts.inputs[3]
    assert stack is not None
    model.graph.outputs[:] = [stack]  # what the operator is given
    model.graph.remove(experts, safe=True)
    stack.type, stack.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((3, 4, 64))
    (found,) = run(model, made, tmp_path, x=np.zeros((1, 1, 64), np.float32))
    assert difference(found, np.stack([weight.exact for weight in given])) < FP32_ERROR


def test_experts_that_are_quantized_in_two_ways_are_refused(tmp_path: Path) -> None:
    given = [
        random_weight(4, 64 // block, block, bits=4, dtype="fp32", symmetric=True)
        for block in (32, 64)
    ]
    with pytest.raises(LoweringError, match=r"^stack: .*all quantized in one way"):
        lower(stacked(tmp_path, given).model())


def test_blocks_that_tensorrt_has_not_are_refused(tmp_path: Path) -> None:
    graph = Graph(tmp_path, 72)
    weight = random_weight(4, 3, 24, bits=4, dtype="fp32", symmetric=True)
    graph.product(graph.x, graph.dequantized("l", weight), "y")
    with pytest.raises(LoweringError, match=r"^l\.weight\.codes: blocks of 24 values"):
        lower(graph.model())


@pytest.mark.parametrize("use", ["Neg", "Gather", "second product"])
def test_a_weight_used_in_another_way_is_refused(tmp_path: Path, use: str) -> None:
    graph = Graph(tmp_path, 64)
    weight = random_weight(4, 2, 32, bits=4, dtype="fp32", symmetric=False)
    made = graph.dequantized("l", weight)
    if use == "second product":
        graph.product(graph.x, made, "y")
        graph.product(graph.add("Neg", [graph.x], "other", (1, "m", 64)), made, "z")
    elif use == "Neg":
        graph.product(graph.x, made, "y")
        graph.outputs.append(graph.add("Neg", [made], "z", (4, 64)))
    else:  # rows cannot be corrected
        graph.outputs.append(graph.add("Gather", [made, graph.x], "z", (1, "m", 64), axis=0))
    with pytest.raises(LoweringError, match=r"^l\.DequantizeLinear: "):
        lower(graph.model())


def test_scales_whose_high_digits_have_infinite_ones_are_refused(tmp_path: Path) -> None:
    weight = random_weight(4, 2, 32, bits=8, dtype="fp16", symmetric=True)
    weight.scales[1, 1] = 5000
    graph = Graph(tmp_path, 64, "fp16")
    graph.product(graph.x, graph.dequantized("l", weight), "y")
    made = lower(graph.model())
    with pytest.raises(LoweringError, match=r"^l\.weight\.scales: too large"):
        write_tensors(tmp_path / CODES_FILE, made.tensors, no_progress)


def test_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    weight = random_weight(4, 2, 32, bits=4, dtype="fp32", symmetric=True)
    graph = Graph(tmp_path, 64)
    graph.product(graph.x, graph.dequantized("l", weight), "y")
    made = lower(graph.model())
    (tmp_path / "weights.bin").write_bytes(b"\0")
    with pytest.raises(LoweringError, match="shorter than the graph says"):
        write_tensors(tmp_path / CODES_FILE, made.tensors, no_progress)
