"""Experts in NumPy, from the contract."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime as ort
import torch
from calls import ELEMENTS, model_of_call, session_of
from hypothesis import strategies as st

from qwenport.plugins.moe_experts import body_by_columns, function_body, tensorrt_body

OPERATOR = torch.ops.qwenport.moe_experts.default


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


def model_of(
    opset: int,
    *,
    by_expert: bool = False,
    for_tensorrt: bool = False,
    round_inner: bool = False,
    input_scales: bool = False,
    by_columns: bool = False,
    dtype: torch.dtype = torch.float32,
    rank: int = 2,
) -> onnx.ModelProto:
    element = ELEMENTS[dtype]
    inputs = {
        "x": (element, rank),
        "indices": (ir.DataType.INT64, rank),
        "weights": (ir.DataType.FLOAT, rank),
        "gate_up": (element, 3),
        "down": (element, 3),
    }
    if input_scales:
        inputs["input_scales"] = (element, 2)
    body = function_body(
        opset, by_expert=by_expert, round_inner=round_inner, input_scales=input_scales
    )
    if for_tensorrt:
        body = tensorrt_body(opset)
    if by_columns:
        body = body_by_columns(opset)
        inputs |= dict.fromkeys(("gate_up_columns", "down_columns"), (ir.DataType.INT32, 2))
    attributes = {"by_expert": int(by_expert), "round_inner": int(round_inner)}
    return model_of_call(body.name, body, inputs, {"y": (element, rank)}, **attributes)


@functools.cache
def session(opset: int, **form: Any) -> ort.InferenceSession:
    return session_of(model_of(opset, **form))
