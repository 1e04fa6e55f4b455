"""Experts in ONNX: the same, and sparse."""

from __future__ import annotations

import functools
import math
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from calls import registered, run_in_onnx, run_in_session, session_of
from experts_oracles import (
    DTYPES,
    OPERATOR,
    Arguments,
    Sizes,
    assert_close,
    by_expert,
    by_token,
    choice_of_experts,
    model_of,
    session,
    stacks,
    sums_that_need_fp32,
    transformers_experts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.plugins import moe_experts as op
from qwenport.plugins.moe_experts import function_body, moe_experts

# --- the same in ONNX


# onnxruntime's CPU provider multiplies no bf16 matrices
@pytest.mark.parametrize("opset", [18, 24])
@settings(max_examples=60)
@given(drawn=by_token(DTYPES[:2]))
def test_the_function_body_in_onnxruntime_is_transformers_experts(
    opset: int, drawn: Arguments
) -> None:
    at = session(opset, dtype=drawn[0].dtype, rank=drawn[0].ndim)
    (y,) = run_in_session(at, *drawn)
    assert_close(y, transformers_experts(drawn), drawn)
    assert_close(y, moe_experts(*drawn), drawn)


@settings(max_examples=60)
@given(drawn=by_token(DTYPES[:2]))
def test_the_body_for_tensorrt_in_onnxruntime_is_transformers_experts(drawn: Arguments) -> None:
    form: dict[str, Any] = {"dtype": drawn[0].dtype, "rank": drawn[0].ndim}
    (y,) = run_in_session(session(24, for_tensorrt=True, **form), *drawn)
    assert_close(y, transformers_experts(drawn), drawn)


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 40])
def test_the_body_for_tensorrt_changes_its_way_at_as_many_pairs_as_experts(tokens: int) -> None:
    """7 experts, 2 per token: 3 tokens are the most that are multiplied one by one."""
    generator = torch.Generator().manual_seed(tokens)
    gate_up, down = stacks(Sizes((tokens,), 7, 2), generator)
    scores = torch.rand(tokens, 7, generator=generator)
    weights, indices = scores.topk(2)
    x = torch.randn(tokens, down.shape[1], generator=generator)
    drawn = (x, indices, weights, gate_up, down)
    (y,) = run_in_session(session(24, for_tensorrt=True), *drawn)
    assert_close(y, moe_experts(*drawn), drawn)


@settings(max_examples=60)
@given(drawn=by_token(DTYPES[:2]), seed=st.integers(0, 999))
def test_with_columns_in_any_order_the_body_for_tensorrt_is_transformers_experts(
    drawn: Arguments, seed: int
) -> None:
    """Each expert's columns are in an order of its own."""
    *given_tokens, gate_up, down = drawn
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.rand(w.shape[0], w.shape[2], generator=generator) for w in (gate_up, down)]
    columns = [order.argsort(-1) for order in orders]
    stored = [
        weight.gather(2, order[:, None].expand(weight.shape))
        for weight, order in zip((gate_up, down), columns, strict=True)
    ]
    form: dict[str, Any] = {"dtype": drawn[0].dtype, "rank": drawn[0].ndim}
    at = session(24, by_columns=True, **form)
    (y,) = run_in_session(at, *given_tokens, *stored, *(order.int() for order in columns))
    assert_close(y, transformers_experts(drawn), drawn)


@pytest.mark.parametrize("opset", [18, 24])
@given(drawn=by_expert(DTYPES[:2]))
def test_by_expert_the_function_body_in_onnxruntime_is_the_reference(
    opset: int, drawn: Arguments
) -> None:
    (y,) = run_in_session(session(opset, by_expert=True, dtype=drawn[0].dtype), *drawn)
    assert_close(y, moe_experts(*drawn, by_expert=True), drawn, by_expert=True)


@settings(max_examples=20)
@given(drawn=by_token(DTYPES))
def test_the_function_body_in_onnx_s_reference_is_the_reference(drawn: Arguments) -> None:
    (y,) = run_in_onnx(model_of(24, dtype=drawn[0].dtype, rank=drawn[0].ndim), *drawn)
    assert_close(y, moe_experts(*drawn), drawn)


@settings(max_examples=20)
@given(drawn=by_expert(DTYPES))
def test_by_expert_the_function_body_in_onnx_s_reference_is_the_reference(
    drawn: Arguments,
) -> None:
    (y,) = run_in_onnx(model_of(24, by_expert=True, dtype=drawn[0].dtype), *drawn)
    assert_close(y, moe_experts(*drawn, by_expert=True), drawn, by_expert=True)


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_in_onnx_weights_and_their_sum_are_fp32(dtype: torch.dtype, by_expert: bool) -> None:
    for case, expected in sums_that_need_fp32(dtype, by_expert):
        (y,) = run_in_onnx(model_of(24, by_expert=by_expert, dtype=dtype), *case)
        assert y.item() == expected
        if dtype == torch.float16:
            (y,) = run_in_session(session(24, by_expert=by_expert, dtype=dtype), *case)
            assert y.item() == expected


