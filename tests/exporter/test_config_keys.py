"""Every key of a config.json is honoured, neutral, refused or read by nobody; transformers' source says which."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from checkpoints import MINI, has_no_window, meta_model, mini, transformers_config
from hypothesis import given
from hypothesis import strategies as st
from test_config import assert_means_the_same
from transformers_reads import keys_read, names_of_class

from qwenport.exporter import ConfigError, config, parse_config
from qwenport.exporter.families import FAMILIES
from qwenport.exporter.keys import MOST, NEUTRAL, OF_CLASS, ONLY, Keys

EVERY = pytest.mark.parametrize("family", sorted(FAMILIES))

# What fine-tuning tools and other runtimes write, and transformers' code for these models never reads.
OF_TOOLS: dict[str, Any] = {
    "unsloth_fixed": True,
    "unsloth_version": "2025.3.1",
    "pruned_heads": {},
    "model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "ep_size": 1,
    "use_bfloat16": True,
    "add_cross_attention": False,
    "logit_softcapping": 30.0,
    "_flash_attn_2_enabled": True,
}


@EVERY
def test_whatever_transformers_reads_is_classified(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails after an update of transformers, read what it does with the key, then honour or refuse it."""
    made: list[Keys] = []

    class Noted(Keys):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(config, "Keys", Noted)
    parse_config(mini(family))
    known = made[0].taken | NEUTRAL | ONLY.keys()
    if has_no_window(
        family
    ):  # shared code reads the key; test_windows.py shows that it changes nothing
        known |= {"sliding_window"}
    assert keys_read(family) - known == set()


@EVERY
def test_a_key_that_replaces_what_the_config_class_is_made_of_is_refused(family: str) -> None:
    """`attribute_map` renames other keys, for example; all such names are of the class itself."""
    names = names_of_class(family) - NEUTRAL - ONLY.keys() - {"rope_scaling"}
    assert names and names <= OF_CLASS
    for name in names:
        with pytest.raises(ConfigError, match=name):
            parse_config(mini(family, **{name: {}}))


def test_renamed_keys_are_not_exported_as_what_they_were() -> None:
    raw = mini("llama", attribute_map={"rms_norm_eps": "router_aux_loss_coef"})
    raw["router_aux_loss_coef"] = 0.5
    assert transformers_config(raw).rms_norm_eps == 0.5
    with pytest.raises(ConfigError, match="attribute_map"):
        parse_config(raw)


@EVERY
def test_the_walk_finds_what_the_families_are_known_to_read(family: str) -> None:
    read = keys_read(family)
    assert {"hidden_size", "is_causal", "attention_chunk_size", "rope_parameters"} <= read
    assert {"text_config", "decoder", "text_encoder"} <= read  # by names in a loop
    assert ("num_experts_per_tok" in read) is FAMILIES[family].sparse
    assert "logit_softcapping" not in read


@EVERY
@pytest.mark.parametrize("key", sorted(ONLY))
def test_a_key_that_is_read_and_not_honoured_is_refused_unless_it_changes_nothing(
    family: str, key: str
) -> None:
    plain = parse_config(mini(family))
    for value in ONLY[key]:
        if key != "partial_rotary_factor" or value is not None:
            assert parse_config(mini(family, **{key: value})) == plain
    for value in (False, True, 0, 7, "x", {"a": 1}, [1]):
        if not any(value == each and type(value) is type(each) for each in ONLY[key]):
            with pytest.raises(ConfigError, match=key):
                parse_config(mini(family, **{key: value}))


@EVERY
def test_is_causal_null_is_refused_because_transformers_takes_it_for_false(family: str) -> None:
    with pytest.raises(ConfigError, match="is_causal null"):
        parse_config(mini(family, is_causal=None))


@EVERY
@given(keys=st.sets(st.sampled_from(sorted(OF_TOOLS)), min_size=1))
def test_a_key_that_nobody_reads_is_accepted_and_named(family: str, keys: set[str]) -> None:
    made = parse_config(mini(family, **{key: OF_TOOLS[key] for key in keys}))
    assert made.unread_keys == tuple(sorted(keys))
    assert parse_config(mini(family)).unread_keys == ()


