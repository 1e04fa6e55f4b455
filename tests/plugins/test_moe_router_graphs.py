"""Routing in steps, as a torch operator, and in ONNX."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from calls import registered, run_in_onnx, run_in_session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import InlinePass
from router_oracles import (
    DTYPES,
    any_logits,
    assert_expert_choice,
    assert_same_routing,
    distinct_logits,
    factors,
    k_of,
    model_of,
    session,
    tied_logits,
    tied_tokens,
)

from qwenport.plugins import moe_router as op
from qwenport.plugins.moe_router import (
    EXPERT_CHOICE,
    KINDS,
    SWITCH,
    TOP_K,
    function_body,
    is_stepwise,
    moe_router,
)

OPERATOR = torch.ops.qwenport.moe_router.default


OPERATOR_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


# --- in steps


def dense(kind: str, logits: torch.Tensor, **attributes: Any) -> torch.Tensor:
    """[tokens, E]: each expert's weight in each token."""
    weights, indices = moe_router(logits, kind, **attributes)
    zeros = torch.zeros(logits.shape)
    if kind == EXPERT_CHOICE:
        return zeros.T.scatter(1, indices, weights).T
    return zeros.scatter(1, indices, weights)


def in_steps(kind: str, logits: torch.Tensor, **attributes: Any) -> torch.Tensor:
    return torch.cat([dense(kind, logits[t : t + 1], **attributes) for t in range(len(logits))])


@given(logits=st.one_of(distinct_logits(), tied_logits()), normalize=st.booleans(), data=st.data())
def test_top_k_is_the_same_token_by_token(
    logits: torch.Tensor, normalize: bool, data: st.DataObject
) -> None:
    attributes = {"k": k_of(data, logits), "normalize": normalize}
    whole = dense(TOP_K, logits, **attributes)
    torch.testing.assert_close(in_steps(TOP_K, logits, **attributes), whole, rtol=2e-6, atol=1e-37)
    assert is_stepwise(TOP_K)


@pytest.mark.parametrize("kind", [SWITCH, EXPERT_CHOICE])
def test_where_tokens_compete_steps_route_otherwise(kind: str) -> None:
    """The second token finds the first expert's only place taken, but not if it comes alone."""
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0]])
    assert dense(kind, logits)[1, 0] == 0
    assert in_steps(kind, logits)[1, 0] > 0.8
    assert not is_stepwise(kind)


def test_an_unknown_kind_is_not_stepwise() -> None:
    assert [kind for kind in (*KINDS, "hash") if is_stepwise(kind)] == [TOP_K]


# --- as a torch operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "attributes",
    [
        (TOP_K, 1, False, 1.0),
        (TOP_K, 3, True, 1.0),
        (SWITCH, 1, False, 0.5),
        (EXPERT_CHOICE, 1, False, 2.0),
    ],
    ids=str,
)
def test_the_operator_is_well_formed(dtype: torch.dtype, attributes: Any) -> None:
    logits = torch.randn(7, 5).to(dtype)
    torch.library.opcheck(OPERATOR, (logits, *attributes), test_utils=OPERATOR_CHECKS)


@settings(max_examples=60)
@given(logits=any_logits(), kind=st.sampled_from(KINDS), factor=factors, data=st.data())
def test_the_fake_outputs_are_the_real_ones_shapes_dtypes_and_layouts(
    logits: torch.Tensor, kind: str, factor: float, data: st.DataObject
) -> None:
    if kind == TOP_K:
        attributes: dict[str, Any] = {
            "k": k_of(data, logits),
            "normalize": data.draw(st.booleans()),
        }
    else:
        attributes = {"capacity_factor": factor}
    reals = moe_router(logits, kind, **attributes)
    fakes = moe_router(logits.to("meta"), kind, **attributes)
    for fake, real in zip(fakes, reals, strict=True):
        assert fake.device.type == "meta"
        assert (fake.shape, fake.dtype, layout(fake)) == (real.shape, real.dtype, layout(real))


