"""What would change the mathematics is refused by name, and so is what is no config.json."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    MINI,
    mini,
    tensor_shapes,
    transformers_config,
)
from hypothesis import given
from hypothesis import strategies as st
from published import FAMILIES, assert_means_the_same

from qwenport.exporter import ConfigError, parse_config, read_config_json
from qwenport.exporter.expected import expected_tensors

# --- every field that changes the mathematics


@FAMILIES
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu2", "", None, 3])
def test_another_activation_is_refused(family: str, activation: object) -> None:
    with pytest.raises(ConfigError, match="hidden_act"):
        parse_config(mini(family, hidden_act=activation))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["full_attention", "chunked_attention"]),
        ("is_encoder_decoder", True),
        ("rope_scaling", {"type": "mrope", "mrope_section": [1, 1, 2]}),
        ("rope_scaling", {"type": "su", "factor": 2.0}),
        ("rope_scaling", {"rope_type": 0}),
        ("rope_scaling", {"type": ""}),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_type": [], "rope_theta": 1.0e4}),
    ],
)
@FAMILIES
def test_a_setting_that_changes_the_maths_is_refused(family: str, key: str, value: object) -> None:
    raw = mini(family, **{key: value})
    if key == "rope_parameters":
        raw = mini(family, rope_theta=..., rope_scaling=..., rope_parameters=value)
    if key == "layer_types":
        raw["num_hidden_layers"] = 2  # no fault but the one
        raw.pop("mlp_only_layers", None)
    with pytest.raises(ConfigError):
        parse_config(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", None),
        ("partial_rotary_factor", 1.0),
        ("layer_types", ["full_attention", "full_attention"]),
        ("mlp_only_layers", None),
        ("rope_scaling", None),
    ],
)
@FAMILIES
def test_a_setting_at_its_neutral_value_changes_nothing(
    family: str, key: str, value: object
) -> None:
    base = mini(family, num_hidden_layers=2, mlp_only_layers=...)
    made = parse_config({**base, key: value})
    assert replace(made, unread_keys=()) == parse_config(base)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@given(
    use=st.booleans(),
    window=st.sampled_from([None, 1, 16, 64, 4096]),
    first=st.sampled_from([..., 0, 1, 2, 3, 28]),
)
def test_a_sliding_window_is_refused_where_transformers_would_use_it(
    family: str, use: bool, window: int | None, first: Any
) -> None:
    raw = mini(family, use_sliding_window=use, sliding_window=window, max_window_layers=first)
    theirs = transformers_config(raw)
    slides = "sliding_attention" in theirs.layer_types
    short = window is not None and window < raw["max_position_embeddings"]
    if slides and short:
        with pytest.raises(ConfigError, match="sliding"):
            parse_config(raw)
    elif not use:
        assert parse_config(raw) == parse_config(mini(family))


@given(attention=st.booleans(), mlp=st.booleans())
def test_llama_bias_switches_are_honoured(attention: bool, mlp: bool) -> None:
    raw = mini("llama", attention_bias=attention, mlp_bias=mlp)
    config = parse_config(raw)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (attention, attention, mlp)
    assert expected_tensors(config) == tensor_shapes(raw)


CHUNKS = {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"dual_chunk_attention_config": {**CHUNKS, "chunk_size": None}}, "chunk_size"),
        ({"dual_chunk_attention_config": {**CHUNKS, "chunk_size": True}}, "chunk_size"),
        ({"dual_chunk_attention_config": {**CHUNKS, "local_size": 8.0}}, "local_size"),
        (
            {"dual_chunk_attention_config": {**CHUNKS, "local_size": -1}},
            "an integer from 0 to 4194304",
        ),
        ({"dual_chunk_attention_config": {**CHUNKS, "local_size": 32}}, "must exceed"),
        ({"dual_chunk_attention_config": {**CHUNKS, "chunk_size": 1 << 40}}, "from 1 to 4194304"),
        (
            {"dual_chunk_attention_config": {**CHUNKS, "original_max_position_embeddings": -1}},
            "original_max_position_embeddings",
        ),
        ({"dual_chunk_attention_config": {**CHUNKS, "critical_size": 3}}, "critical_size"),
        ({"dual_chunk_attention_config": [48, 16]}, "dual_chunk_attention_config"),
    ],
)
def test_dual_chunk_settings_that_are_not_understood_are_refused(
    settings: dict[str, Any], what: str
) -> None:
    parse_config(mini("qwen2", dual_chunk_attention_config=CHUNKS))
    with pytest.raises(ConfigError, match=what):
        parse_config(mini("qwen2", **settings))


def test_tensor_parallel_slices_of_pretraining_are_refused() -> None:
    with pytest.raises(ConfigError, match="pretraining_tp"):
        parse_config(mini("llama", pretraining_tp=2))


def test_qwen2_always_has_biases_on_q_k_v_and_nowhere_else() -> None:
    config = parse_config(mini("qwen2"))
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)


@FAMILIES
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_read_not_assumed(family: str, tied: bool) -> None:
    assert parse_config(mini(family, tie_word_embeddings=tied)).tie_word_embeddings is tied


@FAMILIES
def test_head_dim_is_taken_as_stated_or_else_derived(family: str) -> None:
    stated = parse_config(mini(family, head_dim=20))
    assert stated.head_dim == stated.rope.head_dim == 20
    raw = mini(family, head_dim=...)
    assert_means_the_same(parse_config(copy.deepcopy(raw)), transformers_config(raw))


@FAMILIES
@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"vocab_size": 0},
        {"vocab_size": -48},
        {"vocab_size": "48"},
        {"vocab_size": 48.5},
        {"num_hidden_layers": True},
        {"num_hidden_layers": None},
        {"rms_norm_eps": "1e-6"},
        {"rms_norm_eps": -1e-6},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"tie_word_embeddings": "false"},
        {"rope_theta": 0},
        {"rope_theta": float("nan")},
        {"rope_theta": "10000"},
        {"model_type": None},
        {"model_type": ["qwen2"]},
        {"torch_dtype": "float64"},
        {"torch_dtype": "int8"},
        {"torch_dtype": []},
        {"torch_dtype": {}},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
    ],
    ids=str,
)
def test_a_value_that_makes_no_model_is_refused(family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config(mini(family, **changes))


@pytest.mark.parametrize(
    ("stated", "dtype"),
    [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), (None, None), (..., None)],
)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_stated_dtype_is_read_in_either_spelling(key: str, stated: Any, dtype: Any) -> None:
    raw = mini("qwen2", torch_dtype=...)
    if stated is not ...:
        raw[key] = stated
    assert parse_config(raw).dtype == dtype


@given(
    raw=st.builds(
        lambda family, changes: {**mini(family), **changes},
        st.sampled_from(sorted(MINI)),
        st.dictionaries(
            st.sampled_from(sorted({"layer_types", "num_local_experts"}.union(*MINI.values()))),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=2)
                    | st.dictionaries(
                        st.sampled_from(["type", "rope_type", "factor", "x"]), inner, max_size=2
                    )
                ),
                max_leaves=4,
            ),
            min_size=1,
            max_size=3,
        ),
    )
)
def test_nonsense_is_refused_with_a_config_error_and_nothing_else(raw: dict[str, Any]) -> None:
    try:
        config = parse_config(raw)
    except ConfigError:
        return
    json.dumps(config.num_hidden_layers)
    assert config.head_dim > 0 and config.max_context > 0


# --- config.json itself


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"qwen2"', b"\xff\xfe{}", b"[" * 100_000]
)
def test_a_broken_config_json_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config_json(tmp_path)


def test_a_missing_config_json_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config_json(tmp_path)
