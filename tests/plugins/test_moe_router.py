"""The three kinds of routing, in torch."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from calls import run_in_session
from hypothesis import given, settings
from hypothesis import strategies as st
from router_oracles import (
    any_logits,
    assert_expert_choice,
    assert_same_routing,
    distinct_logits,
    experts,
    factors,
    k_of,
    numpy_capacity,
    numpy_expert_choice,
    session,
    softmax,
    tied_logits,
    tied_tokens,
)

from qwenport.plugins.moe_router import (
    EXPERT_CHOICE,
    SWITCH,
    TOP_K,
    capacity,
    function_body,
    moe_router,
)

# --- oracles in NumPy, from the contract and from the papers


def numpy_top_k(logits: torch.Tensor, k: int, normalize: bool) -> Any:
    p = softmax(logits)
    indices = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    weights = np.take_along_axis(p, indices, -1)
    return weights / weights.sum(axis=-1, keepdims=True) if normalize else weights, indices


def numpy_switch(logits: torch.Tensor, factor: float) -> Any:
    """Tokens come one after the other and are seated while their expert has a place."""
    p = softmax(logits)
    places = np.full(p.shape[1], numpy_capacity(*p.shape, factor))
    weights, indices = np.zeros((len(p), 1), np.float32), np.zeros((len(p), 1), np.int64)
    for token, row in enumerate(p):
        best = indices[token, 0] = np.argmax(row)
        if places[best] > 0:
            weights[token, 0] = row[best]
            places[best] -= 1
    return weights, indices


# --- top_k


def transformers_router(model: str, n_experts: int, k: int, normalize: bool) -> torch.nn.Module:
    """A router whose logits are its hidden states."""
    if model == "mixtral":
        from transformers import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as Router

        sizes = {"num_local_experts": n_experts}
    elif model == "qwen2_moe":
        from transformers import Qwen2MoeConfig as Config
        from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter as Router

        sizes = {"num_experts": n_experts, "norm_topk_prob": normalize}
    else:
        from transformers import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router

        sizes = {"num_experts": n_experts, "norm_topk_prob": normalize}
    router = Router(Config(hidden_size=n_experts, num_experts_per_tok=k, **sizes))
    router.weight.data = torch.eye(n_experts)
    return router


@pytest.mark.parametrize(
    ("model", "normalize"),
    [
        ("qwen2_moe", False),
        ("qwen2_moe", True),
        ("qwen3_moe", False),
        ("qwen3_moe", True),
        ("mixtral", True),  # which has no choice
    ],
)
@given(logits=distinct_logits(leading=True), data=st.data())
def test_top_k_routes_as_transformers_does(
    model: str, normalize: bool, logits: torch.Tensor, data: st.DataObject
) -> None:
    k = k_of(data, logits)
    router = transformers_router(model, logits.shape[-1], k, normalize).to(logits.dtype)
    with torch.no_grad():
        same, expected, chosen = router(logits)
    assert torch.equal(same, logits.reshape(same.shape))
    weights, indices = moe_router(logits, TOP_K, k=k, normalize=normalize)
    assert weights.shape == indices.shape == (*logits.shape[:-1], k)
    assert (weights.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert torch.equal(indices.reshape(chosen.shape), chosen)
    # Qwen's routers round the weights to the logits' dtype, which costs half a unit in the last
    # place, or half of the smallest number; a sum in another order costs a few units of fp32
    info = torch.finfo(expected.dtype)
    rtol, atol = max(info.eps / 2, 1e-6) * 1.001, info.smallest_normal * info.eps
    weights = weights.reshape(expected.shape)
    torch.testing.assert_close(weights, expected.float(), rtol=rtol, atol=atol)


@given(logits=tied_logits(), normalize=st.booleans(), data=st.data())
def test_among_equal_experts_the_lowest_index_wins(
    logits: torch.Tensor, normalize: bool, data: st.DataObject
) -> None:
    k = k_of(data, logits)
    actual = moe_router(logits, TOP_K, k=k, normalize=normalize)
    assert_same_routing(actual, numpy_top_k(logits, k, normalize))


@given(logits=distinct_logits(leading=True), data=st.data())
def test_normalized_weights_sum_to_one_and_keep_their_proportions(
    logits: torch.Tensor, data: st.DataObject
) -> None:
    k = k_of(data, logits)
    plain, indices = moe_router(logits, k=k)
    weights, same = moe_router(logits, k=k, normalize=True)
    assert torch.equal(indices, same)
    torch.testing.assert_close(weights.sum(-1), torch.ones(logits.shape[:-1]))
    # the probability of a token's first expert is the largest one, so that nothing is lost here
    torch.testing.assert_close(weights * plain[..., :1], plain * weights[..., :1])


def test_every_expert_may_be_chosen() -> None:
    weights, indices = moe_router(torch.tensor([0.0, 1.0, 2.0, 3.0]), k=4)
    assert indices.tolist() == [3, 2, 1, 0]
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
@pytest.mark.parametrize("normalize", [False, True])
def test_no_tokens_have_no_experts(shape: tuple[int, ...], normalize: bool) -> None:
    weights, indices = moe_router(torch.zeros(shape), k=3, normalize=normalize)
    assert weights.shape == indices.shape == (*shape[:-1], 3)


# --- switch


@given(logits=distinct_logits(crowds=True), factor=factors)
def test_switch_routes_as_transformers_does(logits: torch.Tensor, factor: float) -> None:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersTop1Router,
    )

    logits = logits.float()  # transformers rounds the probabilities to the dtype
    tokens, n_experts = logits.shape
    config = SwitchTransformersConfig(
        hidden_size=n_experts,
        num_experts=n_experts,
        expert_capacity=numpy_capacity(tokens, n_experts, factor),
        router_dtype="float32",
    )
    router = SwitchTransformersTop1Router(config).eval()
    router.classifier.weight.data = torch.eye(n_experts)
    with torch.no_grad():
        dispatch, p, _ = (y[0] for y in router(logits[None]))
    weights, indices = moe_router(logits, SWITCH, capacity_factor=factor)
    chosen = torch.nn.functional.one_hot(indices[:, 0], n_experts)
    assert torch.equal(chosen * (weights != 0), dispatch)
    torch.testing.assert_close(weights, p * dispatch.sum(-1, keepdim=True))


@settings(max_examples=60)
@given(logits=st.one_of(distinct_logits(crowds=True), tied_logits()), factor=factors)
def test_switch_seats_tokens_in_order_of_position(logits: torch.Tensor, factor: float) -> None:
    actual = moe_router(logits, SWITCH, capacity_factor=factor)
    assert_same_routing(actual, numpy_switch(logits, factor))


@pytest.mark.parametrize(("factor", "seated"), [(0.01, 1), (0.5, 1), (1.0, 2), (1.25, 3), (5.0, 8)])
def test_tokens_beyond_capacity_have_weight_zero(factor: float, seated: int) -> None:
    weights, indices = moe_router(
        torch.tensor([[0.0, 9, 0, 0]] * 8), SWITCH, capacity_factor=factor
    )
    assert indices.tolist() == [[1]] * 8
    assert (weights[:, 0] != 0).tolist() == [True] * seated + [False] * (8 - seated)


def test_switch_has_nothing_to_do_without_tokens() -> None:
    weights, indices = moe_router(torch.zeros(0, 4), SWITCH)
    assert weights.shape == indices.shape == (0, 1)


# --- expert_choice


@given(logits=any_logits(), factor=factors)
def test_experts_choose_tokens_as_in_the_paper(logits: torch.Tensor, factor: float) -> None:
    actual = moe_router(logits, EXPERT_CHOICE, capacity_factor=factor)
    assert_expert_choice(actual, logits, factor)


@given(logits=tied_tokens(), factor=factors)
def test_among_equal_tokens_the_first_is_chosen(logits: torch.Tensor, factor: float) -> None:
    actual = moe_router(logits, EXPERT_CHOICE, capacity_factor=factor)
    assert_same_routing(actual, numpy_expert_choice(logits, factor))


def test_an_expert_takes_no_token_twice_however_large_its_capacity() -> None:
    weights, indices = moe_router(torch.zeros(3, 2), EXPERT_CHOICE, capacity_factor=100.0)
    assert indices.tolist() == [[0, 1, 2]] * 2
    assert torch.equal(weights, torch.full((2, 3), 0.5))


def test_without_tokens_experts_choose_none() -> None:
    weights, indices = moe_router(torch.zeros(0, 4), EXPERT_CHOICE)
    assert weights.shape == indices.shape == (4, 0)


# --- capacity


@given(
    tokens=st.integers(0, 4096), n_experts=experts, factor=st.sampled_from([0.25, 0.5, 1, 1.25, 2])
)
def test_capacity_is_the_quotient_rounded_up(tokens: int, n_experts: int, factor: float) -> None:
    exact = Fraction(tokens) * Fraction(factor) / n_experts
    assert capacity(tokens, n_experts, factor) == max(1, math.ceil(exact))


@given(tokens=st.integers(0, 4096), n_experts=experts, factor=factors)
def test_capacity_is_computed_in_fp32(tokens: int, n_experts: int, factor: float) -> None:
    assert capacity(tokens, n_experts, factor) == numpy_capacity(tokens, n_experts, factor)


def capacities_that_need_fp32() -> list[tuple[int, int, float]]:
    """Tokens, experts and a factor where fp64, or the quotient before the product, gives another one."""
    sizes = itertools.product(range(1, 61), (3, 7, 11), (1.1, 1.2))
    return [
        (tokens, n_experts, factor)
        for tokens, n_experts, factor in sizes
        if numpy_capacity(tokens, n_experts, factor) != math.ceil(tokens * factor / n_experts)
        or numpy_capacity(tokens, n_experts, factor)
        != np.ceil(np.float32(tokens) / np.float32(n_experts) * np.float32(factor))
    ]


def test_capacity_is_fp32_s_where_it_matters() -> None:
    """In onnxruntime, too, where as many tokens are seated as a capacity says."""
    cases = capacities_that_need_fp32()
    assert (25, 3, 1.2) in cases and (35, 3, 1.2) in cases
    for tokens, n_experts, factor in cases:
        c = numpy_capacity(tokens, n_experts, factor)
        assert capacity(tokens, n_experts, factor) == c
        logits = torch.zeros(tokens, n_experts)
        for kind, seated in ((SWITCH, c), (EXPERT_CHOICE, n_experts * c)):
            for weights, _ in (
                moe_router(logits, kind, capacity_factor=factor),
                run_in_session(session(24, kind, capacity_factor=factor), logits),
            ):
                assert weights.count_nonzero() == seated


# --- errors


@pytest.mark.parametrize("kind", ["", "top-k", "TOP_K", "hash"])
def test_an_unknown_kind_is_refused(kind: str) -> None:
    with pytest.raises(ValueError):
        moe_router(torch.zeros(3, 4), kind)
    with pytest.raises(ValueError):
        function_body(24, kind)


@pytest.mark.parametrize("k", [-1, 0, 5])
def test_k_is_one_to_the_number_of_experts(k: int) -> None:
    with pytest.raises(ValueError):
        moe_router(torch.zeros(3, 4), TOP_K, k=k)


@pytest.mark.parametrize("kind", [SWITCH, EXPERT_CHOICE])
@pytest.mark.parametrize("attributes", [{"k": 2}, {"k": 0}, {"normalize": True}])
def test_attributes_of_top_k_are_refused_elsewhere(kind: str, attributes: Any) -> None:
    with pytest.raises(ValueError):
        moe_router(torch.zeros(3, 4), kind, **attributes)


def test_a_capacity_is_refused_by_top_k() -> None:
    with pytest.raises(ValueError):
        moe_router(torch.zeros(3, 4), TOP_K, capacity_factor=1.25)


@pytest.mark.parametrize("kind", [SWITCH, EXPERT_CHOICE])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_tokens_that_compete_have_one_axis(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        moe_router(torch.zeros(shape), kind)
