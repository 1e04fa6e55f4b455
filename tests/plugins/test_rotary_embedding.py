"""`qwenport.RotaryEmbedding`: torch, transformers, onnxruntime and onnx agree on what it is."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.plugins import rotary_embedding as op
from qwenport.plugins.rotary_embedding import function_body, rotary_embedding

OPERATOR = torch.ops.qwenport.rotary_embedding.default
Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@st.composite
def arguments(draw: st.DrawFn, dtypes: Any = (torch.float32,)) -> Arguments:
    """x, cos, sin and positions in any order, with repetitions."""
    batch, heads, seq = (draw(st.integers(1, 4)) for _ in range(3))
    half = draw(st.integers(1, 64))
    positions = draw(st.integers(seq, 50))  # onnxruntime refuses more tokens than table rows
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(list(dtypes)))
    x = torch.randn(batch, heads, seq, 2 * half, generator=generator)
    angles = torch.rand(positions, half, generator=generator) * 6.3
    ids = torch.randint(0, positions, (batch, seq), generator=generator)
    return x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype), ids


def transformers_rotation(x: torch.Tensor, cos: Any, sin: Any, ids: Any) -> torch.Tensor:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    both = [torch.cat([table[ids]] * 2, dim=-1) for table in (cos, sin)]
    return apply_rotary_pos_emb(x, x, *both)[0]


@settings(max_examples=60)
@given(arguments((torch.float32, torch.float16, torch.bfloat16)))
def test_the_reference_rotates_as_transformers_does(drawn: Arguments) -> None:
    y = rotary_embedding(*drawn)
    expected = transformers_rotation(*drawn)
    assert y.dtype == drawn[0].dtype
    # the same products and one sum, so the same roundings
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@given(arguments())
def test_a_rotation_keeps_lengths_and_is_undone_by_the_opposite_angle(drawn: Arguments) -> None:
    x, cos, sin, ids = drawn
    y = rotary_embedding(x, cos, sin, ids)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotary_embedding(y, cos, -sin, ids), x, rtol=1e-5, atol=1e-5)


def test_a_quarter_turn_moves_the_first_half_onto_the_second() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0]).reshape(1, 1, 1, 6)
    cos, sin = torch.zeros(1, 3), torch.ones(1, 3)
    y = rotary_embedding(x, cos, sin, torch.zeros(1, 1, dtype=torch.int64))
    assert y.flatten().tolist() == [-10.0, -20.0, -30.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_well_formed(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 8).to(dtype)
    tables = torch.rand(9, 4).to(dtype), torch.rand(9, 4).to(dtype)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPERATOR, (x, *tables, torch.randint(0, 9, (2, 4))), test_utils=checks)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_fake_output_is_the_real_one_s_shape_dtype_and_layout(transposed: bool) -> None:
    x = torch.randn(2, 4, 3, 8, dtype=torch.bfloat16)
    x = x.transpose(1, 2) if transposed else x
    tables = torch.rand(9, 4).bfloat16(), torch.rand(9, 4).bfloat16()
    ids = torch.zeros(2, x.shape[2], dtype=torch.int64)
    real = rotary_embedding(x, *tables, ids)
    fake = rotary_embedding(x.to("meta"), *(t.to("meta") for t in tables), ids.to("meta"))
    assert fake.device.type == "meta"
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# --- the same in ONNX


def model_of(opset: int, element: ir.DataType = ir.DataType.FLOAT) -> onnx.ModelProto:
    """A model of one call, whose only definition is the function body in it."""

    def value(name: str, dtype: ir.DataType, *shape: str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    inputs = [
        value("x", element, "batch", "heads", "seq", "head_dim"),
        value("cos_cache", element, "positions", "half"),
        value("sin_cache", element, "positions", "half"),
        value("position_ids", ir.DataType.INT64, "batch", "seq"),
    ]
    call = ir.node(op.NAME, inputs, domain="qwenport", name="call")
    (y,) = call.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(element), inputs[0].shape
    graph = ir.Graph(
        inputs, [y], nodes=[call], opset_imports={"": opset, "qwenport": op.VERSION}, name="one"
    )
    model = ir.Model(graph, ir_version=11, functions=[function_body(opset)])
    return ir.serde.serialize_model(model)


@functools.cache
def session(opset: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = model_of(opset).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feeds(drawn: Arguments) -> dict[str, np.ndarray]:
    names = ("x", "cos_cache", "sin_cache", "position_ids")
    return {name: tensor.numpy() for name, tensor in zip(names, drawn, strict=True)}


@pytest.mark.parametrize("opset", [23, 24])
@given(drawn=arguments())
def test_the_function_body_in_onnxruntime_is_the_reference(opset: int, drawn: Arguments) -> None:
    (y,) = session(opset).run(None, feeds(drawn))
    torch.testing.assert_close(torch.from_numpy(y), rotary_embedding(*drawn))


@settings(max_examples=15)
@given(drawn=arguments())
def test_the_function_body_in_onnx_s_reference_is_the_reference(drawn: Arguments) -> None:
    evaluator = onnx.reference.ReferenceEvaluator(model_of(23))
    (y,) = evaluator.run(None, feeds(drawn))
    torch.testing.assert_close(torch.from_numpy(y), rotary_embedding(*drawn))


@pytest.mark.parametrize(
    "element", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=str
)
def test_schema_and_body_pass_onnx_s_checker_in_every_dtype(element: ir.DataType) -> None:
    schema = op.schema()
    onnx.defs.register_schema(schema)
    try:
        onnx.checker.check_model(model_of(24, element), full_check=True)
    finally:
        onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


def test_the_schema_is_the_torch_operator_s_signature() -> None:
    schema = op.schema()
    assert (schema.domain, schema.name) == ("qwenport", "RotaryEmbedding")
    assert schema.since_version == op.VERSION
    assert [i.name for i in schema.inputs] == [a.name for a in OPERATOR._schema.arguments]
    (output,) = schema.outputs
    kinds = [i.type_str for i in schema.inputs]
    assert kinds[0] == kinds[1] == kinds[2] == output.type_str
    assert kinds[3] == "tensor(int64)"
    (constraint,) = schema.type_constraints
    allowed = {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}
    assert set(constraint.allowed_type_strs) == allowed


def test_a_table_of_another_dtype_is_refused_by_the_schema() -> None:
    model = model_of(24)
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    schema = op.schema()
    onnx.defs.register_schema(schema)
    try:
        with pytest.raises(Exception, match=r"(?i)type"):
            onnx.checker.check_model(model, full_check=True)
    finally:
        onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


def test_the_function_body_takes_the_opset_of_its_model_and_no_older_one() -> None:
    for opset in (23, 24):
        imports = ir.serde.serialize_function(function_body(opset)).opset_import
        assert {o.domain: o.version for o in imports}[""] == opset
    with pytest.raises(Exception, match="23"):
        function_body(22)
