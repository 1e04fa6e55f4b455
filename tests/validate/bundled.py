"""The bundled checkpoints, the ways in which a package is judged, and small checkpoints made for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwenport.validate import Report, ScenarioResult

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
IN_CHUNKS = EXAMPLES / "tiny-qwen2.5-1m"
WAYS: dict[str, dict[str, Any]] = {
    "package": {},
    "network": {"judged_as": "tensorrt-network"},
    "network, exact": {"judged_as": "tensorrt-network", "exact": True},
}


def status(report: Report) -> dict[str, str]:
    """Row -> what became of it."""
    return {scenario.name: scenario.status for scenario in report.scenarios}


def failing(report: Report) -> set[str]:
    """The rows that failed."""
    return {name for name, found in status(report).items() if found == "failed"}


def row(report: Report, name: str) -> ScenarioResult:
    """The row of that name."""
    (found,) = [scenario for scenario in report.scenarios if scenario.name == name]
    return found


def strict_json(text: str) -> Any:
    """JSON without the NaN and Infinity that Python would read."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)
