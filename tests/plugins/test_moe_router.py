"""`qwenport.MoERouter`: torch, transformers, the papers, onnxruntime and onnx agree on what it is."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from calls import ELEMENTS, model_of_call, registered, run_in_onnx, run_in_session, session_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import InlinePass

from qwenport.plugins import moe_router as op
from qwenport.plugins.moe_router import (
    EXPERT_CHOICE,
    KINDS,
    SWITCH,
    TOP_K,
    capacity,
    function_body,
    is_stepwise,
    moe_router,
)

OPERATOR = torch.ops.qwenport.moe_router.default
OPERATOR_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Routing = tuple[torch.Tensor, torch.Tensor]

# the published models' numbers of experts are no powers of two: 60 leaves a tail to every vector
experts = st.one_of(st.sampled_from([2, 8, 60, 256]), st.integers(2, 256))
factors = st.one_of(
    st.sampled_from([1.0, 1.25, 2.0, 0.5, 0.1, 1.2, 300.0]), st.floats(0.0625, 4.0, width=32)
)
seeds = st.integers(0, 2**31)


@st.composite
def distinct_logits(draw: st.DrawFn, *, leading: bool = False, crowds: bool = False) -> Any:
    """Logits no two of which are equal in a token, and exact in every dtype: steps of 1/32 or more.

    With crowds, several tokens may have the same logits and so want the same experts.
    """
    n_experts = draw(experts)
    axes = draw(st.lists(st.integers(1, 4), max_size=2)) if leading else []
    shape = (*axes, draw(st.integers(1, 40)))
    generator = np.random.default_rng(draw(seeds))
    rows = math.prod(shape)
    grid = np.tile(np.arange(n_experts) - n_experts // 2, (rows, 1))
    logits = generator.permuted(grid, axis=1) * 2.0 ** draw(st.integers(-5, -2))
    if crowds:
        logits = logits[generator.integers(0, draw(st.integers(1, rows)), rows)]
    logits = torch.from_numpy(logits.reshape(*shape, n_experts))
    return logits.to(draw(st.sampled_from(DTYPES)))


@st.composite
def tied_logits(draw: st.DrawFn, dtypes: Any = tuple(DTYPES)) -> torch.Tensor:
    """Very few distinct values. The two lowest have the probability 0 beside any other."""
    values = draw(st.sampled_from([[0.0], [0.0, 1.0], [-1.0, 0.5, 2.0], [-math.inf, -200.0, 0.0]]))
    shape = draw(st.integers(1, 40)), draw(experts)
    drawn = np.random.default_rng(draw(seeds)).choice(np.array(values), shape)
    drawn[:, draw(st.integers(0, shape[1] - 1))] = values[-1]
    return torch.from_numpy(drawn).to(draw(st.sampled_from(list(dtypes))))


@st.composite
def tied_tokens(draw: st.DrawFn, dtypes: Any = tuple(DTYPES)) -> torch.Tensor:
    """Tokens of few sorts, so that experts have many tokens of the same probability to choose from.

    A sort is a number that some experts have for their logit, beside 0 of the others: of two sorts
    an expert's probabilities are equal or far apart.
    """
    tokens, n_experts = draw(st.integers(1, 40)), draw(experts)
    generator = np.random.default_rng(draw(seeds))
    sorts = generator.choice([-2.0, -1.0, 0.0, 1.0, 2.0], tokens)
    chosen = generator.permutation(n_experts) < draw(st.integers(1, n_experts - 1))
    logits = torch.from_numpy(sorts[:, None] * chosen)
    return logits.to(draw(st.sampled_from(list(dtypes))))


def k_of(data: st.DataObject, logits: torch.Tensor) -> int:
    return data.draw(st.integers(1, min(16, logits.shape[-1])), label="k")


def assert_same_routing(actual: Routing, expected: Any) -> None:
    """The same experts; the weights are sums and quotients of a few hundred fp32 numbers."""
    weights, indices = (torch.as_tensor(e) for e in expected)
    assert (actual[0].dtype, actual[1].dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(actual[1], indices, rtol=0, atol=0)
    # 1e-37: a program may call subnormal numbers 0
    torch.testing.assert_close(actual[0], weights.float(), rtol=2e-6, atol=1e-37)


# --- oracles in NumPy, from the contract and from the papers


def softmax(logits: torch.Tensor) -> np.ndarray:
    """In fp32."""
    values = logits.float().numpy()
    powers = np.exp(values - values.max(axis=-1, keepdims=True, initial=-np.inf))
    return powers / powers.sum(axis=-1, keepdims=True)


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


def numpy_expert_choice(logits: torch.Tensor, factor: float) -> Any:
    """S = softmax(X W_g); G, I = TopK(S^T, c) (arXiv 2202.09368, section 3.2)."""
    s = softmax(logits)
    c = min(numpy_capacity(*s.shape, factor), len(s))
    indices = np.argsort(-s.T, axis=-1, kind="stable")[:, :c]
    return np.take_along_axis(s.T, indices, -1), indices


def numpy_capacity(tokens: int, n_experts: int, factor: float) -> int:
    c = np.ceil(np.float32(tokens) * np.float32(factor) / np.float32(n_experts))
    return max(1, int(c))


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


def assert_expert_choice(actual: Routing, logits: torch.Tensor, factor: float) -> None:
    """As the paper has it; where two tokens' probabilities differ by a rounding, in either order."""
    weights, indices = actual
    expected, _ = numpy_expert_choice(logits, factor)
    assert (weights.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert weights.shape == indices.shape == expected.shape
    chosen = indices.numpy()
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    their = np.take_along_axis(softmax(logits).T, chosen, -1)
    for values in (expected, their):
        torch.testing.assert_close(weights, torch.from_numpy(values), rtol=2e-6, atol=1e-37)


@st.composite
def any_logits(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.integers(1, 40)), draw(experts)
    generator = torch.Generator().manual_seed(draw(seeds))
    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    return logits.to(draw(st.sampled_from(DTYPES)))


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


def model_of(
    opset: int, kind: str, *, dtype: torch.dtype = torch.float32, rank: int = 2, **attributes: Any
) -> onnx.ModelProto:
    return model_of_call(
        op.NAME,
        function_body(opset, kind),
        {"logits": (ELEMENTS[dtype], rank)},
        {"weights": (ir.DataType.FLOAT, rank), "indices": (ir.DataType.INT64, rank)},
        kind=kind,
        **attributes,
    )


@functools.cache
def session(opset: int, kind: str, **attributes: Any) -> ort.InferenceSession:
    return session_of(model_of(opset, kind, **attributes))


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
