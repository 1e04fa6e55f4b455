"""Products by quantized weights on onnxruntime's CPU, compared with numpy in fp64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import Sequential

from qwenport.contract import BF16, ENGINE_WEIGHTS, MODEL
from qwenport.engines import start_onnxruntime
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering import (
    ALIGNMENT,
    ComputeInFloat32,
    SplitExperts,
    StoreWeights,
    UseMatMulNBits,
    for_onnxruntime,
    for_onnxruntime_rounded,
)
from qwenport.plugins import moe_experts

from .quantized_graphs import (
    DTYPES,
    FILE,
    Quantized,
    count,
    dequantize_linear,
    difference,
    lookup_in,
    product_of,
    random_weight,
    with_level,
    write,
)

FP32_ERROR = 1e-6
"""Of a product of a few hundred terms in fp32."""
INT8_ERROR = 2e-2
"""With activations in int8: half a step is 1/254 of a block's largest, which is at most five times their mean."""


@st.composite
def weights(draw: st.DrawFn, blocks: tuple[int, ...]) -> Quantized:
    return random_weight(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from(blocks)),
        bits=draw(st.sampled_from([4, 8])),
        dtype=draw(st.sampled_from([*DTYPES])),
        symmetric=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 20)),
    )


def activations(weight: Quantized, rows: int = 3) -> Any:
    return np.random.default_rng(1).standard_normal((rows, weight.codes.shape[1]), np.float32)


def error_of(y: Any, x: Any, weight: Any) -> float:
    """Relative to the products that are summed, since sums may cancel."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    terms = np.abs(x) @ np.abs(weight).T
    return float(np.linalg.norm(y - x @ weight.T) / np.linalg.norm(terms))


def run(model: ir.Model, folder: Path, x: Any) -> Any:
    session = start_onnxruntime(ir.to_proto(model).SerializeToString(), folder, threads=1)
    return session.run(None, {"x": x})[0]


def stored(model: ir.Model, folder: Path) -> tuple[ir.Model, StoreWeights]:
    """The graph of an engine, whose weight file is written beside the package's."""
    store = StoreWeights(ENGINE_WEIGHTS)
    lowered = Sequential(UseMatMulNBits(exact=False), store, ComputeInFloat32())(model).model
    write(folder, folder, lowered, store.weights)
    return lowered, store


@settings(max_examples=40)
@given(weight=weights((8, 16, 24, 32, 64, 96, 128, 256, 384)))
def test_a_package_multiplies_by_what_dequantize_linear_makes(weight, tmp_path_factory) -> None:
    folder, x = tmp_path_factory.mktemp("exact"), activations(weight)
    model = for_onnxruntime(product_of(folder, weight), on_cpu=True)
    assert not count(model, "DequantizeLinear")
    single = weight.bits == 4 and weight.scales.dtype == np.float32 and weight.block % 16 == 0
    assert count(model, "MatMulNBits") == single
    assert error_of(run(model, folder, x), x, weight.weight) < FP32_ERROR
    shutil.rmtree(folder)


