"""The verdict: what was compared, how far apart, and where. Written as report.json and report.html.

docs/report.md describes the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwenport.contract import MANIFEST
from qwenport.validate.errors import ValidationError
from qwenport.validate.metrics import Metrics

if TYPE_CHECKING:
    from qwenport.validate.cost import Cost
    from qwenport.validate.coverage import Coverage
    from qwenport.validate.localisation import Fault, OperatorError
    from qwenport.validate.rounding import RoundingError

SCHEMA_VERSION = 4
JSON_NAME, HTML_NAME = "report.json", "report.html"

Status = Literal["passed", "failed", "not run"]
Relation = Literal["<=", ">=", "=="]
_HOLDS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True)
class Check:
    """A bound on a number. NaN passes no check.

    Attributes:
        metric: what was measured.
        value: the number.
        relation, bound: what it must be: "<=", ">=" or "==" a number.
        where: where the worst value was found; None if it has no place.
    """

    metric: str
    value: float
    relation: Relation
    bound: float
    where: str | None = None

    @property
    def passed(self) -> bool:
        """Whether "value relation bound" holds."""
        return bool(_HOLDS[self.relation](self.value, self.bound))

    def __str__(self) -> str:
        """For example "rel-L2 0.31, must be <= 1e-05 (worst at position 12)"."""
        where = f" ({self.where})" if self.where else ""
        return f"{self.metric} {self.value:.6g}, must be {self.relation} {self.bound:.6g}{where}"


@dataclass(frozen=True)
class ScenarioResult:
    """One scenario's result.

    Attributes:
        name: the scenario's.
        summary: what it runs.
        status: "passed", "failed" or "not run".
        checks: the bounds.
        metrics: the measurements of its logits; None if it has none.
        reason: why it was not run, or what the candidate raised.
        seconds: wall time.
    """

    name: str
    summary: str
    status: Status
    checks: tuple[Check, ...] = ()
    metrics: Metrics | None = None
    reason: str | None = None
    seconds: float = 0.0

    @property
    def failures(self) -> tuple[str, ...]:
        """All reasons why the scenario failed."""
        if self.status != "failed":
            return ()
        raised = (self.reason,) if self.reason else ()
        return raised + tuple(str(check) for check in self.checks if not check.passed)


@dataclass(frozen=True)
class RouterBand:
    """Expert choices (a token in a layer) with a margin in transformers, in logits, from `least` to below `most`.

    In `agreeing` of the `choices` the target chose the same set of experts.
    """

    least: float
    most: float
    choices: int
    agreeing: int


@dataclass(frozen=True)
class Report:
    """The outcome of `validate`.

    Attributes:
        target, reference: the two directories, as given.
        judged_as: "package" (onnxruntime), "tensorrt-network" or "engine".
        target_dtype, compute_dtype: dtype of the target's weights, and of the computation.
        reference_mode: "whole" in memory, or "streamed".
        reference_weights: "fp32", or how weights were rounded to match the target's.
        layers_judged, layers: decoder layers that were run, and the model's number of layers.
        complete: whether every scenario was run.
        prompts: what the prompts were made from.
        own_rounding: rel-L2 between two ways in which transformers computes the same logits; None before it is known.
        cost: what quantization cost against the original checkpoint; None if none was given.
        coverage: what was judged of what the target allows; None before anything ran.
        loosened: thresholds that are looser than ours, one line each.
        scenarios: their results.
        layers_error: how the error grows from layer to layer; empty if the target's inside cannot be observed.
        rounding: half precision at every layer and operator; empty if it was not judged.
        fault: where the error starts, if there is an error and its start was found.
        unexplained: why it was not found; None if it was, or if nothing failed.
        script: a Python program that reproduces what the random walk found; None if it found nothing.
        routing: agreement of expert choices by margin; empty for a dense model and for engines.
        replayed: number of choices in near-ties that the oracle took over from the target.
        environment: versions, processor, date.
        schema_version: of report.json.
        hashes: hashes that identify the target and the reference.
        weights_sha256: SHA-256 of each weight file, as `sha256sum` prints it; the package's own files under "weights/".
    """

    target: str
    judged_as: str
    target_dtype: str
    compute_dtype: str
    reference: str
    reference_mode: str
    reference_weights: str
    layers_judged: int
    layers: int
    complete: bool
    prompts: str
    own_rounding: float | None
    cost: Cost | None
    coverage: Coverage | None
    loosened: tuple[str, ...]
    scenarios: tuple[ScenarioResult, ...]
    layers_error: tuple[OperatorError, ...]
    rounding: tuple[RoundingError, ...]
    fault: Fault | None
    unexplained: str | None
    script: str | None
    routing: tuple[RouterBand, ...]
    replayed: int
    environment: dict[str, str]
    hashes: dict[str, Any]
    weights_sha256: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        """Whether all scenarios ran, none failed, and at least one compared logits."""
        return (
            self.complete
            and all(s.status != "failed" for s in self.scenarios)
            and any(s.status == "passed" and s.metrics is not None for s in self.scenarios)
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """One line per failure: scenario, metric, value, bound."""
        return tuple(f"{s.name}: {failure}" for s in self.scenarios for failure in s.failures)

    @property
    def verdict(self) -> str:
        """The verdict and its subject, in one line."""
        text = "parity holds" if self.passed else "parity does NOT hold"
        if not self.complete:
            text = "interrupted, no verdict"
        if self.layers_judged < self.layers:
            text += f" for the first {self.layers_judged} of {self.layers} layers"
        counts = {
            status: sum(scenario.status == status for scenario in self.scenarios)
            for status in ("passed", "failed", "not run")
        }
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        judged = "nothing" if self.coverage is None else str(self.coverage)
        attention = self.environment.get("attention")  # a network's form, and its GPUs
        network = "" if attention is None else f"; attention {attention}"
        return f"{text}: {told}{network}; judged: {judged}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object; non-finite numbers become the strings "NaN", "Infinity", "-Infinity"."""
        data = dataclasses.asdict(self)
        for scenario, own in zip(data["scenarios"], self.scenarios, strict=True):
            for check, original in zip(scenario["checks"], own.checks, strict=True):
                check["passed"] = original.passed
            metrics = scenario["metrics"]
            scenario["by_position"] = None if metrics is None else metrics.pop("by_position")
        ordered = {
            "schema_version": self.schema_version,
            "passed": self.passed,
            "verdict": self.verdict,
            **data,
        }
        result: dict[str, Any] = _finite(ordered)
        return result

    def write(self, directory: Path) -> None:
        """Write report.json and report.html into `directory`, which is created if it does not exist.

        Each file appears complete or not at all.
        """
        from qwenport.validate.html import render

        directory.mkdir(parents=True, exist_ok=True)
        data = self.to_json()
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        for name, content in ((HTML_NAME, render(data)), (JSON_NAME, text + "\n")):
            _write_whole(directory / name, content)


def prepare(directory: Path) -> None:
    """Make sure that a report can be written into `directory`, and remove an old one.

    Raises:
        ValidationError: it is not a directory, is a package, an engine or a checkpoint, or cannot be written to.
    """
    if directory.exists() and not directory.is_dir():
        raise ValidationError(f"--report {directory}: not a directory")
    for name in (MANIFEST, "config.json"):
        if (directory / name).exists():
            raise ValidationError(
                f"--report {directory}: a package, an engine or a checkpoint (it has {name}); "
                "give the report a directory of its own"
            )
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (JSON_NAME, HTML_NAME):
            (directory / name).unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
        for path in made:  # no empty directory stays behind: it is created with the report
            path.rmdir()
    except OSError as error:
        raise ValidationError(f"--report {directory}: {error.strerror or error}") from error


def _write_whole(path: Path, content: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as scratch:
        try:
            scratch.write(content)
            scratch.flush()
            os.fsync(scratch.fileno())
            os.chmod(scratch.name, 0o644)
            os.replace(scratch.name, path)
        except BaseException:
            Path(scratch.name).unlink(missing_ok=True)
            raise


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
