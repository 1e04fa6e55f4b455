"""The scenarios on sessions of any size: what is fed, and what the oracle is asked about."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.engines import Step
from qwenport.engines.spans import Spans
from qwenport.validate.budget import Plan, make_plan
from qwenport.validate.run import NotApplicable, Observation
from qwenport.validate.scenarios import LOOKED_INTO, SCENARIOS, Scenario, scenarios

from .sessions import PROMPTS, VOCABULARY, Diary, capacity_of, make_run, mini_config, plans, said

NEEDS_ROWS = {"batches", "wide batch"}
FROM_ONE_TOKEN = {"prefill", "last logits", "step widths", "whole context", "decode", "greedy"}


def planned(rows: int = 3, capacity: int = 512, **changes: Any) -> Plan:
    sizes = {"budget": "quick", "seed": 0, "max_step_tokens": 512, "streamed": False} | changes
    return make_plan(mini_config(), rows=rows, capacity=capacity, max_positions=capacity, **sizes)


def observe(scenario: Scenario, plan: Plan, *, logits: int = 512, **keywords: Any) -> Observation:
    session = Diary(
        plan.rows,
        capacity_of(scenario, plan),
        plan.max_positions,
        max_step_tokens=plan.widest,
        max_step_logits=min(logits, plan.widest),
    )
    run = make_run(session, plan, **keywords)
    scenario.run(run)
    return run.observation()


@given(
    plans(),
    st.sampled_from((1, 2, 5)) | st.integers(1, 600),
    st.none() | st.integers(1, 400),
    st.lists(st.integers(0, 49), min_size=1, max_size=70, unique=True).map(tuple),
    st.sampled_from((*SCENARIOS, LOOKED_INTO)),
)
@settings(max_examples=250)
def test_every_scenario_asks_the_oracle_about_the_positions_it_ran(
    plan: Plan, logits: int, original: int | None, special: tuple[int, ...], scenario: Scenario
) -> None:
    """Each row of logits saw the tokens of the text beside it and no others; nothing passes the capacity."""
    try:
        observation = observe(
            scenario, plan, logits=logits, original_context=original, special_ids=special
        )
    except NotApplicable as reason:
        assert_not_applicable(scenario, plan, original, str(reason))
        return
    owed = said(observation.texts)
    assert observation.candidate[:, :2].tolist() == owed
    assert len(observation.labels) == len(owed)
    for label, (position, _) in zip(observation.labels, owed, strict=True):
        assert f" position {int(position)} (step of " in label
    capacity = capacity_of(scenario, plan)
    for text in observation.texts:
        assert len(text.tokens) <= capacity and text.positions
        assert text.first_position + len(text.tokens) <= plan.max_positions


def assert_not_applicable(
    scenario: Scenario, plan: Plan, original: int | None, reason: str
) -> None:
    capacity = capacity_of(scenario, plan)
    assert scenario.name not in FROM_ONE_TOKEN
    if scenario.name in NEEDS_ROWS:
        assert plan.rows == 1 and "one row" in reason
    elif scenario.capacity is not None:
        assert capacity == plan.capacity
    elif scenario.name == "past original context":
        assert original is None or original + 24 > plan.max_positions
    elif scenario.name == "middle of context":
        assert plan.context >= plan.max_positions
    else:
        most = min(capacity, plan.widest) if scenario.name == "chosen logits" else capacity
        assert most < 8, f"{scenario.name} is not run in {capacity} slots: {reason}"


@given(plans(), st.sampled_from((*SCENARIOS, LOOKED_INTO)))
@settings(max_examples=60)
def test_a_scenario_repeats_itself_to_the_last_token(plan: Plan, scenario: Scenario) -> None:
    """A streamed target is rehearsed: the second time must be as the first."""
    fed: list[list[tuple[Any, ...]]] = [[], []]
    for steps in fed:

        def note(step: Step, steps: list[tuple[Any, ...]] = steps) -> None:
            steps.append(tuple((n, a.tolist()) for n, a in step.feeds.items()))

        try:
            observe(scenario, plan, on_step=note)
        except NotApplicable:
            return
    assert fed[0] == fed[1]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_scenario_of_a_usual_target_runs(scenario: Scenario) -> None:
    """Rope scaled from 200 positions, 40 special ids; the long text may not be the whole context."""
    plan = planned()
    observation = observe(scenario, plan, original_context=200, special_ids=tuple(range(5, 45)))
    assert observation.texts


def test_the_scenarios_reach_every_width_row_and_edge_of_the_plan() -> None:
    plan = planned(rows=5, capacity=512)
    widths, rows, spans, singles = set(), set(), set(), set()

    def note(step: Step) -> None:
        width = step.feeds["input_ids"].shape[1]
        widths.add(width)
        rows.update(row for row, taken in enumerate(step.taken.tolist()) if taken)
        if width == 1:
            spans.add(len(step.feeds["key_positions"]))
            singles.update(step.starts[step.taken > 0].tolist())

    for scenario in scenarios(plan):
        try:
            observe(scenario, plan, on_step=note)
        except NotApplicable:
            continue
    assert widths >= set(plan.widths) and max(widths) == plan.widest
    assert rows == set(range(5))
    for edge in plan.edges:
        assert {edge - 1, edge, edge + 1} <= singles
        assert {edge, plan.spans.holding(edge + 1)} <= spans


def test_small_caches_are_filled_to_their_last_slot() -> None:
    plan = planned()
    small = [s for s in scenarios(plan) if s.capacity is not None]
    assert {s.capacity for s in small} == set(plan.caches) >= {64, 192}
    for scenario in small:
        (text,) = observe(scenario, plan).texts
        assert len(text.tokens) == (scenario.capacity if scenario.capacity <= plan.context else 64)


@given(plans())
def test_of_a_small_model_every_cache_position_batch_and_id_is_run(plan: Plan) -> None:
    sizes = [size for size in Spans(64, plan.capacity) if size < plan.capacity]
    assert set(plan.caches) <= set(sizes) and plan.cache_sizes == len(sizes) + 1
    assert {64, 192} & set(sizes) <= set(plan.caches)
    if not plan.every_id:  # a large model, or a quick judgement
        return
    assert plan.budget != "quick" and plan.decoded == plan.context
    assert plan.batches == tuple(range(2, plan.rows + 1))
    assert len(plan.caches) == min(len(sizes), 12 if plan.budget == "standard" else 64)


def test_every_position_of_a_small_model_is_decoded_and_every_id_said() -> None:
    plan = planned(capacity=512, budget="standard")
    singles: set[int] = set()

    def note(step: Step) -> None:
        if step.feeds["input_ids"].shape[1] == 1:
            singles.update(step.starts[step.taken > 0].tolist())

    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    observe(by_name["decode"], plan, on_step=note)
    assert singles == set(range(5, 512))
    texts = observe(by_name["token ids"], plan, special_ids=(3, 1)).texts
    assert {token for text in texts for token in text.tokens} == set(range(VOCABULARY))


def test_the_last_position_of_the_model_is_judged() -> None:
    plan = planned(capacity=4096)
    (scenario,) = [s for s in SCENARIOS if s.name == "end of context"]
    (text,) = observe(scenario, plan).texts
    assert text.first_position + text.positions[-1] == 4095
    assert text.positions == tuple(range(48))


def test_greedy_feeds_transformers_tokens_and_judges_each_next_one() -> None:
    plan = planned()
    (scenario,) = [s for s in SCENARIOS if s.greedy]
    (text,) = observe(scenario, plan).texts
    assert list(text.tokens[12:]) == PROMPTS.take(plan.greedy, start=500)[:-1]
    assert text.positions == tuple(range(11, 11 + plan.greedy))
