"""Dual chunk attention in transformers' Qwen2 model, which ignores the setting, to train it and to measure its loss.

All queries of a text attend at once; `qwenport validate` has an independent reference, pair by pair.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, rotate_half


class DualChunkAttention(Qwen2Attention):
    """Attention within texts that begin at position 0, each a request of its own. There is no cache."""

    def forward(self, hidden_states: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
        """[texts, length, hidden_size] -> [texts, length, hidden_size], without attention weights."""
        settings = self.config.dual_chunk_attention_config
        size = settings["chunk_size"]
        chunk, (texts, length, _) = size - settings["local_size"], hidden_states.shape
        longer = length / settings["original_max_position_embeddings"]
        scale = max(1.0, 0.1 * math.log(longer) + 1.0)
        q, k, v = (
            part(hidden_states).view(texts, length, -1, self.head_dim).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (part.repeat_interleave(self.num_key_value_groups, dim=1) for part in (k, v))
        position = torch.arange(length)
        inside = position % chunk
        keys = self._rotated(k * scale, inside).mT
        same, previous, older = (
            self._rotated(q * scale, at) @ keys
            for at in (
                inside,
                (inside + chunk).clamp(max=size),
                torch.full_like(position, min(2 * chunk - 1, size)),
            )
        )
        apart = position[:, None] // chunk - position // chunk
        scores = torch.where(apart < 1, same, torch.where(apart < 2, previous, older))
        scores = scores.float() * self.scaling
        seen = position <= position[:, None]
        weights = functional.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        mixed = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(texts, length, -1)
        return self.o_proj(mixed), None

    def _rotated(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        theta = self.config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (position[:, None] * frequencies).repeat(1, 2)
        return x * angles.cos().to(x.dtype) + rotate_half(x) * angles.sin().to(x.dtype)


def attend_in_chunks(model: PreTrainedModel) -> None:
    """Make the model compute the dual chunk attention that its config asks for."""
    for layer in model.model.layers:
        layer.self_attn.__class__ = DualChunkAttention
