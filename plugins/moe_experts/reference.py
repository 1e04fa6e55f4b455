"""The operator in torch: runs eagerly on any device, the meta device included, and traces as one node."""

from __future__ import annotations

import torch
from torch.nn import functional

from qwenport.plugins.moe_experts.schema import LARGEST_FP8

_LIBRARY = torch.library.Library("qwenport", "FRAGMENT")
_LIBRARY.define(
    "moe_experts(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, "
    "Tensor? input_scales, bool by_expert, bool round_inner=False) -> Tensor"
)


def moe_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    input_scales: torch.Tensor | None = None,
    *,
    by_expert: bool = False,
    round_inner: bool = False,
) -> torch.Tensor:
    """Apply to each token the experts chosen for it; shapes as in the operator's contract.

    Args:
        x: [..., H], fp32, fp16 or bf16.
        indices: int64 [..., k], each token's experts; or [E, c], each expert's tokens of x [T, H].
        weights: fp32, of the shape of indices.
        gate_up: [E, 2*I, H], dtype of x; rows 0..I-1 of an expert are its gate, the rest its up projection.
        down: [E, H, I], dtype of x.
        input_scales: [E, 3], dtype of x: what gate, up and down multiply is rounded to FP8 with them; None rounds
            nothing.
        by_expert: whether indices are each expert's tokens.
        round_inner: whether what down multiplies is rounded to FP8.

    Returns:
        [..., H], dtype of x. Products with the weights and their sum are fp32.
    """
    result: torch.Tensor = torch.ops.qwenport.moe_experts.default(
        x, indices, weights, gate_up, down, input_scales, by_expert, round_inner
    )
    return result


def _compute(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    input_scales: torch.Tensor | None,
    by_expert: bool,
    round_inner: bool = False,
) -> torch.Tensor:
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    if not by_expert:
        indices, weights = indices.flatten(0, -2), weights.flatten(0, -2)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(gate_up)) if by_expert else indices.unique().tolist():
        token, weight = _group(indices, weights, expert, by_expert)
        if input_scales is None:
            gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        else:
            gate, up = (
                functional.linear(_with_scale(x[token], scale), half)
                for scale, half in zip(
                    input_scales[expert], gate_up[expert].chunk(2, dim=0), strict=False
                )
            )
        inner = functional.silu(gate) * up
        if input_scales is not None:
            inner = _with_scale(inner, input_scales[expert, 2])
        elif round_inner:
            inner = _rounded(inner)
        part = functional.linear(inner, down[expert]).float()
        y.index_add_(0, token, part * weight[:, None])
    return y.to(x.dtype).view(shape)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """x [n, I], each row rounded to FP8 with a scale of its own."""
    scale = x.abs().amax(-1, keepdim=True) / LARGEST_FP8 if x.numel() else x[:, :1]
    return _with_scale(x, torch.where(scale == 0, torch.finfo(x.dtype).eps, scale))


def _with_scale(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = (x / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return codes.to(x.dtype) * scale


def _group(
    indices: torch.Tensor, weights: torch.Tensor, expert: int, by_expert: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of one expert and their weights, both [n]."""
    if by_expert:
        return indices[expert], weights[expert]
    token, column = torch.where(indices == expert)
    return token, weights[token, column]


def _meta(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    input_scales: torch.Tensor | None,
    by_expert: bool,
    round_inner: bool = False,
) -> torch.Tensor:
    return x.new_empty(x.shape)


_LIBRARY.impl("moe_experts", _compute, "CompositeExplicitAutograd")
_LIBRARY.impl("moe_experts", _meta, "Meta")
