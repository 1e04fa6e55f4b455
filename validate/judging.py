"""From metrics and bounds to the result of one scenario."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qwenport.validate.metrics import Metrics
from qwenport.validate.report import Check, ScenarioResult, Status
from qwenport.validate.scenarios import Scenario
from qwenport.validate.thresholds import Thresholds


def checks_of(
    metrics: Metrics, bounds: Thresholds, labels: Sequence[str], dtype: str
) -> tuple[Check, ...]:
    """Every bound on one scenario's metrics, each naming the position to look at first."""
    worst = f"worst at {labels[metrics.worst_position]}, {metrics.worst_rel_l2:.3g} there"
    first = None
    if metrics.first_disagreement is not None:
        first = (
            f"first at {labels[metrics.first_disagreement]}, where transformers' margin is "
            f"{metrics.first_disagreement_margin:.3g}"
        )
    checks = [Check("NaN and infinite logits", metrics.nonfinite, "==", 0)]
    if bounds.rel_l2 is not None:
        checks.append(Check("rel-L2", metrics.rel_l2, "<=", bounds.rel_l2, worst))
    if bounds.times_own is not None and metrics.own_ratio is not None:
        name = f"rel-L2 over transformers' own in {dtype}"
        checks.append(Check(name, metrics.own_ratio, "<=", bounds.times_own, worst))
    if bounds.kl_mean is not None:
        checks.append(Check("mean KL", metrics.kl_mean, "<=", bounds.kl_mean))
    checks.append(
        Check("same top-1 outside near-ties", metrics.top1_clear, ">=", bounds.top1, first)
    )
    return tuple(checks)


def status_of(checks: Sequence[Check]) -> Status:
    """Whether all bounds hold."""
    return "passed" if all(check.passed for check in checks) else "failed"


def seconds_since(started: float) -> float:
    """Since a `time.monotonic()`, to the millisecond."""
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
    """What became of a scenario that began at `started`, a `time.monotonic()`."""
    seconds = 0.0 if started is None else seconds_since(started)
    return ScenarioResult(scenario.name, scenario.summary, status, checks, metrics, reason, seconds)
