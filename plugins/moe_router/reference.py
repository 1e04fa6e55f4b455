"""The operator in torch: runs eagerly on any device, the meta device included, and traces as one node."""

from __future__ import annotations

import math

import numpy as np
import torch

from qwenport.plugins.moe_router.schema import EXPERT_CHOICE, KINDS, SWITCH, TOP_K

_LIBRARY = torch.library.Library("qwenport", "FRAGMENT")
_LIBRARY.define(
    "moe_router(Tensor logits, str kind, int k, bool normalize, float capacity_factor) "
    "-> (Tensor, Tensor)"
)


def moe_router(
    logits: torch.Tensor,
    kind: str = TOP_K,
    *,
    k: int = 1,
    normalize: bool = False,
    capacity_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts for tokens; kinds, attributes and shapes as in the operator's contract.

    Args:
        logits: [..., E], or [T, E] where tokens compete; fp32, fp16 or bf16.
        kind: "top_k", "switch" or "expert_choice".
        k: experts per token, for "top_k".
        normalize: whether a token's k weights are normalized to sum to 1, for "top_k".
        capacity_factor: for "switch" and "expert_choice".

    Returns:
        (weights fp32, indices int64): both [..., k], or [E, c] for "expert_choice", where indices are tokens.

    Raises:
        ValueError: an unknown kind, k outside 1..E, or attributes and axes that the kind does not have.
    """
    if kind not in KINDS:
        raise ValueError(f"routing kind {kind!r} is not one of {', '.join(KINDS)}")
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"{k} of {logits.shape[-1]} experts cannot be chosen")
    if kind == TOP_K and capacity_factor != 1:
        raise ValueError("routing kind top_k has no capacity")
    if kind != TOP_K and (k != 1 or normalize or logits.ndim != 2):
        raise ValueError(
            f"routing kind {kind} takes logits [tokens, experts], and neither k nor normalize"
        )
    weights, indices = torch.ops.qwenport.moe_router.default(
        logits, kind, k, normalize, capacity_factor
    )
    return weights, indices


def capacity(tokens: int, experts: int, factor: float) -> int:
    """Tokens that an expert takes: ceil(tokens * factor / experts) in fp32 arithmetic, at least 1."""
    share = np.float32(tokens) * np.float32(factor) / np.float32(experts)
    return max(1, math.ceil(share))


def _choose(
    logits: torch.Tensor, kind: str, k: int, normalize: bool, capacity_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = torch.softmax(logits.float(), dim=-1)
    if kind == EXPERT_CHOICE:
        return _largest(probabilities.T, _taken(logits, capacity_factor))
    weights, chosen = _largest(probabilities, k)
    if kind == SWITCH:
        tokens, experts = logits.shape
        mine = torch.nn.functional.one_hot(chosen[:, 0], experts)
        rank = (mine.cumsum(0) * mine).sum(1, keepdim=True)
        weights = weights * (rank <= capacity(tokens, experts, capacity_factor))
    elif normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def _largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk along the last axis, with the lowest index first among equals."""
    ordered, indices = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :count].contiguous(), indices[..., :count].contiguous()


def _taken(logits: torch.Tensor, capacity_factor: float) -> int:
    tokens, experts = logits.shape
    return min(tokens, capacity(tokens, experts, capacity_factor))


def _meta(
    logits: torch.Tensor, kind: str, k: int, normalize: bool, capacity_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*logits.shape[:-1], k)
    if kind == EXPERT_CHOICE:
        shape = (logits.shape[1], _taken(logits, capacity_factor))
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int64),
    )


_LIBRARY.impl("moe_router", _choose, "CompositeExplicitAutograd")
_LIBRARY.impl("moe_router", _meta, "Meta")