@settings(max_examples=40)
@given(weight=weights((16, 32, 48, 64, 96, 128, 256, 384)))
def test_an_engine_multiplies_by_the_weights_without_a_rounding(weight, tmp_path_factory) -> None:
    folder, x = tmp_path_factory.mktemp("engine"), activations(weight)
    model, _ = stored(product_of(folder, weight), folder)
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    assert error_of(run(model, folder, x), x, weight.exact) < INT8_ERROR
    assert error_of(run(with_level(model, 1), folder, x), x, weight.exact) < FP32_ERROR
    shutil.rmtree(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_codes_are_the_package_s_own_bytes_and_the_attributes_are_given(bits, tmp_path) -> None:
    weight = random_weight(5, 3, 64, bits=bits, dtype="bf16", symmetric=False)
    model = product_of(tmp_path, weight)
    before = model.graph.initializers["l.weight.codes"].const_value
    assert UseMatMulNBits(exact=False)(model).modified
    (node,) = model.graph
    after = node.inputs[1].const_value
    assert (after.location, after.offset, after.length) == (FILE, before.offset, before.length)
    assert after.dtype == node.inputs[1].dtype == ir.DataType.UINT8
    assert tuple(after.shape) == tuple(node.inputs[1].shape) == (5, 3, 64 * bits // 8)
    assert {name: a.as_int() for name, a in node.attributes.items()} == {
        "K": 192,
        "N": 5,
        "bits": bits,
        "block_size": 64,
        "accuracy_level": 4,
    }
    assert (node.name, node.outputs[0].name, model.opset_imports["com.microsoft"]) == (
        "l.MatMul",
        "y",
        1,
    )


def test_zero_points_in_whole_bytes_are_the_package_s_own(tmp_path) -> None:
    for blocks, same in ((4, True), (3, False)):
        folder = tmp_path / str(blocks)
        folder.mkdir()
        model = product_of(
            folder, random_weight(5, blocks, 32, bits=4, dtype="fp32", symmetric=False)
        )
        UseMatMulNBits(exact=True)(model)
        (node,) = model.graph
        assert isinstance(node.inputs[3].const_value, ir.ExternalTensor) == same
        assert tuple(node.inputs[3].shape) == (5, 2)


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_zero_points_are_left_out(bits, tmp_path) -> None:
    weight = random_weight(5, 3, 32, bits=bits, dtype="fp16", symmetric=True)
    model, store = stored(product_of(tmp_path, weight), tmp_path)
    (node,) = model.graph
    assert len(node.inputs) == 3
    assert "l.weight.zeros" not in model.graph.initializers
    assert {str(w.source.location) for w in store.weights} == {FILE}


@pytest.mark.parametrize(("bits", "block", "width"), [(4, 32, 32), (8, 96, 32), (4, 768, 128)])
def test_the_weight_file_has_codes_as_bytes_and_scales_in_fp32(bits, block, width, tmp_path):
    weight = random_weight(6, 768 // block, block, bits=bits, dtype="bf16", symmetric=False)
    _, store = stored(product_of(tmp_path, weight), tmp_path)
    blocks = 768 // width
    entries = {w.entry.name.rpartition(".")[2]: w.entry for w in store.weights}
    assert {name: (e.dtype, e.length) for name, e in entries.items()} == {
        "codes": ("U8", 6 * 768 * bits // 8),
        "scales": ("F32", 6 * blocks * 4),
        "zeros": ("U8", 6 * -(-blocks * bits // 8)),
    }
    assert store.weights[0].entry.offset % ALIGNMENT == 0
    data = (tmp_path / ENGINE_WEIGHTS).read_bytes()
    codes, scales = entries["codes"], entries["scales"]
    assert len(data) == sum(e.length for e in entries.values()) + store.weights[0].entry.offset
    lies = model_bytes(tmp_path, codes.length)
    assert data[codes.offset : codes.offset + codes.length] == lies
    found = np.frombuffer(data, np.float32, 6 * blocks, scales.offset).reshape(6, blocks)
    wanted = np.repeat(weight.scales.astype(np.float32), block // width, axis=1)
    np.testing.assert_array_equal(found, wanted)
    assert (tmp_path / MODEL).stat().st_size < 2000


def model_bytes(folder: Path, length: int) -> bytes:
    return (folder / FILE).read_bytes()[:length]


def test_a_shorter_file_is_refused(tmp_path) -> None:
    weight = random_weight(6, 3, 32, bits=4, dtype="fp32", symmetric=False)
    model = UseMatMulNBits(exact=True)(product_of(tmp_path, weight)).model
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LoweringError, match="shorter than the graph says"):
        model.graph.initializers["l.weight.zeros"].const_value.numpy()


def test_blocks_that_onnxruntime_lacks_are_refused_by_name_for_an_engine(tmp_path) -> None:
    weight = random_weight(4, 2, 24, bits=4, dtype="fp32", symmetric=False)
    with pytest.raises(LoweringError, match=r"l\.DequantizeLinear: blocks of 24 values"):
        UseMatMulNBits(exact=False)(product_of(tmp_path, weight))


def test_a_weight_that_is_not_only_multiplied_by_is_refused_by_name(tmp_path) -> None:
    model = product_of(tmp_path, random_weight(4, 2, 32, bits=4, dtype="fp32", symmetric=False))
    (dequantized, _, product) = model.graph
    other = ir.node("Identity", [dequantized.outputs[0]], name="copy")
    model.graph.insert_before(product, other)
    with pytest.raises(LoweringError, match=r"l\.DequantizeLinear: used by copy"):
        UseMatMulNBits(exact=False)(model)


def test_what_is_dequantized_along_another_axis_is_refused_by_name(tmp_path) -> None:
    model = product_of(tmp_path, random_weight(4, 2, 32, bits=4, dtype="fp32", symmetric=False))
    (dequantized, _, _) = model.graph
    dequantized.attributes["axis"] = ir.AttrInt64("axis", 0)
    refusal = r"l\.DequantizeLinear: its weight is not in blocks"
    with pytest.raises(LoweringError, match=refusal):
        UseMatMulNBits(exact=False)(model)
    with pytest.raises(LoweringError, match=refusal):
        for_onnxruntime(model, on_cpu=True)


def test_a_rounded_program_rounds_results_and_not_the_weight_again(tmp_path) -> None:
    weight = random_weight(4, 2, 32, bits=4, dtype="fp32", symmetric=False)
    model = product_of(tmp_path, weight)
    (*_, product) = model.graph
    again = ir.node("Neg", [product.outputs[0]], name="neg")
    (z,) = again.outputs
    z.name, z.type, z.shape = "z", product.outputs[0].type, product.outputs[0].shape
    model.graph.append(again)
    model.graph.outputs[0] = z
    lowered = for_onnxruntime_rounded(model, BF16)
    assert [node.op_type for node in lowered.graph] == ["MatMulNBits", "Cast", "Cast", "Neg"]
    x = activations(weight)
    wanted = torch.from_numpy(x.astype(np.float64) @ weight.exact.T).bfloat16().float().numpy()
    np.testing.assert_allclose(-run(lowered, tmp_path, x), wanted, rtol=2**-8)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_expert_is_multiplied_by_its_own_codes(exact, dtype, tmp_path) -> None:
    experts, hidden, inner = 5, 64, 32
    parts = {
        f"{e}.{p}": random_weight(
            *((inner, 2, 32) if p < 2 else (hidden, 1, 32)),
            bits=4,
            dtype=dtype,
            symmetric=False,
            seed=3 * e + p,
        )
        for e in range(experts)
        for p in range(3)
    }
    model = experts_model(tmp_path, parts, (experts, hidden, inner))
    if exact:
        model = for_onnxruntime(model, on_cpu=True)
    else:
        model, _ = stored(SplitExperts()(model).model, tmp_path)
        with_level(model, 1)
    assert not count(model, "DequantizeLinear")
    lowered = not exact or dtype == "fp32"
    assert count(model, "MatMulNBits") == (3 * experts if lowered else 0)
    x = torch.randn(2, 7, hidden, generator=torch.Generator().manual_seed(0))
    weights, indices = torch.rand(2, 7, 2), torch.tensor([[[0, 3]] * 7, [[4, 1]] * 7])
    values = {
        n: torch.from_numpy((q.weight if exact else q.exact).astype(np.float32))
        for n, q in parts.items()
    }
    gate_up = torch.stack([torch.cat([values[f"{e}.0"], values[f"{e}.1"]]) for e in range(experts)])
    down = torch.stack([values[f"{e}.2"] for e in range(experts)])
    wanted = moe_experts.moe_experts(x, indices, weights, gate_up, down)
    session = start_onnxruntime(ir.to_proto(model).SerializeToString(), tmp_path, threads=1)
    feeds = {"x": x.numpy(), "indices": indices.numpy(), "weights": weights.numpy()}
    assert difference(session.run(None, feeds)[0], wanted.numpy()) < 5 * FP32_ERROR


def experts_model(
    folder: Path, parts: dict[str, Quantized], sizes: tuple[int, int, int]
) -> ir.Model:
    """x, indices, weights -> one MoEExperts over stacks of dequantized experts."""
    experts, hidden, inner = sizes
    made = {name: dequantize_linear(folder, name, part) for name, part in parts.items()}
    dtype = ir.DataType.from_numpy(np.dtype(parts["0.0"].scales.dtype))
    initializers = [value for values, _ in made.values() for value in values]
    nodes, stacks = [node for _, node in made.values()], []
    for name, chosen, shape in (
        ("gate_up", (0, 1), (experts, 2 * inner, hidden)),
        ("down", (2,), (experts, hidden, inner)),
    ):
        singles = [made[f"{e}.{p}"][1].outputs[0] for e in range(experts) for p in chosen]
        target = ir.tensor(np.array(shape, dtype=np.int64), name=f"{name}.shape")
        size = ir.Value(
            name=target.name,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape((3,)),
            const_value=target,
        )
        initializers.append(size)
        concat = ir.node("Concat", singles, attributes={"axis": 0}, name=f"{name}.Concat")
        reshape = ir.node("Reshape", [concat.outputs[0], size], name=f"{name}.Reshape")
        for value, label, dims in (
            (concat.outputs[0], f"{name}.flat", (shape[0] * shape[1], shape[2])),
            (reshape.outputs[0], name, shape),
        ):
            value.name, value.type, value.shape = label, ir.TensorType(dtype), ir.Shape(dims)
        nodes += [concat, reshape]
        stacks.append(reshape.outputs[0])
    inputs = [
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(("batch", "seq", last)))
        for name, kind, last in (
            ("x", dtype, hidden),
            ("indices", ir.DataType.INT64, 2),
            ("weights", ir.DataType.FLOAT, 2),
        )
    ]
    call = ir.node(moe_experts.NAME, [*inputs, *stacks], domain="qwenport", name="layer")
    (y,) = call.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(dtype), inputs[0].shape
    graph = ir.Graph(
        inputs,
        [y],
        nodes=[*nodes, call],
        initializers=initializers,
        opset_imports={"": 24, "qwenport": 1},
        name="g",
    )
    return ir.Model(graph, ir_version=11, functions=[moe_experts.function_body(24)])


@settings(max_examples=15)
@given(weight=weights((16, 32, 48, 128, 384)), tied=st.booleans())
def test_rows_are_looked_up_in_the_codes_that_a_tied_head_multiplies_by(
    weight, tied, tmp_path_factory
) -> None:
    folder, x = tmp_path_factory.mktemp("lookup"), activations(weight)
    ids = np.array([[0, len(weight.codes) - 1], [0, 0]])
    feeds = {"ids": ids, **({"x": x} if tied else {})}

    def computed(model: ir.Model) -> list[Any]:
        session = start_onnxruntime(ir.to_proto(model).SerializeToString(), folder, threads=1)
        return session.run(None, feeds)

    package = computed(for_onnxruntime(lookup_in(folder, weight, tied=tied), on_cpu=True))
    np.testing.assert_array_equal(package[0], weight.weight.astype(np.float32)[ids])
    if weight.bits == 4 and not weight.symmetric:
        with pytest.raises(LoweringError, match="zero points"):
            UseMatMulNBits(exact=False)(lookup_in(folder, weight, tied=tied))
        return
    model, store = stored(lookup_in(folder, weight, tied=tied), folder)
    assert count(model, "GatherBlockQuantized") == 1 and count(model, "MatMulNBits") == tied
    assert sum(w.entry.name.endswith("codes") for w in store.weights) == 1
    engine = computed(with_level(model, 1))
    np.testing.assert_allclose(engine[0], weight.exact[ids], rtol=1e-6, atol=1e-7)
    if tied:
        assert error_of(package[1], x, weight.weight) < FP32_ERROR
        assert error_of(engine[1], x, weight.exact) < FP32_ERROR
    shutil.rmtree(folder)
