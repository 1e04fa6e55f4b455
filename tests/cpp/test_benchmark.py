"""The benchmarks of the C++ library run from end to end: the tokens are the same, and the JSON says how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .builds import ROOT


def run_quick(name: str, folder: Path) -> dict[str, Any]:
    output = folder / f"{name}.json"
    script = ROOT / "benchmarks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--work", folder / "work", "--output", output],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(ROOT) not in output.read_text()
    data: dict[str, Any] = json.loads(output.read_text())
    return data


@pytest.mark.usefixtures("release")
def test_quick_run_of_tokenizer_compares_strings_and_speeds(tmp_path: Path) -> None:
    data = run_quick("tokenizer", tmp_path)
    assert all(row["error"] is None for row in data["summary"])
    compared = [row for row in data["summary"] if "differences" in row]
    assert len(compared) == 8 and all(row["differences"] == 0 for row in compared)
    timed = [row for row in data["summary"] if "differences" not in row]
    assert len(timed) == 6 and all(row["bytes_per_second"] > 0 for row in timed)
    assert len({run["sha256"] for run in data["runs"]}) == 3  # each tokenizer's, by both


@pytest.mark.usefixtures("release")
def test_quick_run_of_embedded_draws_the_same_tokens(tmp_path: Path) -> None:
    data = run_quick("embedded", tmp_path)
    assert all(row["error"] is None for row in data["summary"])
    steps, models = (
        [row for row in data["summary"] if row["part"] == part] for part in ("steps", "models")
    )
    assert len(steps) == 8 and all(row["median_seconds"] > 0 for row in steps)
    tokens = {run["contender"]: run["tokens"] for run in data["runs"]}
    assert tokens["top-p: C++"] == tokens["top-p: Python"]
    assert len(set(tokens["top-p: C++"])) > 10
    assert [row["contender"] for row in models] == [
        f"tiny: {who}"
        for who in ("C++, fast_steps", "C++, fast_start", "Python, engine", "Python, package")
    ]
    rates = [key for key in models[0] if key.endswith(("_seconds", "_per_second", "_bytes"))]
    assert len(rates) == 8 and all(row[key] > 0 for row in models for key in rates)
    assert {row["tokens_agreeing"] for row in models} == {8}