@pytest.mark.parametrize("by_expert", [False, True])
def test_no_tokens_in_onnxruntime(by_expert: bool) -> None:
    gate_up, down = stacks(Sizes((0,), 4, 2), torch.Generator())
    shape = (4, 0) if by_expert else (0, 2)
    nothing = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    given_ = (torch.zeros(0, 5), *nothing, gate_up, down)
    (y,) = run_in_session(session(24, by_expert=by_expert), *given_)
    assert y.shape == (0, 5)


# --- sparse


def every_way(drawn: Arguments, by_expert: bool = False) -> dict[str, torch.Tensor]:
    form: dict[str, Any] = {"by_expert": by_expert, "rank": drawn[0].ndim}
    return {
        "torch": moe_experts(*drawn, by_expert=by_expert),
        "onnxruntime": run_in_session(session(24, **form), *drawn)[0],
        "onnx": run_in_onnx(model_of(24, **form), *drawn)[0],
    }


@settings(max_examples=60)
@given(drawn=by_token())
def test_an_expert_that_no_token_chose_is_not_heard(drawn: Arguments) -> None:
    """Whatever is in its weights; and were they read, a NaN would be all over the place."""
    x, indices, weights, gate_up, down = drawn
    unchosen = torch.ones(len(gate_up), dtype=torch.bool)
    unchosen[indices.flatten()] = False
    poisoned = [w.clone() for w in (gate_up, down)]
    for w in poisoned:
        w[unchosen] = torch.nan
    expected = every_way(drawn)
    for way, y in every_way((x, indices, weights, *poisoned)).items():
        assert torch.isfinite(y).all(), way
        assert_close(y, expected[way], drawn)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@settings(max_examples=20)
@given(drawn=by_token(), data=st.data())
def test_a_token_is_heard_by_itself_alone(
    poison: float, drawn: Arguments, data: st.DataObject
) -> None:
    x = drawn[0].clone()
    flat = x.view(-1, x.shape[-1])
    t = data.draw(st.integers(0, len(flat) - 1), label="token")
    flat[t] = poison
    others = torch.arange(len(flat)) != t
    expected = every_way(drawn)
    for way, y in every_way((x, *drawn[1:])).items():
        rest, was = (z.flatten(0, -2)[others] for z in (y, expected[way]))
        assert torch.isfinite(rest).all(), way
        torch.testing.assert_close(rest, was, msg=way)


@pytest.mark.parametrize("way", ["torch", "onnxruntime", "onnx"])
def test_by_expert_a_token_is_heard_by_itself_alone(way: str) -> None:
    """As where one token overflows fp16: y of the others is a sum that it is no part of."""
    gate_up, down = stacks(Sizes((3,), 2, 1), torch.Generator().manual_seed(0))
    x, indices = torch.ones(3, 5), torch.tensor([[0, 1], [1, 2]])
    x[0] = math.nan
    y = every_way((x, indices, torch.ones(2, 2), gate_up, down), by_expert=True)[way]
    assert torch.isnan(y[0]).all()
    assert torch.isfinite(y[1:]).all()


@functools.cache
def session_that_shows_gathered_weights() -> ort.InferenceSession:
    """Every matrix that the body takes out of the stacks is among its outputs."""
    model = onnx.inliner.inline_local_functions(model_of(24))
    for stack in ("gate_up", "down"):
        readers = [node for node in model.graph.node if stack in node.input]
        # nothing else may look into a stack than what takes some of it
        assert {node.op_type for node in readers} <= {"Gather", "Shape"}
        for node in readers:
            if node.op_type == "Gather":
                shape = [None, None, None]
                value = onnx.helper.make_tensor_value_info(
                    node.output[0], onnx.TensorProto.FLOAT, shape
                )
                model.graph.output.append(value)
    return session_of(model)


def gathered(drawn: Arguments) -> tuple[int, int]:
    """How many matrices are taken out of gate_up and out of down."""
    x, indices, weights, gate_up, down = drawn
    flat = (x.flatten(0, -2), indices.flatten(0, -2), weights.flatten(0, -2), gate_up, down)
    _, *taken = run_in_session(session_that_shows_gathered_weights(), *flat)
    shapes = [tuple(t.shape) for t in taken]
    up, out = tuple(gate_up.shape[1:]), tuple(down.shape[1:])
    if up == out:  # as many of the one as of the other
        assert {s[1:] for s in shapes} == {up} and len(shapes) % 2 == 0
        half = sum(s[0] for s in shapes) // 2
        return half, half
    assert {s[1:] for s in shapes} == {up, out}
    return sum(s[0] for s in shapes if s[1:] == up), sum(s[0] for s in shapes if s[1:] == out)


