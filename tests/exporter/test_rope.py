"""Rotary tables against transformers' functions and rotary module, over drawn parameters."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import PUBLISHED, mini, transformers_config
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.exporter import ConfigError, Rope, parse_config, rope_tables
from qwenport.exporter.rope import KINDS as ROPES

# The order of fp32 operations is transformers', so the numbers are too; one rounding is allowed.
ROUNDING = {"rtol": 2.0**-23, "atol": 0.0}

positive = {"allow_nan": False, "allow_infinity": False}
FACTORS = st.floats(1.0, 64.0, **positive)
KINDS = tuple(ROPES)


def frequencies(rope: Rope, length: int) -> tuple[torch.Tensor, float]:
    """What transformers' functions return."""
    return rope.inverse_frequencies(length), rope.attention_scaling()


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A value, or `...` for a key that is left out."""
    return st.just(...) | values


@st.composite
def rope_configs(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """A Llama config.json with drawn rope settings, in one of the three spellings."""
    kind = draw(st.sampled_from(kinds))
    head_dim = 2 * draw(st.integers(2, 128))
    maximum = draw(st.integers(64, 200_000))
    original = draw(st.integers(16, maximum))
    settings: dict[str, Any] = {}
    if kind != "default":
        settings["factor"] = draw(FACTORS)
    if kind == "yarn":
        settings |= {
            "original_max_position_embeddings": draw(optional(st.just(original))),
            "beta_fast": draw(optional(st.floats(2.0, 64.0) | st.integers(2, 64))),
            "beta_slow": draw(optional(st.floats(0.25, 2.0))),
            "mscale": draw(optional(st.floats(0.1, 2.0))),
            "mscale_all_dim": draw(optional(st.floats(0.1, 2.0))),
            "attention_factor": draw(optional(st.floats(0.25, 4.0))),
            "truncate": draw(optional(st.booleans())),
        }
    if kind == "llama3":
        low = draw(st.floats(0.5, 4.0))
        settings |= {
            "original_max_position_embeddings": original,
            "low_freq_factor": low,
            "high_freq_factor": low + draw(st.floats(0.5, 8.0)),
        }
    if kind == "longrope":
        extents = st.lists(st.floats(1.0, 60.0), min_size=head_dim // 2, max_size=head_dim // 2)
        settings |= {
            "original_max_position_embeddings": original,
            "factor": draw(optional(FACTORS)),
            "attention_factor": draw(optional(st.floats(0.25, 4.0))),
            "short_factor": draw(extents),
            "long_factor": draw(extents),
        }
    settings = {key: value for key, value in settings.items() if value is not ...}
    theta = draw(st.floats(100.0, 1e8, **positive) | st.sampled_from([10000.0, 1000000.0]))
    raw = mini("llama", head_dim=head_dim, max_position_embeddings=maximum)
    spelling = draw(st.sampled_from(["type", "rope_type", "rope_parameters"]))
    if spelling == "rope_parameters":
        del raw["rope_scaling"], raw["rope_theta"]
        raw["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **settings}
    else:
        raw["rope_theta"] = theta
        raw["rope_scaling"] = {spelling: kind, **settings}
    return raw


def theirs(raw: dict[str, Any], length: int) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers_config(raw)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)


def rows_of_theirs(raw: dict[str, Any], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of transformers' rotary module; its length is the last position's."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module = LlamaRotaryEmbedding(transformers_config(raw))
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.tensor([positions]))
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


@settings(max_examples=150)
@given(raw=rope_configs(), data=st.data())
def test_inverse_frequencies_are_transformers(raw: dict[str, Any], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 2 * raw["max_position_embeddings"]), label="length")
    inv_freq, scaling = frequencies(parse_config(copy.deepcopy(raw)).rope, length)
    expected, expected_scaling = theirs(raw, length)
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq, expected, **ROUNDING)
    assert scaling == pytest.approx(expected_scaling, rel=1e-12)


@given(
    raw=rope_configs(tuple(kind for kind in KINDS if kind != "dynamic")),
    length=st.integers(1, 3000),
    data=st.data(),
)
def test_table_rows_are_transformers_cos_and_sin(
    raw: dict[str, Any], length: int, data: st.DataObject
) -> None:
    cos, sin = rope_tables(parse_config(copy.deepcopy(raw)).rope, length)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (length, raw["head_dim"] // 2)
    some = data.draw(st.lists(st.integers(0, length - 1), max_size=8), label="positions")
    positions = [*some, 0, length - 1]
    expected_cos, expected_sin = rows_of_theirs(raw, positions)
    torch.testing.assert_close(cos[positions], expected_cos, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin[positions], expected_sin, rtol=1e-6, atol=1e-6)


@given(raw=rope_configs(("dynamic",)), over=st.floats(0.1, 4.0))
def test_a_dynamic_table_has_the_frequencies_of_its_stated_length(
    raw: dict[str, Any], over: float
) -> None:
    raw["max_position_embeddings"] = 256
    length = max(1, int(256 * over))
    cos, sin = rope_tables(parse_config(copy.deepcopy(raw)).rope, length)
    # transformers computes the base in fp32 when it grows while it runs, so angles differ a little
    expected_cos, expected_sin = rows_of_theirs(raw, list(range(length)))
    torch.testing.assert_close(cos, expected_cos, rtol=0, atol=1e-3)
    torch.testing.assert_close(sin, expected_sin, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name", [name for name, raw in PUBLISHED.items() if raw["model_type"] in ("qwen2", "llama")]
)
def test_published_models_have_transformers_frequencies(name: str) -> None:
    config = parse_config(copy.deepcopy(PUBLISHED[name]))
    inv_freq, scaling = frequencies(config.rope, config.max_context)
    expected, expected_scaling = theirs(PUBLISHED[name], config.max_context)
    torch.testing.assert_close(inv_freq, expected, **ROUNDING)
    assert scaling == expected_scaling


# --- YaRN as Qwen2.5's model card has it

CARD = PUBLISHED["qwen2.5-7b-instruct-yarn-128k"]
PLAIN = PUBLISHED["qwen2.5-7b-instruct"]


def test_yarn_table_reaches_factor_times_original_length() -> None:
    config = parse_config(copy.deepcopy(CARD))
    assert config.max_position_embeddings == 32768
    assert config.max_context == 4 * 32768
    cos, sin = rope_tables(config.rope, config.max_context)
    positions = [0, 1, 32767, 32768, 100_003, 4 * 32768 - 1]
    expected_cos, expected_sin = rows_of_theirs({**CARD, "model_type": "llama"}, positions)
    torch.testing.assert_close(cos[positions], expected_cos, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin[positions], expected_sin, rtol=1e-6, atol=1e-6)


def test_qwen_yarn_scales_cos_and_sin_by_its_attention_factor() -> None:
    rope = parse_config(copy.deepcopy(CARD)).rope
    _, scaling = frequencies(rope, 1)
    assert scaling == pytest.approx(0.1 * math.log(4) + 1, rel=1e-12)
    cos, sin = rope_tables(rope, 2)
    torch.testing.assert_close(cos[0], torch.full_like(cos[0], scaling))  # cos 0 = 1
    torch.testing.assert_close((cos**2 + sin**2), torch.full_like(cos, scaling**2))


def test_the_yarn_override_of_a_plain_config_is_the_card_s_config() -> None:
    overridden = parse_config(copy.deepcopy(PLAIN), "yarn:4")
    assert overridden == parse_config(copy.deepcopy(CARD))
    assert parse_config(copy.deepcopy(PLAIN)) != overridden


def test_a_config_whose_maximum_is_already_raised_is_not_raised_again() -> None:
    raised = {**CARD, "max_position_embeddings": 131072}
    assert parse_config(copy.deepcopy(raised)).max_context == 131072


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_an_override_scales_by_its_factor(kind: str) -> None:
    config = parse_config(copy.deepcopy(PLAIN), f"{kind}:2.5")
    raw = {**PLAIN, "rope_scaling": {"rope_type": kind, "factor": 2.5}}
    assert config.max_context == int(2.5 * 32768)
    inv_freq, _ = frequencies(config.rope, config.max_context)
    torch.testing.assert_close(inv_freq, theirs(raw, config.max_context)[0], **ROUNDING)


@pytest.mark.parametrize(
    "text",
    ["yarn", "yarn:", ":4", "yarn:0.5", "yarn:nan", "yarn:inf", "yarn:-4", "yarn:4:4", "llama3:8",
     "longrope:4", "default:1", "mystery:2", "", "yarn:x"],
)  # fmt: skip
def test_an_override_that_says_too_little_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(copy.deepcopy(PLAIN), text)


def test_an_override_of_a_config_that_scales_already_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_config(copy.deepcopy(CARD), "yarn:2")


# --- spellings


def test_spellings_that_agree_are_one_and_that_disagree_are_refused() -> None:
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 10000.0}
    only_old = parse_config(mini("qwen2", **old))
    only_new = parse_config(mini("qwen2", rope_theta=..., rope_parameters=new))
    assert only_old == only_new
    for change in (
        {"rope_theta": 20000.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ):
        with pytest.raises(ConfigError):
            parse_config(mini("qwen2", rope_parameters=new, **{**old, **change}))


def test_type_and_rope_type_that_disagree_are_refused() -> None:
    scaling = {"type": "linear", "rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ConfigError):
        parse_config(mini("qwen2", rope_scaling=scaling))
    scaling["type"] = "dynamic"
    assert parse_config(mini("qwen2", rope_scaling=scaling)).rope.kind == "dynamic"


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("linear", "factor"),
        ("dynamic", "factor"),
        ("llama3", "factor"),
        ("llama3", "low_freq_factor"),
        ("llama3", "high_freq_factor"),
        ("longrope", "short_factor"),
        ("longrope", "long_factor"),
    ],
)
def test_a_missing_rope_parameter_is_named(kind: str, key: str) -> None:
    scaling = complete(kind)
    parse_config(mini("llama", rope_scaling=copy.deepcopy(scaling)))
    del scaling[key]
    with pytest.raises(ConfigError, match=key):
        parse_config(mini("llama", rope_scaling=scaling))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_a_rope_parameter_that_the_kind_has_not_is_read_by_nobody(kind: str, spelling: str) -> None:
    """Neither by us nor by transformers: it is named, and changes nothing."""
    plain = mini("llama", rope_theta=..., rope_scaling=...)
    plain[spelling] = complete(kind)
    right, length = parse_config(copy.deepcopy(plain)), 40
    of_others = {key for each in KINDS for key in complete(each)} - ROPES[kind].keys
    for key in sorted(of_others - {"rope_type"} | {"finetuned", "mrope_section"}):
        value = next((complete(each)[key] for each in KINDS if key in complete(each)), True)
        raw = mini("llama", rope_theta=..., rope_scaling=...)
        raw[spelling] = {**complete(kind), key: value}
        theirs_now, theirs_plain = theirs(raw, length), theirs(plain, length)
        assert torch.equal(theirs_now[0], theirs_plain[0]) and theirs_now[1] == theirs_plain[1]
        assert parse_config(raw) == replace(right, unread_keys=(f"{spelling}.{key}",)), key


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("linear", {"factor": 0}),
        ("linear", {"factor": -2.0}),
        ("linear", {"factor": "2"}),
        ("linear", {"factor": float("inf")}),
        ("linear", {"factor": True}),
        ("yarn", {"factor": float("nan")}),
        ("yarn", {"original_max_position_embeddings": 0}),
        ("yarn", {"original_max_position_embeddings": "32"}),
        ("yarn", {"truncate": "no"}),
        ("yarn", {"beta_fast": -1.0}),
        ("llama3", {"low_freq_factor": 4.0, "high_freq_factor": 4.0}),
        ("llama3", {"high_freq_factor": 0}),
        ("longrope", {"short_factor": [1.0]}),
        ("longrope", {"long_factor": [1.0] * 9}),
        ("longrope", {"long_factor": 4.0}),
        ("longrope", {"long_factor": ["1"] * 8}),
        ("longrope", {"long_factor": [0.0] * 8}),
    ],
)
def test_a_rope_parameter_without_meaning_is_refused(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config(mini("llama", rope_scaling={**complete(kind), **changes}))


def test_a_yarn_without_a_factor_is_refused_as_by_transformers() -> None:
    scaling = {key: value for key, value in complete("yarn").items() if key != "factor"}
    raw = mini("llama", rope_scaling=scaling)
    with pytest.raises(KeyError):
        theirs(raw, 1)
    with pytest.raises(ConfigError, match="needs a factor"):
        parse_config(raw)


def test_yarn_with_a_null_factor_takes_the_ratio_of_its_lengths_as_transformers_does() -> None:
    raw = mini("llama", rope_scaling={**complete("yarn"), "factor": None})
    inv_freq, scaling = frequencies(parse_config(copy.deepcopy(raw)).rope, 1)
    expected, expected_scaling = theirs(raw, 1)
    torch.testing.assert_close(inv_freq, expected, **ROUNDING)
    assert scaling == pytest.approx(expected_scaling, rel=1e-12)


def complete(kind: str) -> dict[str, Any]:
    """Settings of a kind with all that it needs."""
    return {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 2.0},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "yarn": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        },
        "llama3": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "longrope": {
            "rope_type": "longrope",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    }[kind]


def test_an_original_length_beside_the_rope_settings_counts_as_in_transformers() -> None:
    raw = mini(
        "llama",
        original_max_position_embeddings=32,
        rope_scaling={
            key: value for key, value in complete("longrope").items() if "orig" not in key
        },
    )
    config = parse_config(copy.deepcopy(raw))
    for length in (32, 33):
        inv_freq, scaling = frequencies(config.rope, length)
        expected, expected_scaling = theirs(raw, length)
        torch.testing.assert_close(inv_freq, expected, **ROUNDING)
        assert scaling == pytest.approx(expected_scaling, rel=1e-12)


def test_only_the_kinds_that_transformers_updates_while_running_depend_on_length() -> None:
    for kind in KINDS:
        rope = parse_config(mini("llama", rope_scaling=complete(kind))).rope
        short, long = (frequencies(rope, length)[0] for length in (16, 128))
        assert rope.depends_on_length is not torch.equal(short, long)