def layout(tensor: torch.Tensor) -> list[int]:
    """The strides that mean something."""
    return [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def test_the_fake_outputs_have_the_leading_axes_of_the_logits() -> None:
    weights, indices = moe_router(torch.zeros(2, 3, 8, device="meta"), k=4)
    assert weights.shape == indices.shape == (2, 3, 4)


def test_a_fake_expert_takes_no_more_tokens_than_there_are() -> None:
    logits = torch.zeros(3, 2, device="meta")
    weights, indices = moe_router(logits, EXPERT_CHOICE, capacity_factor=100.0)
    assert weights.shape == indices.shape == (2, 3)


# --- the same in ONNX


@pytest.mark.parametrize("opset", [18, 24])
@given(
    logits=st.one_of(distinct_logits(leading=True), tied_logits()),
    normalize=st.booleans(),
    data=st.data(),
)
def test_top_k_in_onnxruntime_is_the_reference(
    opset: int, logits: torch.Tensor, normalize: bool, data: st.DataObject
) -> None:
    k, form = k_of(data, logits), {"dtype": logits.dtype, "rank": logits.ndim}
    actual = run_in_session(session(opset, TOP_K, k=k, normalize=int(normalize), **form), logits)
    assert_same_routing(actual, moe_router(logits, TOP_K, k=k, normalize=normalize))


@pytest.mark.parametrize("opset", [18, 24])
@given(logits=st.one_of(distinct_logits(crowds=True), tied_logits()), factor=factors)
def test_switch_in_onnxruntime_is_the_reference(
    opset: int, logits: torch.Tensor, factor: float
) -> None:
    at = session(opset, SWITCH, dtype=logits.dtype, capacity_factor=factor)
    expected = moe_router(logits, SWITCH, capacity_factor=factor)
    assert_same_routing(run_in_session(at, logits), expected)


@pytest.mark.parametrize("opset", [18, 24])
@given(logits=any_logits(), factor=factors)
def test_expert_choice_in_onnxruntime_is_the_paper_s(
    opset: int, logits: torch.Tensor, factor: float
) -> None:
    at = session(opset, EXPERT_CHOICE, dtype=logits.dtype, capacity_factor=factor)
    assert_expert_choice(run_in_session(at, logits), logits, factor)


@given(logits=tied_tokens(), factor=factors)
def test_expert_choice_in_onnxruntime_is_the_reference(logits: torch.Tensor, factor: float) -> None:
    at = session(24, EXPERT_CHOICE, dtype=logits.dtype, capacity_factor=factor)
    expected = moe_router(logits, EXPERT_CHOICE, capacity_factor=factor)
    assert_same_routing(run_in_session(at, logits), expected)


@settings(max_examples=15)
@given(
    logits=st.one_of(distinct_logits(leading=True), tied_logits()),
    normalize=st.booleans(),
    data=st.data(),
)
def test_top_k_in_onnx_s_reference_is_the_reference(
    logits: torch.Tensor, normalize: bool, data: st.DataObject
) -> None:
    k, form = k_of(data, logits), {"dtype": logits.dtype, "rank": logits.ndim}
    # all attributes are on the node: onnx's evaluator knows no defaults of a function's
    model = model_of(24, TOP_K, k=k, normalize=int(normalize), capacity_factor=1.0, **form)
    expected = moe_router(logits, TOP_K, k=k, normalize=normalize)
    assert_same_routing(run_in_onnx(model, logits), expected)


@settings(max_examples=15)
@given(logits=st.one_of(distinct_logits(crowds=True), tied_logits()), factor=factors)
def test_switch_in_onnx_s_reference_is_the_reference(logits: torch.Tensor, factor: float) -> None:
    model = model_of(24, SWITCH, dtype=logits.dtype, k=1, normalize=0, capacity_factor=factor)
    expected = moe_router(logits, SWITCH, capacity_factor=factor)
    assert_same_routing(run_in_onnx(model, logits), expected)


@settings(max_examples=15)
@given(logits=tied_tokens(), factor=factors)
def test_expert_choice_in_onnx_s_reference_is_the_reference(
    logits: torch.Tensor, factor: float
) -> None:
    model = model_of(
        24, EXPERT_CHOICE, dtype=logits.dtype, k=1, normalize=0, capacity_factor=factor
    )
    expected = moe_router(logits, EXPERT_CHOICE, capacity_factor=factor)
    assert_same_routing(run_in_onnx(model, logits), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_that_a_node_has_not_are_the_defaults(kind: str) -> None:
    """In onnxruntime, and where onnx_ir inlines; onnx's inliner and evaluator know no defaults."""
    logits = torch.tensor([[3.0, 1, 2], [3, 0, 1], [4, 2, 1], [0, 3, 1]])
    expected = moe_router(logits, kind)
    assert_same_routing(run_in_session(session(24, kind), logits), expected)
    inlined = InlinePass()(ir.serde.deserialize_model(model_of(24, kind))).model
    assert {node.domain for node in inlined.graph} == {""}
    assert_same_routing(run_in_onnx(ir.serde.serialize_model(inlined), logits), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_in_onnxruntime(kind: str) -> None:
    logits = torch.zeros(0, 4)
    assert_same_routing(run_in_session(session(24, kind), logits), moe_router(logits, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_schema_and_body_pass_onnx_s_checker_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    for opset in (18, 24):
        with registered(op.schema()):
            onnx.checker.check_model(model_of(opset, kind, dtype=dtype), full_check=True)


def test_the_schema_is_the_torch_operator_s_signature() -> None:
    schema, arguments = op.schema(), OPERATOR._schema.arguments
    assert (schema.domain, schema.name) == ("qwenport", "MoERouter")
    assert schema.since_version == op.VERSION
    assert [i.name for i in schema.inputs] == [a.name for a in arguments[:1]]
    assert set(schema.attributes) == {a.name for a in arguments[1:]}
    assert [o.name for o in schema.outputs] == ["weights", "indices"]
    assert [o.type_str for o in schema.outputs] == ["tensor(float)", "tensor(int64)"]
    (constraint,) = schema.type_constraints
    assert schema.inputs[0].type_str == constraint.type_param_str
    allowed = {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}
    assert set(constraint.allowed_type_strs) == allowed


@pytest.mark.parametrize("kind", KINDS)
def test_the_body_has_the_schema_s_ports_and_defaults(kind: str) -> None:
    schema, body = op.schema(), ir.serde.serialize_function(function_body(24, kind))
    assert list(body.input) == [i.name for i in schema.inputs]
    assert list(body.output) == [o.name for o in schema.outputs]
    assert schema.attributes["kind"].required
    defaults = {a.name: onnx.helper.get_attribute_value(a) for a in body.attribute_proto}
    assert defaults.pop("kind") == kind.encode()
    assert not body.attribute
    assert defaults == {
        name: onnx.helper.get_attribute_value(a.default_value)
        for name, a in schema.attributes.items()
        if name != "kind"
    }


def test_a_call_without_a_kind_is_refused_by_the_schema() -> None:
    model = model_of(24, TOP_K, k=2)
    (call,) = model.graph.node
    del call.attribute[[a.name for a in call.attribute].index("kind")]
    with registered(op.schema()), pytest.raises(onnx.checker.ValidationError, match="kind"):
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("element", [onnx.TensorProto.DOUBLE, onnx.TensorProto.INT32])
def test_logits_of_another_dtype_are_refused_by_the_schema(element: int) -> None:
    model = model_of(24, TOP_K)
    model.graph.input[0].type.tensor_type.elem_type = element
    with registered(op.schema()), pytest.raises(Exception, match=r"(?i)type"):
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_body_takes_the_opset_of_its_model_and_no_older_one(kind: str) -> None:
    for opset in (18, 24):
        imports = ir.serde.serialize_function(function_body(opset, kind)).opset_import
        assert {o.domain: o.version for o in imports}[""] == opset
    with pytest.raises(ValueError, match="18"):
        function_body(17, kind)
