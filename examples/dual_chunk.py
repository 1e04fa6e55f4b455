"""Dual chunk attention in transformers' Qwen2 model, which ignores it, for training. No length scale: that is for texts
longer than any that a model was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, rotate_half


class DualChunkAttention(Qwen2Attention):
    """Attention over whole texts that begin at position 0; there is no cache."""

    def forward(self, hidden_states: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
        size, local = (
            self.config.dual_chunk_attention_config[key] for key in ("chunk_size", "local_size")
        )
        chunk, (rows, length, _) = size - local, hidden_states.shape
        q, k, v = (
            part(hidden_states).view(rows, length, -1, self.head_dim).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (part.repeat_interleave(self.num_key_value_groups, dim=1) for part in (k, v))
        position = torch.arange(length)
        keys = self._rotated(k, position % chunk).mT
        same, previous, older = (
            self._rotated(q, at) @ keys
            for at in (
                position % chunk,
                (position % chunk + chunk).clamp(max=size),
                torch.full_like(position, min(2 * chunk - 1, size)),
            )
        )
        apart = position[:, None] // chunk - position // chunk
        scores = torch.where(apart < 1, same, torch.where(apart < 2, previous, older))
        scores = scores.float() * self.scaling
        seen = position <= position[:, None]
        weights = functional.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        mixed = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(rows, length, -1)
        return self.o_proj(mixed), None

    def _rotated(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        theta = self.config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (position[:, None] * frequencies).repeat(1, 2)
        return x * angles.cos() + rotate_half(x) * angles.sin()


def attend_in_chunks(model: PreTrainedModel) -> None:
    """Make a model whose config asks for dual chunk attention compute it."""
    if getattr(model.config, "dual_chunk_attention_config", None) is not None:
        for layer in model.model.layers:
            layer.self_attn.__class__ = DualChunkAttention
