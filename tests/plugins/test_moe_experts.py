"""`qwenport.MoEExperts`: torch, transformers, the paper, onnxruntime and onnx agree on what it is."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from calls import ELEMENTS, model_of_call, registered, run_in_onnx, run_in_session, session_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwenport.plugins import moe_experts as op
from qwenport.plugins.moe_experts import function_body, moe_experts
from qwenport.plugins.moe_router import EXPERT_CHOICE, SWITCH, moe_router

OPERATOR = torch.ops.qwenport.moe_experts.default
OPERATOR_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

seeds = st.integers(0, 2**31)


@dataclass(frozen=True)
class Sizes:
    leading: tuple[int, ...]
    experts: int
    k: int
    hidden: int = 5
    inner: int = 3

    @property
    def tokens(self) -> int:
        return math.prod(self.leading)


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """One token or many, few experts or many, so that there are more experts than pairs and fewer."""
    leading = st.one_of(
        st.tuples(st.sampled_from([1, 40])),
        st.tuples(st.integers(1, 40)),
        st.tuples(st.integers(1, 5), st.integers(1, 8)),
    )
    experts = draw(st.one_of(st.sampled_from([2, 256]), st.integers(2, 64)))
    k = draw(st.integers(1, min(16, experts)))
    return Sizes(draw(leading), experts, k, draw(st.integers(1, 12)), draw(st.integers(1, 12)))


def stacks(of: Sizes, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up and down, of such a scale that nothing grows on its way through."""
    gate_up = torch.randn(of.experts, 2 * of.inner, of.hidden, generator=generator)
    down = torch.randn(of.experts, of.hidden, of.inner, generator=generator)
    return gate_up / of.hidden**0.5, down / of.inner**0.5


def choice_of_experts(
    of: Sizes, usable: int, generator: torch.Generator, skew: float = 0
) -> torch.Tensor:
    """k different experts for each token, out of `usable` ones that lie anywhere.

    Skew 0 likes all of them, 1 some of them better, 10 nearly always the same.
    """
    pool = torch.randperm(of.experts, generator=generator)[:usable]
    liking = torch.rand(*of.leading, usable, generator=generator)
    liking += torch.linspace(0, skew, usable)
    order = liking.argsort(dim=-1, descending=True)[..., : of.k]
    shuffled = torch.rand(order.shape, generator=generator).argsort(dim=-1)
    return pool[order.gather(-1, shuffled)]