@EVERY
def test_auto_map_asks_for_code_unless_it_is_null(family: str) -> None:
    assert parse_config(mini(family, auto_map=None)) == parse_config(mini(family))
    with pytest.raises(ConfigError, match="remote code"):
        parse_config(mini(family, auto_map={"AutoModel": "modeling.Mine"}))


@pytest.mark.parametrize(
    ("family", "key"),
    [(f, key) for f in sorted(MINI) for key in sorted(MINI[f].keys() - NEUTRAL)],
)
def test_null_means_what_transformers_makes_of_it(family: str, key: str) -> None:
    raw = mini(family, **{key: None})
    try:
        theirs = transformers_config(raw)
        meta_model(theirs)
    except Exception:
        with pytest.raises(ConfigError):
            parse_config(copy.deepcopy(raw))
        return
    assert_means_the_same(parse_config(copy.deepcopy(raw)), theirs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_null_key_value_heads_are_one_for_each_query_head(family: str) -> None:
    made = parse_config(mini(family, num_key_value_heads=None))
    assert made.num_key_value_heads == made.num_attention_heads


@EVERY
def test_the_defaults_of_a_family_are_those_of_transformers_config_class(family: str) -> None:
    from transformers import CONFIG_MAPPING

    fields = CONFIG_MAPPING[family].__dataclass_fields__
    stated = {
        key: FAMILIES[family].defaults[key] for key in FAMILIES[family].defaults if key in fields
    }
    assert stated == {key: fields[key].default for key in stated}
    assert FAMILIES[family].defaults["rope_theta"] == CONFIG_MAPPING[family].default_theta
    # the rest are keys that the class does not declare and its modelling code reads with a default
    assert FAMILIES[family].defaults.keys() - stated.keys() <= {
        "head_dim",
        "sliding_window",
        "rope_theta",
    }


@EVERY
@given(data=st.data())
def test_a_size_that_no_model_has_is_refused_at_once(family: str, data: st.DataObject) -> None:
    sizes = [
        key for key, value in MINI[family].items() if type(value) is int and "token_id" not in key
    ]
    key = data.draw(
        st.sampled_from(
            sorted(set(sizes) - {"sliding_window", "max_window_layers", "pretraining_tp"})
        )
    )
    huge = data.draw(st.integers(MOST.get(key, 1 << 20) + 1, 10**400))
    with pytest.raises(ConfigError, match=key):
        parse_config(mini(family, **{key: huge}))


def test_experts_that_would_take_minutes_to_enumerate_are_refused() -> None:
    raw = mini("qwen3_moe", num_hidden_layers=1000, num_experts=8000)
    with pytest.raises(ConfigError, match="experts"):
        parse_config(raw)


@pytest.mark.parametrize("window", [63, 64, 65, None, ...])
def test_a_window_of_mistral_must_not_be_smaller_than_the_context(window: Any) -> None:
    raw = mini("mistral", sliding_window=window)
    if window == 63:
        with pytest.raises(ConfigError, match="sliding_window 63 is smaller"):
            parse_config(raw)
    else:
        parse_config(raw)
    with pytest.raises(ConfigError, match="sliding_window 4096"):
        parse_config(mini("mistral", sliding_window=..., max_position_embeddings=4097))


@given(
    theta=st.sampled_from([1e4, 1e6]),
    outer=st.booleans(),
    kind=st.sampled_from(["default", "linear"]),
    other=st.sampled_from([None, "rope_theta", "factor", "rope_type"]),
)
def test_two_spellings_of_rope_settings_must_agree(
    theta: float, outer: bool, kind: str, other: str | None
) -> None:
    one: dict[str, Any] = {"type": kind, "rope_theta": theta}
    two: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind == "linear":
        one["factor"] = two["factor"] = 2.0
    changed = {
        "rope_theta": 2e4,
        "factor": 4.0,
        "rope_type": "linear" if kind == "default" else "default",
    }
    raw = mini("llama", rope_theta=theta if outer else ..., rope_scaling=one, rope_parameters=two)
    if other is None:
        alone = mini("llama", rope_theta=..., rope_scaling=..., rope_parameters=two)
        assert parse_config(copy.deepcopy(raw)).rope == parse_config(alone).rope
        return
    two[other] = changed[other]
    with pytest.raises(ConfigError):
        parse_config(raw)
