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
    assert len(data["summary"]) == 8
    assert all(row["median_seconds"] > 0 and row["error"] is None for row in data["summary"])
    tokens = {run["contender"]: run["tokens"] for run in data["runs"]}
    assert tokens["top-p: C++"] == tokens["top-p: Python"]
    assert len(set(tokens["top-p: C++"])) > 10
    assert str(ROOT) not in output.read_text()