@st.composite
def by_token(draw: st.DrawFn, dtypes: Any = (torch.float32,)) -> Arguments:
    """From all tokens to the same experts up to tokens anywhere; some of the weights 0."""
    of = draw(sizes())
    generator = torch.Generator().manual_seed(draw(seeds))
    dtype = draw(st.sampled_from(list(dtypes)))
    usable = draw(st.one_of(st.just(of.k), st.just(of.experts), st.integers(of.k, of.experts)))
    skew = draw(st.sampled_from([0, 1, 3, 10]))
    indices = choice_of_experts(of, usable, generator, skew)
    weights = torch.rand(indices.shape, generator=generator)
    weights[torch.rand(indices.shape, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    x = torch.randn(*of.leading, of.hidden, generator=generator)
    gate_up, down = stacks(of, generator)
    return x.to(dtype), indices, weights, gate_up.to(dtype), down.to(dtype)


@st.composite
def by_expert(draw: st.DrawFn, dtypes: Any = (torch.float32,)) -> Arguments:
    """Each expert's tokens; some tokens may be nobody's."""
    of = draw(sizes())
    generator = torch.Generator().manual_seed(draw(seeds))
    dtype = draw(st.sampled_from(list(dtypes)))
    c = draw(st.integers(1, of.tokens))
    usable = draw(st.integers(c, of.tokens))
    rows = [torch.randperm(usable, generator=generator)[:c] for _ in range(of.experts)]
    indices = torch.stack(rows)
    weights = torch.rand(indices.shape, generator=generator)
    x = torch.randn(of.tokens, of.hidden, generator=generator)
    gate_up, down = stacks(of, generator)
    return x.to(dtype), indices, weights, gate_up.to(dtype), down.to(dtype)


# --- oracles


def transformers_experts(drawn: Arguments) -> torch.Tensor:
    """In fp32, whatever the dtype: what the arguments are, they are exactly."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    x, indices, weights, gate_up, down = drawn
    config = Qwen2MoeConfig(
        num_experts=len(gate_up), hidden_size=down.shape[1], moe_intermediate_size=down.shape[2]
    )
    config._experts_implementation = "eager"
    module = Qwen2MoeExperts(config)
    module.gate_up_proj.data, module.down_proj.data = gate_up.float(), down.float()
    flat = x.float().flatten(0, -2), indices.flatten(0, -2), weights.flatten(0, -2)
    with torch.no_grad():
        return module(*flat).reshape(x.shape)


def expert(e: int, v: np.ndarray, gate_up: torch.Tensor, down: torch.Tensor) -> np.ndarray:
    """f(e, v) of the contract in fp64."""
    gate, up = np.split(gate_up[e].double().numpy(), 2)
    g = gate @ v
    return down[e].double().numpy() @ (g / (1 + np.exp(-g)) * (up @ v))


def loop_over_tokens_of_experts(drawn: Arguments) -> torch.Tensor:
    x, indices, weights, gate_up, down = drawn
    v = x.double().numpy()
    y = np.zeros_like(v)
    for e, j in itertools.product(*map(range, indices.shape)):
        t = int(indices[e, j])
        y[t] += float(weights[e, j]) * expert(e, v[t], gate_up, down)
    return torch.from_numpy(y).float()


def pairs(drawn: Arguments, by_expert: bool) -> tuple[torch.Tensor, ...]:
    """Of each token that an expert has: both, and the weight."""
    _, indices, weights, _, _ = drawn
    rows = torch.arange(indices.shape[:-1].numel()).repeat_interleave(indices.shape[-1])
    both = (indices.flatten(), rows) if by_expert else (rows, indices.flatten())
    return *both, weights.flatten()


def sum_of_terms(drawn: Arguments, by_expert: bool, *, sizes_only: bool) -> torch.Tensor:
    """[tokens, hidden]: what y would be if no two terms of a sum had opposite signs.

    With sizes_only, of the sums in gate and up, too, and silu(a) is taken for |a|, which it never exceeds.
    """
    token, e, weight = pairs(drawn, by_expert)
    x, _, _, gate_up, down = (t.double() for t in drawn)
    v, matrix = x.flatten(0, -2)[token, :, None], gate_up[e]
    g, u = ((matrix.abs() @ v.abs()) if sizes_only else (matrix @ v)).chunk(2, dim=1)
    inner = (g if sizes_only else torch.nn.functional.silu(g)) * u
    terms = weight.double().abs()[:, None] * (down[e].abs() @ inner.abs())[..., 0]
    return torch.zeros(x.flatten(0, -2).shape).double().index_add(0, token, terms)


def assert_close(
    y: torch.Tensor, expected: torch.Tensor, drawn: Arguments, by_expert: bool = False
) -> None:
    """Equal up to roundings.

    The dtype's: the products with gate, up and down, the sigmoid, silu, the inner product and y are rounded, each by
    half an eps of itself; silu passes on up to five times what gate had (1 + |g|, and |g| is seldom above 4). Which is
    at most 5 eps of the sum of the terms that y is made of.
    fp32's: sums of up to 12, 12 and 16 terms, in any order, of any sign.
    """
    assert y.dtype == drawn[0].dtype and y.shape == drawn[0].shape
    info = torch.finfo(y.dtype)
    allowed = 5 * info.eps * sum_of_terms(drawn, by_expert, sizes_only=False)
    allowed += 5e-6 * sum_of_terms(drawn, by_expert, sizes_only=True)
    allowed = allowed.amax(dim=-1) + 16 * info.smallest_normal * info.eps
    errors = (y.double() - expected.double()).abs().flatten(0, -2).amax(dim=-1)
    worst = (errors / allowed).max().item() if len(errors) else 0.0
    assert worst <= 1, f"{worst} of what is allowed"


# --- torch


@settings(max_examples=80)
@given(drawn=by_token(DTYPES))
def test_the_reference_is_transformers_experts(drawn: Arguments) -> None:
    assert_close(moe_experts(*drawn), transformers_experts(drawn), drawn)


@settings(max_examples=80)
@given(drawn=by_expert(DTYPES))
def test_by_expert_the_reference_is_a_loop_over_tokens_of_experts(drawn: Arguments) -> None:
    y = moe_experts(*drawn, by_expert=True)
    assert_close(y, loop_over_tokens_of_experts(drawn), drawn, by_expert=True)
    nobodys = torch.ones(len(y), dtype=torch.bool)
    nobodys[drawn[1].flatten()] = False
    assert torch.equal(y[nobodys], torch.zeros_like(y[nobodys]))


@given(drawn=by_token(), data=st.data())
def test_a_token_s_experts_are_experts_of_one_token_each(
    drawn: Arguments, data: st.DataObject
) -> None:
    x, indices, weights, gate_up, down = drawn
    x, indices, weights = (a.flatten(0, -2) for a in (x, indices, weights))
    t = data.draw(st.integers(0, len(x) - 1), label="token")
    own = x[t : t + 1], indices[t : t + 1], weights[t : t + 1], gate_up, down
    its = torch.zeros_like(indices[t, :, None]), weights[t, :, None]
    y = moe_experts(own[0], *its, gate_up[indices[t]], down[indices[t]], by_expert=True)
    assert_close(moe_experts(*drawn).flatten(0, -2)[t : t + 1], y, own)


def identity_experts(dtype: torch.dtype, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """f(e, 1) = 1 exactly: silu(32) is 32 in fp32, as sigmoid(32) is 1."""
    gate_up = torch.tensor([[32.0], [1 / 32]]).repeat(number, 1, 1)
    return gate_up.to(dtype), torch.ones(number, 1, 1, dtype=dtype)


def sums_that_need_fp32(dtype: torch.dtype, by_expert: bool) -> list[tuple[Arguments, float]]:
    """Weights, of experts that all give 1, whose sum is right in fp32 alone; and that sum."""
    eps = torch.finfo(dtype).eps
    cases = []
    for weights in ([1, *[eps / 4] * 4], [*[eps / 4] * 4, 1], [1 + eps / 4, -1], [-1, 1 + eps / 4]):
        indices = torch.zeros(1, len(weights), dtype=torch.int64)
        if not by_expert:
            indices = torch.arange(len(weights))[None]
        gates = identity_experts(dtype, len(weights))
        x, w = torch.ones(1, 1, dtype=dtype), torch.tensor([weights])
        form = (indices.T, w.T) if by_expert else (indices, w)
        cases.append(((x, *form, *gates), sum(weights)))
    return cases


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_weights_and_their_sum_are_fp32(dtype: torch.dtype, by_expert: bool) -> None:
    for case, expected in sums_that_need_fp32(dtype, by_expert):
        assert moe_experts(*case, by_expert=by_expert).item() == expected


def test_an_expert_s_first_rows_are_its_gate() -> None:
    """silu(1) * 2, not silu(2) * 1."""
    gate_up, down = torch.tensor([[[1.0], [2.0]]]), torch.ones(1, 1, 1)
    x, weights, indices = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    expected = 2 / (1 + math.exp(-1))
    for by_expert in (False, True):
        y = moe_experts(x, indices, weights, gate_up, down, by_expert=by_expert)
        assert y.item() == pytest.approx(expected)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_tokens_are_no_work(leading: tuple[int, ...]) -> None:
    gate_up, down = stacks(Sizes(leading, 4, 2), torch.Generator())
    indices = torch.zeros(*leading, 2, dtype=torch.int64)
    y = moe_experts(torch.zeros(*leading, 5), indices, torch.zeros(*leading, 2), gate_up, down)
    assert y.shape == (*leading, 5)


@pytest.mark.parametrize("tokens", [0, 3])
def test_experts_without_tokens_give_zeros(tokens: int) -> None:
    gate_up, down = stacks(Sizes((tokens,), 4, 2), torch.Generator())
    nothing = torch.zeros(4, 0, dtype=torch.int64), torch.zeros(4, 0)
    y = moe_experts(torch.ones(tokens, 5), *nothing, gate_up, down, by_expert=True)
    assert torch.equal(y, torch.zeros(tokens, 5))


# --- together with the router


@st.composite
def tokens_and_logits(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    """x, logits, gate_up and down."""
    of = Sizes((draw(st.integers(1, 40)),), draw(st.integers(2, 16)), 1)
    generator = torch.Generator().manual_seed(draw(seeds))
    logits = torch.randn(of.tokens, of.experts, generator=generator)
    logits[:, 0] += draw(st.sampled_from([0.0, 4.0]))  # an expert that most tokens want
    return torch.randn(of.tokens, of.hidden, generator=generator), logits, *stacks(of, generator)


factors = st.sampled_from([0.25, 1.0, 1.25, 2.0, 4.0])


@given(drawn=tokens_and_logits(), factor=factors)
def test_expert_choice_and_its_experts_are_the_paper_s(
    drawn: tuple[torch.Tensor, ...], factor: float
) -> None:
    """X_out[l, d] = sum over i, j of P[i, j, l] G[i, j] X_e[i, j, d] (arXiv 2202.09368, 3.2)."""
    x, logits, gate_up, down = drawn
    tokens, experts = logits.shape
    c = min(tokens, max(1, math.ceil(tokens * factor / experts)))
    powers = np.exp(logits.double().numpy())
    s_t = (powers / powers.sum(axis=1, keepdims=True)).T
    order = np.argsort(-s_t, axis=1)
    ranked = np.take_along_axis(s_t, order, 1)
    if c < tokens:
        assume((ranked[:, c - 1] - ranked[:, c]).min() > 1e-6)  # a rounding must not decide
    g, p = ranked[:, :c], np.eye(tokens)[order[:, :c]]
    x_in = np.einsum("ijl,ld->ijd", p, x.double().numpy())
    x_e = [[expert(i, v, gate_up, down) for v in of_one] for i, of_one in enumerate(x_in)]
    expected = torch.from_numpy(np.einsum("ijl,ij,ijd->ld", p, g, np.array(x_e)))
    weights, indices = moe_router(logits, EXPERT_CHOICE, capacity_factor=factor)
    y = moe_experts(x, indices, weights, gate_up, down, by_expert=True)
    assert_close(y, expected, (x, indices, weights, gate_up, down), by_expert=True)


@given(drawn=tokens_and_logits(), factor=factors)
def test_switch_and_its_experts_drop_tokens_beyond_capacity(
    drawn: tuple[torch.Tensor, ...], factor: float
) -> None:
    x, logits, gate_up, down = drawn
    tokens, experts = logits.shape
    places = [max(1, math.ceil(tokens * factor / experts))] * experts
    p = logits.double().softmax(-1)
    expected, dropped = torch.zeros_like(x).double(), []
    for t in range(tokens):
        e = int(logits[t].argmax())
        if places[e]:
            places[e] -= 1
            f = expert(e, x[t].double().numpy(), gate_up, down)
            expected[t] = p[t, e] * torch.from_numpy(f)
        else:
            dropped.append(t)
    weights, indices = moe_router(logits, SWITCH, capacity_factor=factor)
    arguments = (x, indices, weights, gate_up, down)
    for y in (moe_experts(*arguments), run_in_session(session(24), *arguments)[0]):
        assert_close(y, expected, arguments)
        assert torch.equal(y[dropped], torch.zeros(len(dropped), x.shape[1]))


# --- as a torch operator


def laid_out(transposed: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x of two leading axes."""
    generator = torch.Generator().manual_seed(0)
    of = Sizes((3, 2), 4, 2)
    x = torch.randn(*of.leading, of.hidden, generator=generator).to(dtype)
    if transposed:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return x, choice_of_experts(of, 4, generator)


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_is_well_formed(dtype: torch.dtype, by_expert: bool) -> None:
    x, indices = laid_out(False, dtype)
    gate_up, down = (w.to(dtype) for w in stacks(Sizes((3, 2), 4, 2), torch.Generator()))
    if by_expert:
        x, indices = x.flatten(0, 1), torch.tensor([[0, 1], [5, 2], [3, 0], [0, 4]])
    arguments = (x, indices, torch.rand(indices.shape), gate_up, down, by_expert)
    torch.library.opcheck(OPERATOR, arguments, test_utils=OPERATOR_CHECKS)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fake_output_is_the_real_one_s_shape_dtype_and_layout(
    transposed: bool, dtype: torch.dtype
) -> None:
    x, indices = laid_out(transposed, dtype)
    gate_up, down = (w.to(dtype) for w in stacks(Sizes((3, 2), 4, 2), torch.Generator()))
    arguments = (x, indices, torch.rand(indices.shape), gate_up, down)
    real, fake = moe_experts(*arguments), moe_experts(*(a.to("meta") for a in arguments))
    assert fake.device.type == "meta"
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert torch.equal(real, moe_experts(x.contiguous(), *arguments[1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_expert_the_fake_output_is_the_real_one_s_shape_dtype_and_layout(
    dtype: torch.dtype,
) -> None:
    gate_up, down = (w.to(dtype) for w in stacks(Sizes((7,), 4, 2), torch.Generator()))
    indices = torch.tensor([[0, 1], [5, 2], [3, 0], [0, 4]])
    arguments = (torch.ones(7, 5, dtype=dtype), indices, torch.ones(4, 2), gate_up, down)
    real = moe_experts(*arguments, by_expert=True)
    fake = moe_experts(*(a.to("meta") for a in arguments), by_expert=True)
    assert fake.device.type == "meta"
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# --- the same in ONNX


def model_of(
    opset: int, *, by_expert: bool = False, dtype: torch.dtype = torch.float32, rank: int = 2
) -> onnx.ModelProto:
    element = ELEMENTS[dtype]
    inputs = {
        "x": (element, rank),
        "indices": (ir.DataType.INT64, rank),
        "weights": (ir.DataType.FLOAT, rank),
        "gate_up": (element, 3),
        "down": (element, 3),
    }
    body = function_body(opset, by_expert=by_expert)
    return model_of_call(op.NAME, body, inputs, {"y": (element, rank)}, by_expert=int(by_expert))


@functools.cache
def session(opset: int, **form: Any) -> ort.InferenceSession:
    return session_of(model_of(opset, **form))


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
    assert [i.name for i in schema.inputs] == [a.name for a in arguments[:-1]]
    assert set(schema.attributes) == {arguments[-1].name}
    (output,) = schema.outputs
    x, indices, weights, gate_up, down = (i.type_str for i in schema.inputs)
    assert x == gate_up == down == output.type_str
    assert (indices, weights) == ("tensor(int64)", "tensor(float)")
    (constraint,) = schema.type_constraints
    allowed = {"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}
    assert set(constraint.allowed_type_strs) == allowed


@pytest.mark.parametrize("by_expert", [False, True])
def test_the_body_has_the_schema_s_ports(by_expert: bool) -> None:
    schema = op.schema()
    body = ir.serde.serialize_function(function_body(24, by_expert=by_expert))
    assert list(body.input) == [i.name for i in schema.inputs]
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
