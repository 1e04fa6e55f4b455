"""Experts that round what they multiply to FP8: the body and the reference, by compressed-tensors."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from calls import run_in_onnx, run_in_session
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from experts_oracles import model_of, session, session_of
from torch.nn import functional

from qwenport.engines.lowering import ReadExpertsOnce, UsePlugins
from qwenport.plugins.moe_experts import moe_experts

STATED = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
CASES = [(1, 1), (2, 1), (3, 17), (4, 40)]
"""(seed, tokens)."""


def drawn(seed: int, tokens: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    """x, indices, weights, gate_up and down; token 0 is zero."""
    torch.manual_seed(seed)
    x = size * torch.randn(tokens, 24) * torch.logspace(-3, 2, tokens)[:, None]
    x[0] = 0
    indices = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
    return x, indices, torch.rand(tokens, 2), torch.randn(5, 32, 24), torch.randn(5, 24, 16)


def by_library(x: torch.Tensor) -> torch.Tensor:
    """[n, K] rounded by compressed-tensors, each row with its own scale."""
    arguments = QuantizationArgs.model_validate(STATED)
    scale, zero_point = compute_dynamic_scales_and_zp(x[None], arguments, torch.nn.Identity())
    return fake_quantize(x[None], scale, zero_point, arguments)[0]


def expected(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Token by token, expert by expert."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(indices[token].tolist(), weights[token], strict=True):
            gate, up = functional.linear(x[token : token + 1], gate_up[expert]).chunk(2, dim=-1)
            inner = by_library(functional.silu(gate) * up)
            y[token] += weight * functional.linear(inner, down[expert])[0]
    return y


def by_static_library(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[n, K] rounded by compressed-tensors with one scale."""
    arguments = QuantizationArgs.model_validate(STATED | {"strategy": "tensor", "dynamic": False})
    return fake_quantize(x[None], scale.reshape(1), None, arguments)[0]


