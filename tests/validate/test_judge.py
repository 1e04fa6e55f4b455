"""Bounds on logits whose error is known: what passes, what fails, and where a flip is excused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.validate.judge import Judge
from qwenport.validate.oracle import Oracle
from qwenport.validate.report import Check, ScenarioResult
from qwenport.validate.run import Observation
from qwenport.validate.scenarios import Scenario
from qwenport.validate.text import Choices, Text
from qwenport.validate.thresholds import FP32_REL_L2, HALF_CLEAR_SIGMAS, HALF_TOP1

COUNT, VOCAB = 64, 300
TEXT = Text(tuple(range(COUNT)), tuple(range(COUNT)))
SCENARIO = Scenario("made up", "", lambda run: None)
GREEDY = Scenario("made up", "", lambda run: None, greedy=True)
OWN_ROUNDING = 1e-6

Array = Any


class Known:
    """Stands for the reference: logits of one text in each dtype and attention."""

    replayed = 0
    rounding_here = OWN_ROUNDING
    routed = False
    rounds_inputs = False

    def __init__(self, made: Mapping[tuple[str, str], Array], replaying: Array = None) -> None:
        self._made, self._replaying = made, replaying

    def own_rounding(self, tokens: Sequence[int]) -> float:
        return OWN_ROUNDING

    def logits(
        self, texts: Any, dtype: str = "fp32", choices: Any = None, attention: str = "eager"
    ) -> list[Array]:
        if choices is not None:
            self.replayed += 3
            return [self._replaying[list(text.positions)] for text in texts]
        made = self._made.get((dtype, attention))
        if made is None and dtype == "fp64":  # its own error there, as everywhere
            made = off(self._made["fp32", "eager"], self.rounding_here, seed=77)
        assert made is not None
        return [made[list(text.positions)] for text in texts]


def clear_logits(seed: int = 0, margin: float = 5.0) -> Array:
    """Logits whose best is ahead by about `margin`."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((COUNT, VOCAB))
    logits[np.arange(COUNT), random.integers(VOCAB, size=COUNT)] += 3 + margin
    return logits.astype(np.float32)


def off(logits: Array, size: float, seed: int) -> Array:
    """The same with an error of that rel-L2 at each position."""
    error = np.random.default_rng((seed, 1)).standard_normal(logits.shape)
    scale = np.linalg.norm(logits, axis=1) / np.linalg.norm(error, axis=1)
    return (logits + size * scale[:, None] * error).astype(np.float32)


def judge(
    candidate: Array,
    made: Mapping[tuple[str, str], Array],
    dtype: str,
    *,
    scenario: Scenario = SCENARIO,
    choices: Any = lambda: None,
    replaying: Array = None,
    overrides: Mapping[str, float] = {},
) -> ScenarioResult:
    labels = tuple(f"position {i}" for i in range(COUNT))
    observation = Observation(candidate, labels, (TEXT,), ({},), (frozenset(),))
    oracle = Oracle(Known(made, replaying), [1, 2])  # type: ignore[arg-type]
    return Judge(oracle, dtype, overrides).judge(scenario, observation, choices)


def check(result: ScenarioResult, metric: str) -> Check:
    (found,) = [c for c in result.checks if c.metric.startswith(metric)]
    return found


# ---- fp32

EXACT = clear_logits()


@given(st.floats(1e-8, 1e-3), st.integers(0, 9))
@settings(max_examples=40)
def test_fp32_passes_up_to_ten_times_transformers_own_rounding(size: float, seed: int) -> None:
    result = judge(off(EXACT, size, seed), {("fp32", "eager"): EXACT}, "fp32")
    bound = check(result, "rel-L2").bound
    assert bound == pytest.approx(min(FP32_REL_L2, 10 * OWN_ROUNDING))
    measured = check(result, "rel-L2").value
    assert measured == pytest.approx(size, rel=0.05, abs=1e-7)
    assert (result.status == "passed") == (measured <= bound)
    assert result.metrics is not None
    assert result.metrics.own_ratio == pytest.approx(measured / OWN_ROUNDING)


