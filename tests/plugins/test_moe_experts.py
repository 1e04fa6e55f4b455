"""Experts in torch, alone and together with the router."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from calls import run_in_session
from experts_oracles import (
    DTYPES,
    OPERATOR,
    Arguments,
    Sizes,
    assert_close,
    by_expert,
    by_token,
    choice_of_experts,
    seeds,
    session,
    stacks,
    sums_that_need_fp32,
    transformers_experts,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwenport.plugins.moe_experts import moe_experts
from qwenport.plugins.moe_router import EXPERT_CHOICE, SWITCH, moe_router

OPERATOR_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


# --- oracles


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
    for listed in (False, True):
        y = moe_experts(x, indices, weights, gate_up, down, by_expert=listed)
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
    arguments = (x, indices, torch.rand(indices.shape), gate_up, down, None, by_expert)
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
