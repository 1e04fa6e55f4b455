"""Turns a scenario's observation into its result: distances from the oracle, compared with bounds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import E4M3
from qwenport.validate.metrics import (
    Metrics,
    compare,
    mean_interval,
    ratio_interval,
    share_interval,
)
from qwenport.validate.oracle import Oracle
from qwenport.validate.report import Check, ScenarioResult, Status
from qwenport.validate.run import Observation
from qwenport.validate.scenarios import Scenario
from qwenport.validate.text import Choices, Text
from qwenport.validate.thresholds import (
    FP8_TYPICAL_POSITIONS,
    FP32_NEAR_TIE_MOST,
    FP32_REL_L2_MOST,
    FP32_REL_L2_MOST_DENSE,
    FP32_TIMES_OWN_ROUNDING_LEAST,
    HALF_CONFIDENCE,
    HALF_Z,
    Thresholds,
    fp8_thresholds,
    fp32_thresholds,
    half_thresholds,
    override,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


class Judge:
    """Judges observations of one target.

    Attributes:
        dtype: the dtype that the target computes in.
        loosened: bounds that the user made looser than ours, one line each.
        replayed: number of expert choices and FP8 codes in near-ties that the oracle took over from the target.
    """

    def __init__(self, oracle: Oracle, dtype: str, overrides: Mapping[str, float]) -> None:
        self._oracle, self.dtype, self._overrides = oracle, dtype, overrides
        self.loosened: dict[str, None] = {}
        self.replayed = 0

    def judge(
        self,
        scenario: Scenario,
        observation: Observation,
        choices: Callable[[], Sequence[Choices] | None] = lambda: None,
        started: float | None = None,
    ) -> ScenarioResult:
        """Compare one observation with its bounds.

        Args:
            choices: returns the experts and codes that the target chose for the observation's texts; called if it
                fails.
            started: a `time.monotonic()`.
        """
        oracle = np.concatenate(self._oracle.logits(observation.texts))
        metrics, checks = self.measure(observation, oracle, greedy=scenario.greedy)
        if status_of(checks) == "failed":
            # a near-tie that fell the other way is not a mistake: take it over, and judge what follows from it
            chosen = choices()
            if chosen is not None:
                logits, taken = self._oracle.with_choices(observation.texts, chosen)
                if taken:
                    self.replayed += taken
                    oracle = np.concatenate(logits)
                    metrics, checks = self.measure(observation, oracle, greedy=scenario.greedy)
        return result_of(scenario, status_of(checks), checks, metrics, started=started)

    def ask(self, texts: Sequence[Text]) -> None:
        """Have the oracle compute these texts together, before they are judged one by one."""
        if texts:
            self._oracle.logits(texts)

    def in_dtype(self, dtype: str) -> Judge:
        """The same judge for the target in another dtype."""
        other = Judge(self._oracle, dtype, self._overrides)
        other.loosened = self.loosened
        return other

    def measure(
        self, observation: Observation, oracle: Float32, *, greedy: bool = False
    ) -> tuple[Metrics, tuple[Check, ...]]:
        """Distances of an observation from the oracle, and every bound on them."""
        if self.dtype == "fp32":
            return self._in_fp32(observation, oracle, greedy)
        return self._in_half(observation, oracle)

    def bounds(self, texts: Sequence[Text], own_agreement: float = 1.0) -> Thresholds:
        """The bounds for some texts, with the user's values in place of ours."""
        if self.dtype == "fp32":
            return self.override(fp32_thresholds(self._oracle.own_rounding))
        return self.override(half_thresholds(self._worse(texts), own_agreement))

    def override(self, bounds: Thresholds) -> Thresholds:
        """Put the user's bounds in place of ours."""
        bounds, looser = override(bounds, self._overrides)
        self.loosened |= dict.fromkeys(looser)
        return bounds

    def _in_fp32(
        self, observation: Observation, oracle: Float32, greedy: bool
    ) -> tuple[Metrics, tuple[Check, ...]]:
        metrics, checks = self._with_rounding(
            observation, oracle, fp32_thresholds(self._oracle.own_rounding, greedy=greedy)
        )
        routed = self._oracle.reference.routed
        highest = FP32_REL_L2_MOST if routed else FP32_REL_L2_MOST_DENSE
        near = 0 < metrics.rel_l2 <= highest and not metrics.nonfinite
        if status_of(checks) == "passed" or not near or self._oracle.reference.rounds_inputs:
            return metrics, checks
        # The error is small, and no FP8 code is to blame, since those fall the other way in fp64 too. Rounding differs
        # between positions, so measure it at these.
        here = self._oracle.own_rounding_of(observation.texts)
        own = max(self._oracle.own_rounding, here.rel_l2)
        bounds = fp32_thresholds(own, greedy=greedy, highest=highest)
        margin = min(FP32_NEAR_TIE_MOST, FP32_TIMES_OWN_ROUNDING_LEAST * here.max_abs)
        bounds = dataclasses.replace(bounds, near_tie_margin=max(bounds.near_tie_margin, margin))
        return self._with_rounding(observation, oracle, bounds)

    def _with_rounding(
        self, observation: Observation, oracle: Float32, bounds: Thresholds
    ) -> tuple[Metrics, tuple[Check, ...]]:
        own = self._oracle.own_rounding
        bounds = self.override(bounds)
        metrics = compare(observation.candidate, oracle, near_tie_margin=bounds.near_tie_margin)
        ratio = metrics.rel_l2 / own if own else float("inf") if metrics.rel_l2 else 0.0
        metrics = dataclasses.replace(metrics, own_ratio=ratio)
        return metrics, checks_of(metrics, bounds, observation.labels, self.dtype)

    def _worse(self, texts: Sequence[Text]) -> Metrics:
        return max(self._oracle.own_errors(texts, self.dtype), key=lambda own: own.rel_l2)

    def _in_half(
        self, observation: Observation, oracle: Float32
    ) -> tuple[Metrics, tuple[Check, ...]]:
        own, typical = self._worse(observation.texts), np.zeros(0)
        bounds = self.override((fp8_thresholds if self.dtype == E4M3 else half_thresholds)(own))
        theirs = np.array(own.by_position.difference)
        if self.dtype == E4M3:
            typical = np.full(FP8_TYPICAL_POSITIONS, self._oracle.typical_error(E4M3))
        near = np.maximum(theirs, typical.max(initial=0.0))
        margins = bounds.near_tie_margin * near / np.sqrt(own.vocab)
        metrics = compare(observation.candidate, oracle, near_tie_margin=margins)
        ours = np.concatenate([metrics.by_position.difference, typical])
        theirs = np.concatenate([theirs, typical])
        clear = metrics.positions - metrics.near_ties
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = float(np.linalg.norm(ours) / np.linalg.norm(theirs)) if ours.any() else 0.0
        metrics = dataclasses.replace(
            metrics,
            own_ratio=ratio,
            own_ratio_interval=ratio_interval(ours, theirs, HALF_CONFIDENCE),
            kl_interval=mean_interval(np.array(metrics.by_position.kl), HALF_CONFIDENCE),
            top1_interval=share_interval(
                round(metrics.top1_clear * clear), clear, HALF_Z, HALF_CONFIDENCE
            ),
        )
        return metrics, checks_of(metrics, bounds, observation.labels, self.dtype)


