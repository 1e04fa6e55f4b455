"""Checkpoints to open."""

from __future__ import annotations

from pathlib import Path

from checkpoints import (
    mini,
)

UNTIED = mini("qwen2", tie_word_embeddings=False, num_hidden_layers=1)


A_TENSOR = "model.layers.0.mlp.up_proj.weight"


def weights(checkpoint: Path) -> Path:
    return checkpoint / "model.safetensors"
