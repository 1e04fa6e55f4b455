"""The verdict: what was compared, how far apart it was, where. Written as report.json and report.md."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwenport.validate.metrics import Metrics

SCHEMA_VERSION = 1
JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"

Status = Literal["passed", "failed", "not run"]
Relation = Literal["<=", ">=", "=="]
_HOLDS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True)
class Check:
    """One bound on one number. NaN passes no check."""

    metric: str
    value: float
    relation: Relation
    bound: float
    where: str | None = None

    @property
    def passed(self) -> bool:
        """Whether value relation bound."""
        return bool(_HOLDS[self.relation](self.value, self.bound))

    def __str__(self) -> str:
        """For example "rel-L2 0.31, must be <= 1e-05 (worst at position 12)"."""
        where = f" ({self.where})" if self.where else ""
        return f"{self.metric} {self.value:.6g}, must be {self.relation} {self.bound:.6g}{where}"


@dataclass(frozen=True)
class ScenarioResult:
    """One scenario. `reason` says why it was not run, or what the candidate raised."""

    name: str
    summary: str
    status: Status
    checks: tuple[Check, ...] = ()
    metrics: Metrics | None = None
    reason: str | None = None
    seconds: float = 0.0

    @property
    def failures(self) -> tuple[str, ...]:
        """Every reason for which the scenario failed."""
        if self.status != "failed":
            return ()
        raised = (self.reason,) if self.reason else ()
        return raised + tuple(str(check) for check in self.checks if not check.passed)


@dataclass(frozen=True)
class RouterBand:
    """Expert choices (a token in a layer) by transformers' margin, in logits, from `least` up to below `most`.

    `agreeing` of the `choices` are the same set of experts in the target.
    """

    least: float
    most: float
    choices: int
    agreeing: int


@dataclass(frozen=True)
class Report:
    """The outcome of `validate`.

    Attributes:
        target, reference: the two directories, as they were given.
        passed: no scenario failed, and logits were compared.
        prompts: what the prompts were made of.
        reference_weights: "fp32", or how weights were rounded to match the target's.
        own_rounding: rel-L2 between two ways in which transformers computes the same logits.
        cache_slots, max_seq_len: of the session that was judged, and what the target supports.
        environment: versions, processor, date.
        hashes: what the target and the reference were, by hash.
        routing: agreement of expert choices by margin; empty for a dense model and for engines.
    """

    target: str
    reference: str
    target_kind: str
    target_dtype: str
    reference_weights: str
    prompts: str
    own_rounding: float
    cache_slots: int
    max_seq_len: int
    scenarios: tuple[ScenarioResult, ...]
    environment: dict[str, str]
    hashes: dict[str, Any]
    routing: tuple[RouterBand, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        """No scenario failed, and at least one compared logits."""
        return all(s.status != "failed" for s in self.scenarios) and any(
            s.status == "passed" and s.metrics is not None for s in self.scenarios
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """One line a failure: scenario, metric, value, bound."""
        return tuple(f"{s.name}: {failure}" for s in self.scenarios for failure in s.failures)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; numbers that are not finite become the strings "NaN", "Infinity", "-Infinity"."""
        data = dataclasses.asdict(self)
        for scenario, own in zip(data["scenarios"], self.scenarios, strict=True):
            for check, original in zip(scenario["checks"], own.checks, strict=True):
                check["passed"] = original.passed
        ordered = {"schema_version": self.schema_version, "passed": self.passed, **data}
        result: dict[str, Any] = _finite(ordered)
        return result

    def write(self, directory: Path) -> None:
        """Write report.json and report.md into `directory`, which is made if it does not exist."""
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        (directory / JSON_NAME).write_text(text + "\n", encoding="utf-8")
        (directory / MARKDOWN_NAME).write_text(self.to_markdown(), encoding="utf-8")

    def to_markdown(self) -> str:
        """The report to be read: verdict, failures, one table row a scenario, environment."""
        verdict = "passed" if self.passed else "FAILED"
        lines = [
            f"# Parity {verdict}",
            "",
            f"{self.target_kind} `{self.target}` ({self.target_dtype}) against transformers on "
            f"`{self.reference}` ({self.reference_weights}). Prompts: {self.prompts}. "
            f"Cache: {self.cache_slots} of {self.max_seq_len} slots. transformers' own rounding: "
            f"rel-L2 {self.own_rounding:.2g}.",
            "",
        ]
        if self.failures:
            lines += ["## Failures", "", *(f"- {failure}" for failure in self.failures), ""]
        lines += [
            "## Scenarios",
            "",
            "| | " + " | ".join(_COLUMNS) + " |",
            "|---" * (len(_COLUMNS) + 1) + "|",
        ]
        lines += [_row(scenario) for scenario in self.scenarios]
        lines += ["", *(f"- **{s.name}**: {_describe(s)}" for s in self.scenarios)]
        if self.routing:
            lines += [
                "",
                "## Routing",
                "",
                "Expert choices, one a token and layer, by transformers' margin between the last chosen expert "
                "and the next.",
                "",
                "| margin, logits | choices | same experts |",
                "|---|---|---|",
            ]
            lines += [
                f"| {band.least:g} to {band.most:g} | {band.choices} | {band.agreeing} |"
                for band in self.routing
            ]
        lines += ["", "## Environment", "", *(f"- {k}: {v}" for k, v in self.environment.items())]
        lines += ["", "## Hashes", "", *(f"- {k}: {v}" for k, v in self.hashes.items()), ""]
        return "\n".join(lines)


_COLUMNS = {
    "verdict": "status",
    "positions": "positions",
    "rel-L2": "rel_l2",
    "max abs": "max_abs",
    "cosine p5": "cosine_p5",
    "KL mean": "kl_mean",
    "KL p99": "kl_p99",
    "same top-1": "top1",
    "near-ties": "near_ties",
    "smallest margin": "smallest_margin",
}


def _row(scenario: ScenarioResult) -> str:
    cells = [scenario.name, scenario.status]
    for field in list(_COLUMNS.values())[1:]:
        value = None if scenario.metrics is None else getattr(scenario.metrics, field)
        cells.append("" if value is None else f"{value:.3g}")
    return "| " + " | ".join(cells) + " |"


def _describe(scenario: ScenarioResult) -> str:
    if scenario.status == "not run":
        return f"{scenario.summary}. Not run: {scenario.reason}."
    checks = "; ".join(str(check) for check in scenario.checks)
    return f"{scenario.summary}. {checks}." if checks else f"{scenario.summary}."


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