def checks_of(
    metrics: Metrics, bounds: Thresholds, labels: Sequence[str], dtype: str
) -> tuple[Check, ...]:
    """All bounds on one scenario's metrics, each with the position to look at first and the number judged."""
    count = f"{metrics.positions} positions"
    worst = f"{count}, worst at {labels[metrics.worst_position]}, {metrics.worst_rel_l2:.3g} there"
    clear = f"judged at {metrics.positions - metrics.near_ties} of {count}"
    if metrics.first_disagreement is not None:
        clear += (
            f"; first at {labels[metrics.first_disagreement]}, where transformers' margin is "
            f"{metrics.first_disagreement_margin:.3g}"
        )
    checks = [Check("NaN and infinite logits", metrics.nonfinite, "==", 0)]
    if bounds.rel_l2 is not None:
        checks.append(Check("rel-L2", metrics.rel_l2, "<=", bounds.rel_l2, worst))
    if bounds.times_own is not None and metrics.own_ratio is not None:
        name = f"rel-L2 over transformers' own in {dtype}"
        value, where = metrics.own_ratio, worst
        if metrics.own_ratio_interval is not None:
            value, name = metrics.own_ratio_interval.low, f"{name}, lower end"
            where = f"{metrics.own_ratio:.3g} measured, {worst}"
        checks.append(Check(name, value, "<=", bounds.times_own, where))
    if bounds.kl_mean is not None:
        low = metrics.kl_interval.low if metrics.kl_interval is not None else metrics.kl_mean
        where = f"{metrics.kl_mean:.3g} measured, {count}"
        checks.append(Check("mean KL, lower end", low, "<=", bounds.kl_mean, where))
    share = metrics.top1_clear
    if metrics.top1_interval is not None:
        share = metrics.top1_interval.high
    checks.append(Check("same top-1 outside near-ties", share, ">=", bounds.top1, clear))
    return tuple(checks)


def status_of(checks: Sequence[Check]) -> Status:
    """Whether all bounds hold."""
    return "passed" if all(check.passed for check in checks) else "failed"


def seconds_since(started: float) -> float:
    """Seconds since a `time.monotonic()`, to the millisecond."""
    return round(time.monotonic() - started, 3)


def result_of(
    scenario: Scenario,
    status: Status,
    checks: tuple[Check, ...] = (),
    metrics: Metrics | None = None,
    *,
    reason: str | None = None,
    started: float | None = None,
) -> ScenarioResult:
    """The result of a scenario that began at `started`, a `time.monotonic()`."""
    seconds = 0.0 if started is None else seconds_since(started)
    return ScenarioResult(scenario.name, scenario.summary, status, checks, metrics, reason, seconds)
