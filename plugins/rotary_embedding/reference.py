"""The operator in torch: runs eagerly, traces as one node."""

from __future__ import annotations

import torch


@torch.library.custom_op("qwenport::rotary_embedding", mutates_args=())
def rotary_embedding(
    x: torch.Tensor, cos_cache: torch.Tensor, sin_cache: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Rotate x by the angles of its positions; shapes as in the operator's contract.

    Args:
        x: [batch, heads, seq, head_dim], fp32, fp16 or bf16.
        cos_cache: [positions, head_dim/2], dtype of x; the sines likewise.
        sin_cache: see cos_cache.
        position_ids: int64 [batch, seq].

    Returns:
        [batch, heads, seq, head_dim], dtype of x.
    """
    cos = cos_cache[position_ids][:, None]
    sin = sin_cache[position_ids][:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@rotary_embedding.register_fake
def _(
    x: torch.Tensor, cos_cache: torch.Tensor, sin_cache: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