@pytest.mark.parametrize(("here", "passes"), [(1e-7, False), (3e-6, False), (8e-6, True)])
def test_fp32_is_judged_by_the_rounding_of_its_own_positions_where_little_is_off(
    here: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of 3e-5, where transformers' own against fp64 is this at the same positions."""
    monkeypatch.setattr(Known, "rounding_here", here)
    result = judge(off(EXACT, 3e-5, 1), {("fp32", "eager"): EXACT}, "fp32")
    assert (result.status == "passed") == passes
    far = judge(off(EXACT, 3e-4, 1), {("fp32", "eager"): EXACT}, "fp32")
    assert far.status == "failed"  # whatever rounds there


@pytest.mark.parametrize(
    ("here", "size", "routed", "passes"),
    [
        (5e-5, 1.6e-4, False, True),
        (5e-5, 1.6e-4, True, False),  # may be a token that went to another expert
        (5e-5, 4e-4, False, False),
        (1.0, 2e-3, False, False),  # whatever rounds there
    ],
)
def test_a_dense_model_may_be_off_by_as_much_as_transformers_own_fp32_is_there(
    here: float, size: float, routed: bool, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Known, "rounding_here", here)
    monkeypatch.setattr(Known, "routed", routed)
    result = judge(off(EXACT, size, 1), {("fp32", "eager"): EXACT}, "fp32")
    assert (result.status == "passed") == passes


@pytest.mark.parametrize("rounds", [False, True])
def test_fp8_codes_that_fall_the_other_way_in_fp64_excuse_nothing(
    rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Known, "rounding_here", 1e-2)
    monkeypatch.setattr(Known, "rounds_inputs", rounds)
    result = judge(off(EXACT, 3e-5, 1), {("fp32", "eager"): EXACT}, "fp32")
    assert (result.status == "passed") != rounds


@pytest.mark.parametrize(
    ("gap", "scenario", "passes"),
    [
        (2e-3, SCENARIO, False),
        (0.5e-3, SCENARIO, True),
        (0.5e-3, GREEDY, False),
        (1e-5, GREEDY, True),
    ],
)
def test_fp32_excuses_one_flip_in_a_near_tie_and_none_elsewhere(
    gap: float, scenario: Scenario, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Known, "rounding_here", 1e-9)
    right = EXACT * 100  # so that the flip is small beside it
    best = right[7].argmax()
    other = (best + 1) % VOCAB
    right[7, other] = right[7, best] - gap
    candidate = right.copy()
    candidate[7, [best, other]] = right[7, [other, best]]
    result = judge(candidate, {("fp32", "eager"): right}, "fp32", scenario=scenario)
    assert check(result, "rel-L2").passed
    assert (result.status == "passed") == passes
    assert result.metrics is not None and result.metrics.near_ties == int(passes)
    if not passes:
        (failure,) = result.failures
        assert "first at position 7, where transformers' margin is" in failure


def test_one_number_that_is_none_fails() -> None:
    for value in (np.nan, np.inf):
        candidate = EXACT.copy()
        candidate[3, 5] = value
        result = judge(candidate, {("fp32", "eager"): EXACT}, "fp32")
        assert result.status == "failed"
        assert result.failures[0].startswith("NaN and infinite logits 1, must be == 0")


# ---- half precision


def half(eager: float, sdpa: float, seed: int = 3, right: Array = EXACT) -> dict[Any, Array]:
    """transformers' logits, and its two attentions with such errors in bf16."""
    return {
        ("fp32", "eager"): right,
        ("bf16", "eager"): off(right, eager, seed),
        ("bf16", "sdpa"): off(right, sdpa, seed + 1),
    }


@given(st.floats(0.25, 4.0), st.floats(1e-3, 3e-2), st.integers(0, 99))
@settings(max_examples=20)
def test_each_of_transformers_attentions_passes_whatever_the_other_loses(
    ratio: float, size: float, seed: int
) -> None:
    known = half(size, size * ratio, seed)
    for attention in ("eager", "sdpa"):
        result = judge(known["bf16", attention], known, "bf16")
        assert result.status == "passed", result.failures
        assert result.metrics is not None and result.metrics.own_ratio is not None
        assert result.metrics.own_ratio <= 1 + 1e-9, "the worse of the two is the yardstick"


@given(st.floats(1e-3, 2e-2), st.floats(0.3, 1.0), st.integers(0, 99))
@settings(max_examples=12)
def test_half_precision_passes_at_one_and_a_half_times_and_fails_at_three(
    size: float, ratio: float, seed: int
) -> None:
    known = half(size, size * ratio, seed)
    for times, passes in ((0.5, True), (1.5, True), (3.0, False)):
        result = judge(off(EXACT, times * size, 1000 + seed), known, "bf16")
        assert (result.status == "passed") == passes, (times, result.checks)
        found = check(result, "rel-L2 over transformers' own in bf16, lower end")
        assert found.passed == passes and found.value < times
        assert result.metrics is not None and result.metrics.own_ratio_interval is not None
        interval = result.metrics.own_ratio_interval
        assert interval.low < times * 1.02 and times * 0.98 < interval.high


def test_one_bad_position_among_many_is_a_bad_verdict_if_it_is_bad_enough() -> None:
    """The bootstrap leaves it out now and then; KL, and the flip, tell the rest."""
    known = half(5e-3, 5e-3)
    candidate = known["bf16", "eager"].copy()
    candidate[9] = off(EXACT, 0.05, 8)[9]
    result = judge(candidate, known, "bf16")
    assert result.metrics is not None
    assert result.metrics.worst_position == 9
    assert check(result, "rel-L2").where is not None
    assert "worst at position 9, 0.05" in (check(result, "rel-L2").where or "")


def test_near_ties_follow_transformers_own_error_at_each_position() -> None:
    """Where its own logits are off by more, a margin says less."""
    right = clear_logits(margin=0.0)
    sizes = np.where(np.arange(COUNT) % 2, 2e-2, 1e-4)[:, None]  # odd positions are noisy
    noise = off(right, 1.0, 5) - right
    known = {("fp32", "eager"): right, ("bf16", "eager"): right + sizes * noise}
    known["bf16", "sdpa"] = right + 0.5 * sizes * noise
    ordered = np.sort(right, axis=1)
    margins = ordered[:, -1] - ordered[:, -2]
    own = np.linalg.norm(known["bf16", "eager"] - right, axis=1) / np.sqrt(VOCAB)
    expected = int((margins < HALF_CLEAR_SIGMAS * own).sum())
    result = judge(known["bf16", "eager"], known, "bf16")
    assert result.metrics is not None
    assert result.metrics.near_ties == expected and 0 < expected < COUNT
    assert f"judged at {COUNT - expected} of {COUNT}" in (check(result, "same top-1").where or "")


@pytest.mark.parametrize(("wrong", "passes"), [(0, True), (1, True), (12, False)])
def test_clear_flips_are_counted_with_what_chance_leaves(wrong: int, passes: bool) -> None:
    """One of 64 may be chance under 99.2%; a dozen are not."""
    known = half(1e-2, 1e-2)
    candidate = known["bf16", "eager"].copy()
    for position in range(wrong):
        best = candidate[position].argmax()
        candidate[position, (best + 1) % VOCAB] = candidate[position, best] + 1e-3
    found = check(judge(candidate, known, "bf16"), "same top-1 outside near-ties")
    assert found.bound == HALF_TOP1 and found.passed == passes


# ---- what the user says, and what is taken over


def test_the_user_s_bounds_count_and_a_looser_one_is_noted() -> None:
    candidate = off(EXACT, 1e-4, 1)
    known = {("fp32", "eager"): EXACT}
    assert judge(candidate, known, "fp32").status == "failed"
    assert judge(candidate, known, "fp32", overrides={"rel_l2": 1e-3}).status == "passed"
    oracle = Oracle(Known(known), [1, 2])  # type: ignore[arg-type]
    judging = Judge(oracle, "fp32", {"rel_l2": 1e-3})
    other = judging.in_dtype("bf16")
    assert other.dtype == "bf16" and not judging.loosened
    judging.bounds([TEXT])
    assert list(judging.loosened) == ["rel_l2 0.001, where ours is 1e-05"] == list(other.loosened)


def test_experts_of_near_ties_are_taken_over_only_where_a_scenario_fails() -> None:
    asked = 0

    def choices() -> list[Choices]:
        nonlocal asked
        asked += 1
        return [Choices({}, 0.1)]

    candidate = clear_logits(1)
    known = {("fp32", "eager"): EXACT}
    assert judge(EXACT, known, "fp32", choices=choices).status == "passed" and asked == 0
    right = judge(candidate, known, "fp32", choices=choices, replaying=candidate)
    assert right.status == "passed" and asked == 1
    wrong = judge(candidate, known, "fp32", choices=choices, replaying=EXACT)
    assert wrong.status == "failed" and asked == 2
