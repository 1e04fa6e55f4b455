"""config.json of a mixture of experts: which layers have experts, and what is refused about them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from checkpoints import (
    MINI,
    meta_model,
    mini,
    single_experts,
    sparse_layers,
    tensor_shapes,
    transformers_config,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers_reads import keys_read

from qwenport.exporter import ConfigError, parse_config
from qwenport.exporter.expected import expected_tensors, expert_parts
from qwenport.exporter.families import FAMILIES as EVERY_FAMILY

MOE_TYPES = tuple(name for name, family in EVERY_FAMILY.items() if family.sparse)

MOE = pytest.mark.parametrize("family", MOE_TYPES)
DENSE = pytest.mark.parametrize("family", sorted(MINI.keys() - set(MOE_TYPES)))


def refusal(raw: dict[str, Any]) -> str:
    """What is said about a config that must be refused."""
    with pytest.raises(ConfigError) as error:
        parse_config(copy.deepcopy(raw))
    return str(error.value)


# --- which layers have experts


@given(
    family=st.sampled_from(MOE_TYPES),
    layers=st.integers(1, 7),
    step=st.integers(1, 8) | st.just(...),
    experts=st.integers(0, 4),
    data=st.data(),
)
def test_the_layers_with_experts_are_those_of_transformers_model(
    family: str, layers: int, step: Any, experts: int, data: st.DataObject
) -> None:
    dense = data.draw(
        st.sampled_from([None, ...]) | st.lists(st.integers(0, layers - 1), max_size=layers)
    )
    raw = mini(
        family,
        num_hidden_layers=layers,
        decoder_sparse_step=step,
        mlp_only_layers=dense,
        num_experts=experts,
        num_experts_per_tok=max(1, experts),
        max_window_layers=...,
    )
    config = parse_config(copy.deepcopy(raw))
    expected = sparse_layers(transformers_config(raw))
    assert (config.moe.layers if config.moe else ()) == expected
    with_experts = [i for i in range(layers) if config.moe_of(i) is not None]
    assert tuple(with_experts) == expected
    assert expected_tensors(config) == tensor_shapes(raw)


@MOE
@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 0},
        {"decoder_sparse_step": 9},
        {"mlp_only_layers": [2, 1, 0], "num_hidden_layers": 3},
    ],
    ids=str,
)
def test_without_a_sparse_layer_a_mixture_is_a_dense_model(
    family: str, changes: dict[str, Any]
) -> None:
    raw = mini(family, **changes)
    config = parse_config(copy.deepcopy(raw))
    assert config.moe is None
    assert not any("expert" in name for name in expected_tensors(config))
    assert expected_tensors(config) == tensor_shapes(raw)


@DENSE
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("num_experts_per_tok", 2),
        ("moe_intermediate_size", 24),
        ("shared_expert_intermediate_size", 24),
        ("decoder_sparse_step", 1),
        ("mlp_only_layers", [0]),
        ("norm_topk_prob", True),
    ],
)
def test_a_key_of_a_mixture_in_a_dense_model_is_read_by_nobody(
    family: str, key: str, value: object
) -> None:
    assert key not in keys_read(family)
    raw = mini(family, **{key: value})
    assert parse_config(raw) == replace(parse_config(mini(family)), unread_keys=(key,))
    assert expected_tensors(parse_config(raw)) == tensor_shapes(raw)


# --- tensors


@MOE
def test_a_stack_s_single_experts_are_named_gate_before_up_expert_by_expert(family: str) -> None:
    raw = mini(family)
    stacked = tensor_shapes(raw, stacked=True)
    stacks = {name: shape for name, shape in stacked.items() if name not in tensor_shapes(raw)}
    assert {name.rpartition(".")[2] for name in stacks} == {"gate_up_proj", "down_proj"}
    for name, shape in stacks.items():
        # the order of a dict is the order of the rows
        assert expert_parts(name, raw["num_experts"]) == list(single_experts({name: shape}))


@MOE
def test_each_layer_s_experts_may_be_stacked_or_single(family: str) -> None:
    raw = mini(family)
    config = parse_config(copy.deepcopy(raw))
    stacked = tensor_shapes(raw, stacked=True)
    of_first = {n: s for n, s in stacked.items() if n.startswith("model.layers.0.")}
    rest = {n: s for n, s in tensor_shapes(raw).items() if not n.startswith("model.layers.0.")}
    assert expected_tensors(config, of_first) == of_first | rest


@pytest.mark.parametrize("bias", [True, False, ...])
def test_qwen2_moe_s_bias_switch_is_honoured(bias: Any) -> None:
    raw = mini("qwen2_moe", qkv_bias=bias)
    config = parse_config(copy.deepcopy(raw))
    stated = bias is not False
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (stated, False, False)
    assert expected_tensors(config) == tensor_shapes(raw)


@pytest.mark.parametrize("bias", [True, False, ...])
def test_qwen3_moe_s_bias_switch_is_honoured(bias: Any) -> None:
    raw = mini("qwen3_moe", attention_bias=bias)
    config = parse_config(copy.deepcopy(raw))
    stated = bias is True
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (stated, stated, False)
    assert expected_tensors(config) == tensor_shapes(raw)


@MOE
def test_queries_and_keys_are_normalized_where_transformers_has_the_weights(family: str) -> None:
    raw = mini(family)
    has = any("q_norm" in name for name in meta_model(transformers_config(raw)).state_dict())
    assert parse_config(raw).qk_norm is has


# --- how many experts


def test_qwen3_moe_s_number_of_experts_has_two_spellings() -> None:
    raw = mini("qwen3_moe")
    count = raw["num_experts"]
    for spelled in (
        {"num_experts": ..., "num_local_experts": count},
        {"num_experts": count, "num_local_experts": count},
    ):
        changed = mini("qwen3_moe", **spelled)
        assert transformers_config(changed).num_experts == count
        assert parse_config(changed) == parse_config(raw)


def test_two_spellings_that_disagree_are_refused_by_name() -> None:
    said = refusal(mini("qwen3_moe", num_local_experts=6))
    assert "num_experts" in said and "num_local_experts" in said


def test_qwen2_moe_has_one_spelling() -> None:
    count = mini("qwen2_moe")["num_experts"]
    assert "num_local_experts" not in keys_read("qwen2_moe")
    twice = parse_config(mini("qwen2_moe", num_local_experts=count + 1))
    assert twice.moe == parse_config(mini("qwen2_moe")).moe
    assert twice.unread_keys == ("num_local_experts",)
    said = refusal(mini("qwen2_moe", num_experts=..., num_local_experts=count))
    assert "num_experts" in said


@given(family=st.sampled_from(MOE_TYPES), experts=st.integers(0, 5), chosen=st.integers(0, 7))
def test_a_token_goes_to_one_expert_at_least_and_to_no_more_than_there_are(
    family: str, experts: int, chosen: int
) -> None:
    raw = mini(family, num_experts=experts, num_experts_per_tok=chosen)
    if chosen > experts > 0:
        said = refusal(raw)
        assert f"num_experts_per_tok {chosen}" in said and f"num_experts {experts}" in said
    elif chosen == 0:
        assert "num_experts_per_tok" in refusal(raw)
    else:
        config = parse_config(raw)
        assert (config.moe.experts_per_token if config.moe else None) == (
            chosen if experts else None
        )


# --- values that make no mixture


@MOE
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num_experts", [..., None, -1, "6", 6.0, True, [6]]),
        ("num_experts_per_tok", [..., None, 0, -1, "2", 2.0, True]),
        ("moe_intermediate_size", [..., None, 0, -24, "24", 24.0]),
        ("norm_topk_prob", ["true", 1, 0.5]),
        ("decoder_sparse_step", [0, -1, "1", 1.5, True]),
        ("mlp_only_layers", [[-1], [3], [0, 99], [1.0], ["1"], [True], [None], [[0]], "0", 0, {}]),
    ],
)
def test_a_value_that_makes_no_mixture_is_refused_by_name(
    family: str, key: str, values: list[Any]
) -> None:
    for value in values:
        said = refusal(mini(family, num_hidden_layers=3, **{key: value}))
        assert key in said, (value, said)


@pytest.mark.parametrize("value", [..., None, 0, -28, "28", 28.0])
def test_a_shared_expert_of_no_size_is_refused_by_name(value: Any) -> None:
    raw = mini("qwen2_moe", shared_expert_intermediate_size=value)
    assert "shared_expert_intermediate_size" in refusal(raw)


def test_qwen3_moe_has_no_shared_expert_whatever_config_json_says() -> None:
    raw = mini("qwen3_moe", shared_expert_intermediate_size=28)
    config = parse_config(raw)
    assert config.moe is not None and config.moe.shared_expert_size is None
    assert config.unread_keys == ("shared_expert_intermediate_size",)
    assert expected_tensors(config) == tensor_shapes(raw)


# --- what is not implemented


@MOE
@given(window=st.sampled_from([..., None, 1, 16, 4096]), first=st.sampled_from([..., 0, 1, 28]))
def test_a_sliding_window_in_use_is_refused(family: str, window: Any, first: Any) -> None:
    changes = {"sliding_window": window, "max_window_layers": first}
    assert "sliding" in refusal(mini(family, use_sliding_window=True, **changes))
    unused = mini(family, use_sliding_window=False, **changes)
    assert parse_config(unused) == parse_config(mini(family))


@MOE
@pytest.mark.parametrize("use", [True, False, ...])
@pytest.mark.parametrize("place", [0, -1])
def test_a_layer_that_slides_is_refused(family: str, use: Any, place: int) -> None:
    raw = mini(family, use_sliding_window=use)
    raw["layer_types"] = ["full_attention"] * raw["num_hidden_layers"]
    raw["layer_types"][place] = "sliding_attention"
    assert "sliding" in refusal(raw)


@MOE
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "sigmoid"),
        ("score_function", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("n_group", 4),
        ("topk_group", 2),
        ("router_jitter_noise", 0.1),
        ("routed_scaling_factor", 2.5),
        ("norm_topk_eps", 1e-20),
        ("use_routing_bias", True),
        ("use_grouped_topk", True),
        ("expert_capacity", 64),
        ("first_k_dense_replace", 1),
        ("moe_layer_freq", 2),
        ("n_routed_experts", 6),
        ("n_shared_experts", 1),
        ("num_shared_experts", 1),
        ("swiglu_limit", 7.0),
        ("mlp_bias", True),
    ],
)
def test_another_kind_of_routing_or_of_experts_is_refused_if_transformers_reads_it(
    family: str, key: str, value: object
) -> None:
    raw = mini(family, **{key: value})
    if key in keys_read(family):
        assert key in refusal(raw)
    else:  # transformers computes what it computes without the key, and so do we
        expected = replace(parse_config(mini(family)), unread_keys=(key,))
        assert parse_config(raw) == expected


@pytest.mark.parametrize(
    ("family", "key"), [("qwen2_moe", "attention_bias"), ("qwen3_moe", "qkv_bias")]
)
def test_the_other_family_s_bias_switch_is_read_by_nobody(family: str, key: str) -> None:
    assert key not in keys_read(family)
    raw = mini(family, **{key: True})
    assert parse_config(raw) == replace(parse_config(mini(family)), unread_keys=(key,))
    assert expected_tensors(parse_config(raw)) == tensor_shapes(raw)