def expected_of_scales(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Token by token, expert by expert, each of its linears by itself."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(indices[token].tolist(), weights[token], strict=True):
            row, (gate, up) = x[token : token + 1], gate_up[expert].chunk(2, dim=0)
            of_gate, of_up, of_down = scales[expert]
            made = functional.silu(functional.linear(by_static_library(row, of_gate), gate))
            inner = made * functional.linear(by_static_library(row, of_up), up)
            y[token] += (
                weight * functional.linear(by_static_library(inner, of_down), down[expert])[0]
            )
    return y


def drawn_scales(seed: int) -> torch.Tensor:
    """[5, 3], no two of them equal; some inputs of `drawn` saturate."""
    return 0.002 * torch.logspace(-1, 1, 15)[
        torch.randperm(15, generator=torch.Generator().manual_seed(seed))
    ].view(5, 3)


def agree(found: torch.Tensor, right: torch.Tensor) -> None:
    """By far closer than rounding moves it."""
    for ours, theirs in zip(found, right, strict=True):
        assert torch.linalg.norm(ours - theirs) <= 1e-5 * torch.linalg.norm(theirs)


@pytest.mark.parametrize(("seed", "tokens"), CASES)
def test_the_reference_rounds_as_compressed_tensors_does(seed: int, tokens: int) -> None:
    given = drawn(seed, tokens)
    right = expected(*given)
    agree(moe_experts(*given, round_inner=True), right)
    if tokens > 1:
        off = torch.linalg.norm(moe_experts(*given) - right) / torch.linalg.norm(right)
        assert off > 1e-3, "the rounding shows"


@pytest.mark.parametrize(("seed", "tokens"), CASES)
def test_the_function_body_rounds_as_the_reference(seed: int, tokens: int) -> None:
    given = drawn(seed, tokens)
    (found,) = run_in_session(session(24, round_inner=True), *given)
    agree(found, expected(*given))


@pytest.mark.parametrize(("seed", "tokens"), [*CASES[:3], (9, 40)])
def test_inputs_are_rounded_with_the_scales_of_each_linear(seed: int, tokens: int) -> None:
    given, scales = drawn(seed, tokens), drawn_scales(seed)
    right = expected_of_scales(*given, scales)
    agree(moe_experts(*given, scales), right)
    (found,) = run_in_session(session(24, input_scales=True), *given, scales)
    agree(found, right)
    if tokens > 1:
        for order in ([1, 0, 2], [0, 2, 1]):
            off = torch.linalg.norm(moe_experts(*given, scales[:, order]) - right)
            assert off > 1e-3 * torch.linalg.norm(right), "the order shows"


def test_by_expert_inputs_are_rounded_too() -> None:
    x, _, _, gate_up, down = drawn(5, 12)
    tokens = torch.stack([torch.randperm(12)[:4] for _ in range(5)])
    given = x, tokens, torch.rand(5, 4), gate_up, down, drawn_scales(5)
    (found,) = run_in_session(session(24, by_expert=True, input_scales=True), *given)
    agree(found, moe_experts(*given, by_expert=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_half_precision_each_step_with_a_scale_rounds_as_the_library_s(
    dtype: torch.dtype,
) -> None:
    """Experts that return what their up rounds, exactly: their gate gives 32, and up and down are the identity."""
    torch.manual_seed(8)
    experts, width = 6, 16
    x = (torch.randn(experts, width) * torch.logspace(-3, 2, experts)[:, None]).to(dtype)
    x[:, 0] = 1
    gate_up = torch.zeros(experts, 2 * width, width, dtype=dtype)
    gate_up[:, :width, 0] = 32
    gate_up[:, width:] = torch.eye(width) / 32
    down = torch.eye(width, dtype=dtype).repeat(experts, 1, 1)
    scales = torch.rand(experts, 3).to(dtype) / 64
    scales[:, 0], scales[:, 2] = 1 / 64, 2.0**-7
    given = x, torch.arange(experts)[:, None], torch.ones(experts, 1), gate_up, down, scales
    right = torch.cat(
        [
            by_static_library(32 * (by_static_library(row[None], up) / 32), last)
            for row, (_, up, last) in zip(x, scales, strict=True)
        ]
    )
    assert right.dtype == dtype and right.isfinite().all() and not torch.equal(right, x)
    assert torch.equal(moe_experts(*given), right)
    (found,) = run_in_onnx(model_of(24, input_scales=True, dtype=dtype), *given)
    assert torch.equal(found, right)


def test_by_expert_the_function_body_rounds_as_the_reference() -> None:
    x, _, _, gate_up, down = drawn(5, 12)
    tokens = torch.stack([torch.randperm(12)[:4] for _ in range(5)])
    given = x, tokens, torch.rand(5, 4), gate_up, down
    (found,) = run_in_session(session(24, by_expert=True, round_inner=True), *given)
    agree(found, moe_experts(*given, by_expert=True, round_inner=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_half_precision_each_step_rounds_as_the_library_s(dtype: torch.dtype) -> None:
    """Experts that return what they round, exactly: silu(32) is 32, and down is the identity."""
    torch.manual_seed(7)
    experts, width = 6, 16
    inner = torch.randn(experts, width) * torch.logspace(-7, 2, experts)[:, None]
    inner = inner.to(dtype)
    inner[2] = 0
    gate_up = torch.zeros(experts, 2 * width, width, dtype=dtype)
    gate_up[:, :width, 0] = 32
    gate_up[:, width:, 0] = inner / 32
    inner = gate_up[:, width:, 0] * 32  # what is left of the smallest in dtype
    x = torch.eye(width, dtype=dtype)[:1].repeat(experts, 1)
    indices, weights = torch.arange(experts)[:, None], torch.ones(experts, 1)
    down = torch.eye(width, dtype=dtype).repeat(experts, 1, 1)
    given = x, indices, weights, gate_up, down
    right = torch.cat([by_library(row[None]) for row in inner])
    assert right.dtype == dtype and right.isfinite().all() and not torch.equal(right, inner)
    assert torch.equal(moe_experts(*given, round_inner=True), right)
    (found,) = run_in_onnx(model_of(24, round_inner=True, dtype=dtype), *given)
    assert torch.equal(found, right)


def test_no_tokens() -> None:
    x, indices, weights, gate_up, down = drawn(6, 3)
    nothing: Any = x[:0], indices[:0], weights[:0], gate_up, down
    assert moe_experts(*nothing, round_inner=True).shape == (0, 24)


@pytest.mark.parametrize("form", ["round_inner", "input_scales"])
def test_no_plugin_takes_them(form: str) -> None:
    assert not UsePlugins()(ir.from_proto(model_of(24, **{form: True}))).modified


@pytest.mark.parametrize(("seed", "tokens"), CASES)
def test_tensorrt_s_body_rounds_as_the_reference(seed: int, tokens: int) -> None:
    """In onnxruntime, inlined as for TensorRT; few tokens go one by one, more in blocks."""
    given = drawn(seed, tokens)
    model = ir.from_proto(model_of(24, round_inner=True))
    assert ReadExpertsOnce()(model).modified and not model.functions
    (found,) = run_in_session(session_of(ir.to_proto(model)), *given)
    agree(found, expected(*given))


@pytest.mark.parametrize(("seed", "tokens"), [*CASES[:3], (9, 40)])
def test_tensorrt_s_body_rounds_with_the_scales_of_each_linear(seed: int, tokens: int) -> None:
    given, scales = drawn(seed, tokens), drawn_scales(seed)
    model = ir.from_proto(model_of(24, input_scales=True))
    assert ReadExpertsOnce()(model).modified and not model.functions
    (found,) = run_in_session(session_of(ir.to_proto(model)), *given, scales)
    agree(found, expected_of_scales(*given, scales))
