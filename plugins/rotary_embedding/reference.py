"""The operator in torch: runs eagerly on any device, the meta device included, and traces as one node."""

from __future__ import annotations

import torch

# The plain registration: torch.library.custom_op would import torch's compiler on the first call.
_LIBRARY = torch.library.Library("qwenport", "FRAGMENT")
_LIBRARY.define(
    "rotary_embedding(Tensor x, Tensor cos_cache, Tensor sin_cache, Tensor position_ids) -> Tensor"
)


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
    result: torch.Tensor = torch.ops.qwenport.rotary_embedding.default(
        x, cos_cache, sin_cache, position_ids
    )
    return result


def _rotate(
    x: torch.Tensor, cos_cache: torch.Tensor, sin_cache: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    cos = cos_cache[position_ids][:, None]
    sin = sin_cache[position_ids][:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


_LIBRARY.impl("rotary_embedding", _rotate, "CompositeExplicitAutograd")
