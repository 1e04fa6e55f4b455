"""What a budget means for a model of a given size: sizes that fit the target, and grow with the budget."""

from __future__ import annotations

import itertools
from typing import Any

import checkpoints
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.contract import SPAN_MULTIPLE
from qwenport.engines.spans import Spans
from qwenport.exporter import ModelConfig, parse_config
from qwenport.validate import ValidationError
from qwenport.validate.budget import (
    BUDGETS,
    MOST_LOGITS,
    SMALL_MODEL,
    WIDE_BATCH_TOKENS,
    Plan,
    make_plan,
    parameters_per_token,
)

QUICK_FIRST = ("quick", "standard", "thorough")
CONFIGS = [parse_config(raw) for raw in checkpoints.PUBLISHED.values()]
CONFIGS += [parse_config(checkpoints.mini(kind)) for kind in checkpoints.MINI]


@st.composite
def limits(draw: st.DrawFn) -> dict[str, Any]:
    capacity = draw(st.integers(1, 10) | st.integers(1, 600) | st.integers(1, 200_000))
    return {
        "config": draw(st.sampled_from(CONFIGS)),
        "seed": draw(st.integers(0, 2**32)),
        "rows": draw(st.integers(1, 64)),
        "capacity": capacity,
        "max_positions": capacity + draw(st.just(0) | st.integers(0, 10_000)),
        "max_step_tokens": draw(st.integers(1, 10) | st.integers(1, 4096)),
        "streamed": draw(st.booleans()),
    }


def plan_of(given_: dict[str, Any], budget: str) -> Plan:
    return make_plan(
        given_["config"], budget=budget, **{k: v for k, v in given_.items() if k != "config"}
    )


@given(limits(), st.sampled_from(QUICK_FIRST))
@settings(max_examples=300)
def test_a_plan_fits_the_target(given_: dict[str, Any], budget: str) -> None:
    plan = plan_of(given_, budget)
    capacity, widest = given_["capacity"], min(given_["max_step_tokens"], given_["capacity"])
    assert (plan.budget, plan.seed, plan.rows) == (budget, given_["seed"], given_["rows"])
    assert plan.widest == widest
    assert plan.widths[0] == widest and len(set(plan.widths)) == len(plan.widths)
    assert all(2 <= width <= widest for width in plan.widths[1:])
    assert 1 <= plan.context <= capacity == plan.capacity
    assert 1 <= plan.distance <= capacity and plan.distance <= plan.max_positions
    assert all(edge in plan.spans and 0 < edge < plan.context for edge in plan.edges)
    assert list(plan.edges) == sorted(set(plan.edges))
    assert 1 <= plan.wide_batch <= widest
    assert 0 <= plan.dense_logits <= plan.context
    assert plan.dense_logits * given_["config"].vocab_size <= MOST_LOGITS
    assert plan.greedy == 2 if given_["streamed"] else 16 <= plan.greedy <= 32
    least, most = BUDGETS[budget].steps
    assert least <= plan.steps <= most and plan.share(1e-9) == 1
    assert plan_of(given_, budget) == plan, "the same question is judged by the same runs"


@given(limits())
@settings(max_examples=150)
def test_a_larger_budget_runs_no_less(given_: dict[str, Any]) -> None:
    plans = [plan_of(given_, budget) for budget in QUICK_FIRST]
    for less, more in itertools.pairwise(plans):
        for name in ("context", "distance", "steps", "rounding", "dense_logits", "wide_batch"):
            assert getattr(less, name) <= getattr(more, name), name
        assert len(less.edges) <= len(more.edges)
        assert sum(less.widths) <= sum(more.widths)


@given(limits(), st.sampled_from(QUICK_FIRST))
def test_edges_are_all_there_are_or_both_ends_of_them(given_: dict[str, Any], budget: str) -> None:
    plan = plan_of(given_, budget)
    every = [span for span in plan.spans if span < plan.context]
    assert list(plan.spans) == list(Spans(SPAN_MULTIPLE, given_["capacity"]))
    if len(plan.edges) < len(every):
        assert len(plan.edges) >= 2
        assert (plan.edges[0], plan.edges[-1]) == (every[0], every[-1])
        places = [every.index(edge) for edge in plan.edges]
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert max(gaps) - min(gaps) <= 1, "spread evenly"
    else:
        assert list(plan.edges) == every


@pytest.mark.parametrize("budget", QUICK_FIRST)
@pytest.mark.parametrize("name", sorted(checkpoints.PUBLISHED))
def test_a_published_model_is_given_widths_of_every_size(name: str, budget: str) -> None:
    """A step of two or three tokens, of a few dozens, of hundreds: other kernels run in each."""
    plan = make_plan(
        parse_config(checkpoints.PUBLISHED[name]), budget=budget, seed=0, rows=8, capacity=4096,
        max_positions=4096, max_step_tokens=2048, streamed=False,
    )  # fmt: skip
    assert plan.widths[0] == 2048
    assert len(plan.widths) >= 6
    drawn = sorted(plan.widths[1:])
    if budget == "thorough":
        assert drawn[0] <= 3
        assert all(b <= 2.5 * a for a, b in itertools.pairwise(drawn))


def test_widths_change_with_the_seed() -> None:
    def widths(seed: int) -> tuple[int, ...]:
        return make_plan(
            CONFIGS[0], budget="standard", seed=seed, rows=8, capacity=4096, max_positions=4096,
            max_step_tokens=512, streamed=False,
        ).widths  # fmt: skip

    assert widths(0) == widths(0)
    assert len({widths(seed) for seed in range(10)}) > 5
    tried = {width for seed in range(60) for width in widths(seed)}
    assert len(tried) > 100


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2.5-0.5b-instruct", 0.494),
        ("llama-3.1-8b-instruct", 7.5),
        ("llama-3.1-70b-instruct", 69.5),
        ("qwen3-30b-a3b", 3.0),  # of 30.5, those that one token reads
    ],
)
def test_parameters_are_counted_as_published(name: str, billions: float) -> None:
    found = parameters_per_token(parse_config(checkpoints.PUBLISHED[name]))
    assert found == pytest.approx(billions * 1e9, rel=0.05)


def test_a_small_model_is_given_more_steps_and_its_widest_batch() -> None:
    def plan(config: ModelConfig) -> Plan:
        return make_plan(
            config, budget="standard", seed=0, rows=4, capacity=512, max_positions=512,
            max_step_tokens=512, streamed=False,
        )  # fmt: skip

    small = parse_config(checkpoints.mini("llama"))
    large = parse_config(checkpoints.PUBLISHED["llama-3.1-70b-instruct"])
    assert parameters_per_token(small) < SMALL_MODEL < parameters_per_token(large)
    assert plan(small).steps > plan(large).steps
    assert plan(small).wide_batch == 512
    assert plan(large).wide_batch == WIDE_BATCH_TOKENS["standard"] // 4


def test_another_budget_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValidationError, match="'much' is not one of quick, standard, thorough"):
        make_plan(
            CONFIGS[0], budget="much", seed=0, rows=1, capacity=1, max_positions=1,
            max_step_tokens=1, streamed=False,
        )  # fmt: skip
