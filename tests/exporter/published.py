"""config.json of published models."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import (
    MINI,
    meta_model,
    sparse_layers,
)

from qwenport.exporter import ModelConfig
from qwenport.exporter.families import MoEConfig

FAMILIES = pytest.mark.parametrize("family", sorted(MINI))


def assert_means_the_same(config: ModelConfig, theirs: Any) -> None:
    """Compare every number with transformers' config object, and with its model."""
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    layer = meta_model(theirs).model.layers[0]
    attention = layer.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    *of_qkv, of_output = [linear.bias is not None for linear in projections]
    assert len(set(of_qkv)) == 1
    expected = {
        "model_type": theirs.model_type,
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_hidden_layers": theirs.num_hidden_layers,
        "num_attention_heads": theirs.num_attention_heads,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": head_dim,
        "rms_norm_eps": theirs.rms_norm_eps,
        "qkv_bias": of_qkv[0],
        "output_bias": of_output,
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        "qk_norm": hasattr(attention, "q_norm"),
        "moe": experts_of(theirs),
        "tie_word_embeddings": theirs.tie_word_embeddings,
        "max_position_embeddings": theirs.max_position_embeddings,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert theirs.hidden_act == "silu"
    assert "sliding_attention" not in (getattr(theirs, "layer_types", None) or ())
    assert not (theirs.model_type.endswith("_moe") and theirs.use_sliding_window)
    assert config.rope.head_dim == head_dim
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.rope.kind == theirs.rope_parameters["rope_type"]


def experts_of(theirs: Any) -> MoEConfig | None:
    """What transformers' config object says about experts."""
    layers = sparse_layers(theirs) if theirs.model_type.endswith("_moe") else ()
    if not layers:
        return None
    return MoEConfig(
        num_experts=theirs.num_experts,
        experts_per_token=theirs.num_experts_per_tok,
        expert_size=theirs.moe_intermediate_size,
        normalize=theirs.norm_topk_prob,
        shared_expert_size=getattr(theirs, "shared_expert_intermediate_size", None),
        layers=layers,
    )
