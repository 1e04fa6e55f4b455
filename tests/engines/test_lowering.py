"""Each pass against onnxruntime or torch: what it changes, and that it changes nothing else."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qwenport.engines.lowering import (
    ComputeInFloat32,
    DecomposeAttention,
    FoldRopeTables,
    FuseTransposedMatMul,
    StaticCapacity,
    for_onnxruntime,
    for_tensorrt,
)
from qwenport.exporter import rope_tables

HALF = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def all_values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]


def test_compute_in_float32_leaves_half_precision_only_in_weights_and_looked_up_rows(package_of):
    model = ir.load(package_of("bf16").model)
    assert ComputeInFloat32()(model).modified
    half = [value for value in all_values(model) if value.dtype in HALF]
    assert [value.producer().op_type for value in half] == ["Gather"]
    readers = {
        use.node.op_type
        for value in model.graph.initializers.values()
        if value.dtype in HALF
        for use in value.uses()
    }
    assert readers == {"Cast", "Gather"}


def test_compute_in_float32_does_nothing_to_an_fp32_package(package_of):
    model = ir.load(package_of("fp32").model)
    assert not ComputeInFloat32()(model).modified


def matmul_model(weight: np.ndarray, perm: list[int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["w"], ["t"], perm=perm),
            helper.make_node("MatMul", ["x", "t"], ["y"], name="product"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", "k"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


@settings(max_examples=15)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 33), st.integers(1, 33)),
    st.integers(0, 2**32 - 1),
)
def test_a_fused_product_equals_numpy_with_the_weight_as_it_lies(sizes, seed):
    batch, seq, inner, outer = sizes
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outer, inner), dtype=np.float32)
    x = rng.standard_normal((batch, seq, inner), dtype=np.float32)
    model = ir.from_proto(matmul_model(weight, [1, 0]))
    assert FuseTransposedMatMul()(model).modified
    assert [(node.domain, node.op_type) for node in model.graph] == [
        ("com.microsoft", "FusedMatMul")
    ]
    np.testing.assert_allclose(
        run(ir.to_proto(model), {"x": x}), x @ weight.T, rtol=1e-4, atol=1e-4
    )


def test_a_transpose_that_exchanges_nothing_is_not_fused():
    model = ir.from_proto(matmul_model(np.eye(3, dtype=np.float32), [0, 1]))
    assert not FuseTransposedMatMul()(model).modified
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul"]


def test_onnxruntime_is_given_no_transposed_weight(package_of):
    model = for_onnxruntime(ir.load(package_of("bf16").model), on_cpu=True)
    for node in model.graph:
        if node.op_type == "Transpose":
            assert len(node.attributes["perm"].as_ints()) == 4  # heads, not weights


def test_static_capacity_names_every_cache_and_nothing_else(package_of):
    package = package_of("bf16")
    model = ir.load(package.model)
    before = {v.name: list(v.shape) for v in [*model.graph.inputs, *model.graph.outputs]}
    StaticCapacity(96)(model)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        old, new = before[value.name], list(value.shape)
        if value.name.startswith(("past_key_values.", "present.")):
            assert new[2] == 96
            assert [str(s) for s in new[:2] + new[3:]] == [str(s) for s in old[:2] + old[3:]]
        else:
            assert new == old


def test_folded_rope_tables_are_the_packages_rounded_by_torch_and_cut_to_the_capacity(package_of):
    package = package_of("bf16")
    model = ir.load(package.model)
    FoldRopeTables(100)(model)
    expected = rope_tables(package.config.rope, package.max_seq_len)
    for name, table in zip(("rope.cos", "rope.sin"), expected, strict=True):
        assert name not in model.graph.initializers
        folded = model.graph.initializers[f"{name}.folded"].const_value.numpy()
        assert folded.dtype == ml_dtypes.bfloat16
        want = table[:100].to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(folded.view(np.uint16), want)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert [list(node.outputs[0].uses()) for node in casts] == [[]]  # the logits' own


def attention_model(heads: int, kv_heads: int, head_dim: int, scale: float) -> onnx.ModelProto:
    def tensor(name, *shape, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, list(shape))

    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"], name="a", scale=scale)
    graph = helper.make_graph(
        [node],
        "attention",
        [
            tensor("q", "b", heads, "s", head_dim),
            tensor("k", "b", kv_heads, "n", head_dim),
            tensor("v", "b", kv_heads, "n", head_dim),
            tensor("mask", "b", 1, "s", "n", kind=TensorProto.BOOL),
        ],
        [tensor("y", "b", heads, "s", head_dim)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@settings(max_examples=15)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([2, 8, 32]),
    st.integers(0, 2**32 - 1),
)
def test_decomposed_attention_equals_torch_and_onnxruntime(
    batch, kv_heads, group, seq, span, head_dim, seed
):
    rng = np.random.default_rng(seed)
    heads = kv_heads * group
    q = rng.standard_normal((batch, heads, seq, head_dim), dtype=np.float32)
    k = rng.standard_normal((batch, kv_heads, span, head_dim), dtype=np.float32)
    v = rng.standard_normal((batch, kv_heads, span, head_dim), dtype=np.float32)
    mask = rng.random((batch, 1, seq, span)) < 0.5
    mask[..., 0] = True  # a query always sees its own slot
    feeds = {"q": q, "k": k, "v": v, "mask": mask}
    proto = attention_model(heads, kv_heads, head_dim, scale := head_dim**-0.5)
    model = ir.from_proto(proto)
    DecomposeAttention(kv_heads)(model)
    assert "Attention" not in {node.op_type for node in model.graph}
    result = run(ir.to_proto(model), feeds)
    oracle = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (q, k, v)),
        attn_mask=torch.from_numpy(mask),
        scale=scale,
        enable_gqa=True,
    ).numpy()
    np.testing.assert_allclose(result, oracle, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result, run(proto, feeds), rtol=1e-5, atol=1e-6)


def test_tensorrt_lowering_decomposes_attention_in_fp32_only(package_of):
    for dtype, attentions in (("fp32", 0), ("bf16", 5), ("fp16", 5)):
        package = package_of(dtype)
        model, _ = for_tensorrt(
            ir.load(package.model),
            dtype=dtype,
            capacity=128,
            rope_rows=128,
            kv_heads=package.config.num_key_value_heads,
        )
        kinds = [node.op_type for node in model.graph]
        assert package.config.num_hidden_layers == 5
        assert kinds.count("Attention") == attentions
