"""benchmarks/embedded.py runs from end to end: C++ and Python draw the same tokens, and the JSON says how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .builds import ROOT


def test_quick_run_writes_its_json(release: Path, tmp_path: Path) -> None:
    output = tmp_path / "embedded.json"
    script = ROOT / "benchmarks" / "embedded.py"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--work", tmp_path / "work", "--output", output],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(output.read_text())
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
    assert str(ROOT) not in output.read_text()
