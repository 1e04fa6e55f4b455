"""transformers' config and rotary module, set up as the target was exported; the same for both runners."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwenport.contract import DTYPES, E4M3, FP64, INT8
from qwenport.validate.errors import ValidationError

KNOWN = {**DTYPES, FP64.name: FP64}
ATTENTIONS = ("eager", "sdpa")

# Plain arithmetic, one operation after another; transformers' own choice differs between machines.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that "fp32", "bf16", "fp16" or "fp64" names; that of INT8 and E4M3 is fp32: only products round.

    Raises:
        ValidationError: another name.
    """
    if name in (INT8, E4M3):
        return torch.float32
    if name not in KNOWN:
        raise ValidationError(
            f"the reference does not compute in {name!r}; it does in {', '.join(KNOWN)}"
        )
    return KNOWN[name].torch


def check_attention(name: str) -> None:
    """Raise a ValidationError for a name other than "eager" or "sdpa"."""
    if name not in ATTENTIONS:
        raise ValidationError(
            f"the reference has no attention {name!r}; it has {', '.join(ATTENTIONS)}"
        )


@contextlib.contextmanager
def attending(config: Any, attention: str) -> Iterator[None]:
    """Make modules of `config` use one of transformers' attention implementations while the context lasts."""
    before = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before


def read_config(path: Path, rope_scaling: str | None) -> Any:
    """transformers' config of a checkpoint, with the rope scaling ("KIND:FACTOR") that the export added.

    It states no quantization: transformers gets weights that are dequantized already.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config", None)
    if rope_scaling is not None:
        kind, _, factor = rope_scaling.partition(":")
        settings = {**config.rope_parameters, "rope_type": kind, "factor": float(factor)}
        if kind == "yarn":  # as in Qwen's model cards
            settings["original_max_position_embeddings"] = config.max_position_embeddings
        config.rope_parameters = settings
    return config


def model_without_weights(config: Any) -> Any:
    """transformers' fp32 model of a config, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER)
    return model.eval().requires_grad_(False)


def pin_rope(rotary: Any, length: int) -> None:
    """Fix transformers' frequencies to those for texts of `length` tokens.

    Source: transformers modeling_rope_utils.dynamic_rope_update, which acts on "dynamic" and
    "longrope" in `rope_type` at every forward, and on no other value.
    """
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rotary.rope_type](rotary.config, None, seq_len=length)
    rotary.inv_freq = inv_freq
    rotary.attention_scaling = scaling
    rotary.rope_type = "default"


def keep_layers(model: Any, count: int | None) -> None:
    """Truncate a model to its first `count` decoder layers; None keeps all.

    Raises:
        ValidationError: it does not have that many.
    """
    layers = model.model.layers
    if count is None:
        return
    if not 1 <= count <= len(layers):
        raise ValidationError(f"the model has {len(layers)} layers; {count} cannot be used")
    model.model.layers = layers[:count]
    model.config.num_hidden_layers = count
