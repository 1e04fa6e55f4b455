"""Routing in NumPy, from the contract and from the papers."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from calls import ELEMENTS, model_of_call, session_of
from hypothesis import strategies as st

from qwenport.plugins import moe_router as op
from qwenport.plugins.moe_router import (
    function_body,
)

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


def softmax(logits: torch.Tensor) -> np.ndarray:
    """In fp32."""
    values = logits.float().numpy()
    powers = np.exp(values - values.max(axis=-1, keepdims=True, initial=-np.inf))
    return powers / powers.sum(axis=-1, keepdims=True)


def numpy_expert_choice(logits: torch.Tensor, factor: float) -> Any:
    """S = softmax(X W_g); G, I = TopK(S^T, c) (arXiv 2202.09368, section 3.2)."""
    s = softmax(logits)
    c = min(numpy_capacity(*s.shape, factor), len(s))
    indices = np.argsort(-s.T, axis=-1, kind="stable")[:, :c]
    return np.take_along_axis(s.T, indices, -1), indices


def numpy_capacity(tokens: int, n_experts: int, factor: float) -> int:
    c = np.ceil(np.float32(tokens) * np.float32(factor) / np.float32(n_experts))
    return max(1, int(c))


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
