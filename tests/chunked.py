"""Models with dual chunk attention: a small random one, of chunks of 16 positions, each query at most 24 from a key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

CHUNK, CHUNK_SIZE, ORIGINAL, POSITIONS, VOCAB = 16, 24, 40, 256, 300
SETTINGS = {
    "chunk_size": CHUNK_SIZE,
    "local_size": CHUNK_SIZE - CHUNK,
    "original_max_position_embeddings": ORIGINAL,
}


def chunk(checkpoint: Path, chunk_size: int, local_size: int, original: int) -> Path:
    """Give a checkpoint dual chunk attention."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["dual_chunk_attention_config"] = {
        "chunk_size": chunk_size,
        "local_size": local_size,
        "original_max_position_embeddings": original,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def make_chunked(folder: Path, *, positions: int = POSITIONS, **settings: Any) -> Path:
    """Write the checkpoint; `settings` replace those of dual chunk attention."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=1,
        dual_chunk_attention_config={**SETTINGS, **settings},
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder
