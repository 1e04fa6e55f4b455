"""config.json of published models, and of drawn ones, against transformers."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    MINI,
    PUBLISHED,
    bias_switches,
    config_fields,
    has_no_window,
    mini,
    published_spelling,
    single_experts,
    tensor_shapes,
    transformers_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from published import FAMILIES, assert_means_the_same

from qwenport.exporter import ConfigError, parse_config, read_config_json
from qwenport.exporter.expected import expected_tensors
from qwenport.exporter.families import FAMILIES as FAMILIES_HERE

# --- what is published


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_config_parses_to_transformers_numbers(name: str) -> None:
    raw = PUBLISHED[name]
    config = parse_config(copy.deepcopy(raw))
    assert_means_the_same(config, transformers_config(raw))
    assert config.dtype == "bf16"


def test_every_family_has_a_small_config_and_no_published_one_is_of_another() -> None:
    assert {raw["model_type"] for raw in PUBLISHED.values()} <= set(FAMILIES_HERE) == set(MINI)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_config_allows_the_context_that_its_card_states(name: str) -> None:
    raw = PUBLISHED[name]
    config = parse_config(copy.deepcopy(raw))
    chunks = raw.get("dual_chunk_attention_config")
    scaling = raw.get("rope_scaling") or {}
    if chunks:
        expected = raw["max_position_embeddings"]
        assert config.dual_chunk is not None and config.dual_chunk.plain_context == 262144
        assert config.context_note and "--max-seq-len 262144" in config.context_note
    elif scaling.get("type") == "yarn":
        expected = int(scaling["factor"] * scaling["original_max_position_embeddings"])
    else:
        expected = raw["max_position_embeddings"]
    assert config.max_context == expected


def test_dual_chunk_attention_with_scaled_rope_stops_where_it_is_plain() -> None:
    chunks = {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 32}
    config = parse_config(mini("qwen2", dual_chunk_attention_config=chunks), rope_scaling="yarn:4")
    assert (config.dual_chunk, config.max_context) == (None, 32)
    assert config.context_note and "yarn" in config.context_note


def test_dual_chunk_attention_does_not_raise_a_smaller_context() -> None:
    chunks = {"chunk_size": 512, "local_size": 128, "original_max_position_embeddings": 512}
    config = parse_config(mini("qwen2", dual_chunk_attention_config=chunks))
    assert config.max_context == MINI["qwen2"]["max_position_embeddings"]


@given(
    size=st.integers(1, 40), local=st.integers(0, 39), original=st.sampled_from([None, 0, 1, 20])
)
def test_dual_chunk_attention_is_plain_up_to_the_context(
    size: int, local: int, original: int | None
) -> None:
    if local >= size:
        local = size - 1
    chunks = {
        "chunk_size": size,
        "local_size": local,
        "original_max_position_embeddings": original,
    }
    longest = MINI["qwen2"]["max_position_embeddings"]
    raw = mini("qwen2", dual_chunk_attention_config=chunks)
    whole = parse_config(raw)
    context = longest if whole.dual_chunk is None else whole.dual_chunk.plain_context
    assert whole.max_context == longest
    assert parse_config(raw, max_seq_len=context).dual_chunk is None
    if context < longest:
        assert parse_config(raw, max_seq_len=context + 1).dual_chunk == whole.dual_chunk
    assert all(
        dual_chunk_distance(query, key, size, size - local) == query - key
        for query in range(context)
        for key in range(query + 1)
    )
    assert context <= (original or context)
    if context < longest and context != original:
        further = [
            dual_chunk_distance(query, key, size, size - local) - (query - key)
            for query in range(context + 2)
            for key in range(query + 1)
        ]
        assert any(further), "it is plain further than the context reaches"


def dual_chunk_distance(query: int, key: int, size: int, c: int) -> int:
    """The rotation between a query and a key in vLLM's dual_chunk_flash_attn, from their positions."""
    apart = query // c - key // c
    turned = (query % c, min(query % c + c, size), min(2 * c - 1, size))[min(apart, 2)]
    return turned - key % c


def test_kv_bytes_of_a_token_count_keys_and_values_of_every_layer() -> None:
    config = parse_config(mini("llama", num_hidden_layers=3, num_key_value_heads=2, head_dim=8))
    assert config.kv_bytes_per_token(2) == 2 * 3 * 2 * 8 * 2


# --- against transformers


@st.composite
def drawn_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of transformers' config classes, any sizes that are a model."""
    family = draw(st.sampled_from(sorted(MINI)))
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(1, 16))
    layers = draw(st.integers(1, 3))
    keywords: dict[str, Any] = {
        "vocab_size": draw(st.integers(3, 99)),
        "intermediate_size": draw(st.integers(1, 99)),
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 3e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": draw(st.integers(1, 10**6)),
        "initializer_range": 0.03,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": draw(st.floats(2, 1e8, allow_nan=False)),
        },
    }
    keywords |= {key: draw(st.booleans()) for key in bias_switches(family)}
    if "use_sliding_window" in config_fields(family):  # false unless it is stated
        keywords["sliding_window"] = draw(st.sampled_from([None, 7, 4096]))
        keywords["max_window_layers"] = draw(st.integers(0, 4))
        if draw(st.booleans()):
            keywords["head_dim"] = draw(st.sampled_from([2, 24, 64]))
    else:
        keywords["head_dim"] = draw(st.sampled_from([None, 2, 24, 64]))
        if not has_no_window(family):
            keywords["sliding_window"] = draw(st.sampled_from([None, 10**6]))
    if family.endswith("_moe"):
        keywords |= draw(drawn_experts(family, layers))
    return {"model_type": family, **keywords}


@st.composite
def drawn_experts(draw: st.DrawFn, family: str, layers: int) -> dict[str, Any]:
    """The same of a mixture of experts' own arguments."""
    experts = draw(st.integers(0, 5))
    keywords: dict[str, Any] = {
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, max(1, experts))),
        "moe_intermediate_size": draw(st.integers(1, 99)),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 4)),
        "mlp_only_layers": draw(
            st.none() | st.lists(st.integers(0, layers - 1), max_size=3, unique=True)
        ),
        "router_aux_loss_coef": 0.002,
    }
    if family == "qwen2_moe":
        keywords["shared_expert_intermediate_size"] = draw(st.integers(1, 99))
    return keywords


def saved_by_transformers(keywords: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    keywords = copy.deepcopy(keywords)
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(keywords.pop("model_type"), **keywords).save_pretrained(folder)
        return read_config_json(Path(folder))


@given(drawn_configs())
def test_what_transformers_saves_parses_to_its_numbers(keywords: dict[str, Any]) -> None:
    raw = saved_by_transformers(keywords)
    config = parse_config(copy.deepcopy(raw))
    assert_means_the_same(config, transformers_config(raw))
    assert config.max_context == keywords["max_position_embeddings"]


@given(drawn_configs())
def test_both_spellings_of_a_config_parse_to_the_same(keywords: dict[str, Any]) -> None:
    raw = saved_by_transformers(keywords)
    assert parse_config(published_spelling(raw)) == parse_config(raw)


@settings(max_examples=15)
@given(drawn_configs())
def test_the_tensors_asked_for_are_those_that_transformers_has(keywords: dict[str, Any]) -> None:
    raw = saved_by_transformers(keywords)
    config, stacked = parse_config(copy.deepcopy(raw)), tensor_shapes(raw, stacked=True)
    assert expected_tensors(config) == tensor_shapes(raw)
    assert expected_tensors(config, stacked) == stacked


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_tensors_of_a_published_config_are_those_that_transformers_has(name: str) -> None:
    config = parse_config(copy.deepcopy(PUBLISHED[name]))
    stacked = tensor_shapes(PUBLISHED[name], stacked=True)
    assert expected_tensors(config) == single_experts(stacked)
    assert expected_tensors(config, stacked) == stacked


@pytest.mark.parametrize(
    ("family", "key"),
    [
        (family, key)
        for family in sorted(MINI)
        for key in sorted(MINI[family].keys() - {"model_type"})
    ],
)
def test_a_config_with_a_key_left_out_parses_as_transformers_or_not_at_all(
    family: str, key: str
) -> None:
    raw = mini(family, **{key: ...})
    try:
        config = parse_config(copy.deepcopy(raw))
    except ConfigError:
        return
    assert_means_the_same(config, transformers_config(raw))


@FAMILIES
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
        "model_type",
    ],
)
def test_a_missing_size_is_named(family: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config(mini(family, **{key: ...}))
