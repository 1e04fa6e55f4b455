"""Small models with random weights, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

VOCAB = 300


def make_checkpoint(
    folder: Path,
    rope: dict[str, Any] | None = None,
    *,
    family: type = Qwen2Config,
    positions: int = 64,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """A random two-layer checkpoint with biases and norms that are not trivial."""
    config = family(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
            else:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder)
    return folder