@given(drawn=by_token())
def test_few_tokens_read_few_experts(drawn: Arguments) -> None:
    """No more matrices than pairs of a token and an expert, and never more than 2 an expert."""
    most = min(drawn[1].numel(), 2 * len(drawn[3]))
    for number in gathered(drawn):
        assert len(drawn[1].unique()) <= number <= most


@pytest.mark.parametrize("skew", [0, 1, 3, 10])
def test_a_long_prompt_reads_an_expert_twice_at_most(skew: float) -> None:
    generator = torch.Generator().manual_seed(0)
    of = Sizes((1000,), 12, 2)
    indices = choice_of_experts(of, 12, generator, skew)
    x = torch.randn(*of.leading, of.hidden, generator=generator)
    drawn = x, indices, torch.rand(indices.shape, generator=generator), *stacks(of, generator)
    assert max(gathered(drawn)) <= 2 * of.experts
    (y,) = run_in_session(session(24), *drawn)
    assert_close(y, transformers_experts(drawn), drawn)


def test_a_token_alone_reads_its_own_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    of = Sizes((1,), 256, 8)
    indices = choice_of_experts(of, 256, generator)
    x, weights = torch.ones(1, of.hidden), torch.ones(1, 8)
    assert gathered((x, indices, weights, *stacks(of, generator))) == (8, 8)


# --- the schema


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_schema_and_body_pass_onnx_s_checker_in_every_dtype(
    dtype: torch.dtype, by_expert: bool
) -> None:
    for opset in (18, 24):
        model = model_of(opset, by_expert=by_expert, dtype=dtype)
        with registered(op.schema()):
            onnx.checker.check_model(model, full_check=True)


def test_the_schema_is_the_torch_operator_s_signature() -> None:
    schema, arguments = op.schema(), OPERATOR._schema.arguments
    assert (schema.domain, schema.name) == ("qwenport", "MoEExperts")
    assert schema.since_version == op.VERSION
    names = [argument.name for argument in arguments]
    assert [*(i.name for i in schema.inputs), "by_expert", "round_inner"] == names
    assert set(schema.attributes) == set(names[len(schema.inputs) :])
    (output,) = schema.outputs
    x, indices, weights, gate_up, down, scales = (i.type_str for i in schema.inputs)
    assert x == gate_up == down == scales == output.type_str
    assert schema.min_input == len(schema.inputs) - 1
    assert (indices, weights) == ("tensor(int64)", "tensor(float)")
    (constraint,) = schema.type_constraints
    allowed = {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}
    assert set(constraint.allowed_type_strs) == allowed


@pytest.mark.parametrize("input_scales", [False, True])
@pytest.mark.parametrize("by_expert", [False, True])
def test_the_body_has_the_schema_s_ports(by_expert: bool, input_scales: bool) -> None:
    schema = op.schema()
    body = ir.serde.serialize_function(
        function_body(24, by_expert=by_expert, input_scales=input_scales)
    )
    ports = [i.name for i in schema.inputs]
    assert list(body.input) == (ports if input_scales else ports[: schema.min_input])
    assert list(body.output) == [o.name for o in schema.outputs]
    attributes = {a.name for a in body.attribute_proto} | set(body.attribute)
    assert attributes == set(schema.attributes)
    assert onnx.helper.get_attribute_value(schema.attributes["by_expert"].default_value) == 0


@pytest.mark.parametrize("port", [1, 2, 3])
def test_an_input_of_another_dtype_is_refused_by_the_schema(port: int) -> None:
    """int32 indices, fp16 weights beside fp32 ones, experts of another dtype than x."""
    model = model_of(24)
    other = onnx.TensorProto.INT32 if port == 1 else onnx.TensorProto.FLOAT16
    model.graph.input[port].type.tensor_type.elem_type = other
    with registered(op.schema()), pytest.raises(Exception, match=r"(?i)type"):
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("by_expert", [False, True])
def test_the_function_body_takes_the_opset_of_its_model_and_no_older_one(by_expert: bool) -> None:
    for opset in (18, 24):
        body = ir.serde.serialize_function(function_body(opset, by_expert=by_expert))
        assert {o.domain: o.version for o in body.opset_import}[""] == opset
    with pytest.raises(Exception, match="18"):
        function_body(17, by_expert=by_expert)
