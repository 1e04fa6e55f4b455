"""The engines that came along: each one's own proof, and its speed. A line of JSON each; 2 without a GPU.

python benchmarks/gpu/self_tests.py
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from no_gpu import NO_GPU

from qwenport.contract import MANIFEST, ONNXRUNTIME
from qwenport.engines.targets import FLAVOURS

ROOT = Path(__file__).resolve().parents[2]
BENCH = ("--prompt-tokens", "100", "--new-tokens", "50", "--json", "--quiet")


def qwenport(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    command = [sys.executable, "-m", "qwenport", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check(engine: Path, flavour: str) -> dict[str, Any]:
    """Run an engine's self-test, and time it if that passes."""
    if flavour != ONNXRUNTIME and importlib.util.find_spec(FLAVOURS[flavour].module) is None:
        return {"engine": engine.name, "self_test": None, "why": f"{flavour} is not installed"}
    done = qwenport("selftest", engine)
    said = (done.stdout + done.stderr).strip().splitlines() or [""]
    found: dict[str, Any] = {
        "engine": engine.name,
        "self_test": done.returncode == 0,
        "why": said[-1],
    }
    if done.returncode == 0:
        timed = qwenport("bench", engine, *BENCH)
        found["bench"] = json.loads(timed.stdout) if timed.returncode == 0 else timed.stderr
    return found


def main() -> int:
    """Check every engine that can run here."""
    wrong, stopped = 0, not torch.cuda.is_available()
    for engine in sorted((ROOT / "engines").glob(f"*/{MANIFEST}")):
        flavour = json.loads(engine.read_text(encoding="utf-8"))["flavour"]
        if flavour != ONNXRUNTIME and stopped:
            continue
        found = check(engine.parent, flavour)
        wrong += found["self_test"] is False
        print(json.dumps(found), flush=True)
    if wrong:
        return 1
    if stopped:
        print(NO_GPU)
    return 2 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
