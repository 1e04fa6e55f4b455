"""config.json: what is accepted means what transformers means by it; the rest is refused by name."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    MINI,
    PUBLISHED,
    meta_model,
    mini,
    published_spelling,
    single_experts,
    sparse_layers,
    tensor_shapes,
    transformers_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.exporter import ConfigError, ModelConfig, parse_config, read_config_json
from qwenport.exporter.checkpoint import expected_tensors
from qwenport.exporter.families import FAMILIES as FAMILIES_HERE
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
        expected = chunks["chunk_size"] - chunks["local_size"]
        assert config.context_note
    elif scaling.get("type") == "yarn":
        expected = int(scaling["factor"] * scaling["original_max_position_embeddings"])
    else:
        expected = raw["max_position_embeddings"]
    assert config.max_context == expected


def test_dual_chunk_attention_does_not_raise_a_smaller_context() -> None:
    chunks = {"chunk_size": 512, "local_size": 128, "original_max_position_embeddings": 512}
    config = parse_config(mini("qwen2", dual_chunk_attention_config=chunks))
    assert config.max_context == MINI["qwen2"]["max_position_embeddings"]


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
    if family in ("llama", "qwen3", "qwen3_moe"):
        keywords["attention_bias"] = draw(st.booleans())
    if family == "llama":
        keywords["mlp_bias"] = draw(st.booleans())
        keywords["head_dim"] = draw(st.sampled_from([None, 2, 24, 64]))
    elif family == "mistral":
        keywords["sliding_window"] = draw(st.sampled_from([None, 10**6]))
        keywords["head_dim"] = draw(st.sampled_from([None, 2, 24, 64]))
    else:
        keywords["sliding_window"] = draw(st.sampled_from([None, 7, 4096]))
        keywords["max_window_layers"] = draw(st.integers(0, 4))
        if draw(st.booleans()):
            keywords["head_dim"] = draw(st.sampled_from([2, 24, 64]))
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
        keywords["qkv_bias"] = draw(st.booleans())
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
