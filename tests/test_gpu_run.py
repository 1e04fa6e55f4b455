"""The one run on a rented GPU machine: its steps keep their limits, and each result is on disk before the next step."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GPU = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu/run.py, on a machine that has a GPU as far as it knows."""
    monkeypatch.syspath_prepend(GPU)
    monkeypatch.delitem(sys.modules, "run", raising=False)
    module = importlib.import_module("run")
    monkeypatch.setattr(module, "machine", lambda: {"gpu": "a GPU"})
    return module


def script(run: ModuleType, name: str, code: str, limit: int = 60, **more: Any) -> Any:
    return run.Step(name, limit, (sys.executable, "-c", code), **more)


def ended(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, steps: list[Any], *options: str
) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and what the file says of the steps."""
    monkeypatch.setattr(run, "STEPS", tuple(steps))
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(output), *options])
    code = run.main()
    return code, json.loads(output.read_text())["steps"]


def test_a_step_ends_at_its_limit_with_all_that_it_started(run, monkeypatch, tmp_path) -> None:
    alive = tmp_path / "alive"
    beat = f"import time\nwhile True: open({str(alive)!r}, 'a').write('.'); time.sleep(0.05)"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {beat!r}])\n"
        "print('{\"case\": 1}', flush=True)\n"
        "time.sleep(600)"
    )
    steps = [script(run, "slow", code, 8, read=run.json_lines), script(run, "next", "print(7)")]
    exit_code, found = ended(run, monkeypatch, tmp_path / "run.json", steps)
    assert exit_code == 1
    assert [step["status"] for step in found] == ["timed out", "passed"]
    assert found[0]["facts"] == {"results": [{"case": 1}]}  # what it had found by then
    size = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == size


def test_the_file_has_each_step_before_the_next_one_begins(run, monkeypatch, tmp_path) -> None:
    output = tmp_path / "run.json"
    look = f"import json; print([s['name'] for s in json.load(open({str(output)!r}))['steps']])"
    steps = [script(run, "first", "print(1)"), script(run, "second", look)]
    assert ended(run, monkeypatch, output, steps)[0] == 0
    assert json.loads(output.read_text())["steps"][1]["output"] == "['first']\n"


def test_nothing_is_begun_when_the_budget_is_spent(run, monkeypatch, tmp_path) -> None:
    steps = [script(run, "first", "print(1)")]
    code, (found,) = ended(run, monkeypatch, tmp_path / "run.json", steps, "--budget", "9")
    assert (code, found["status"], found["output"]) == (1, "timed out", "")
    assert "budget" in found["why"]


@pytest.mark.parametrize(
    ("code", "more", "status", "why"),
    [
        ("import sys; print('bad'); sys.exit(1)", {}, "failed", "bad"),
        ("import sys; print('skipped: no X'); sys.exit(2)", {}, "skipped", "no X"),
        ("import sys; print('usage'); sys.exit(2)", {}, "failed", "usage"),
        ("import os; os.kill(os.getpid(), 11)", {}, "failed", ""),
        ("print(1)", {"tool": ("no-such-tool",)}, "skipped", "no-such-tool is not installed"),
        ("print(1)", {"needs": ("no_such_module",)}, "skipped", "no_such_module is not installed"),
    ],
)
def test_what_a_step_comes_to(run, monkeypatch, tmp_path, code, more, status, why) -> None:
    _, (found,) = ended(run, monkeypatch, tmp_path / "run.json", [script(run, "x", code, **more)])
    assert (found["status"], found["why"]) == (status, why)


def test_a_step_that_finds_no_gpu_on_a_machine_with_one_has_failed(run, monkeypatch, tmp_path):
    steps = [script(run, "x", f"import sys; print({run.NO_GPU!r}); sys.exit(2)")]
    code, (found,) = ended(run, monkeypatch, tmp_path / "run.json", steps)
    assert (code, found["status"]) == (1, "failed")
    monkeypatch.setattr(run, "machine", lambda: {"gpu": None})
    code, (found,) = ended(run, monkeypatch, tmp_path / "run.json", steps)
    assert (code, found["status"]) == (2, "rehearsed")


def test_only_the_named_steps_run(run, monkeypatch, tmp_path, capsys) -> None:
    steps = [script(run, "a", "print(1)"), script(run, "b", "print(2)")]
    _, found = ended(run, monkeypatch, tmp_path / "run.json", steps, "b")
    assert [step["name"] for step in found] == ["b"]
    with pytest.raises(SystemExit) as stopped:
        ended(run, monkeypatch, tmp_path / "run.json", steps, "c")
    assert stopped.value.code == 2
    assert "no step c; the steps are a, b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "counts", "status"),
    [
        ("===== 3 passed, 1 skipped in 0.10s =====", {"passed": 3, "skipped": 1}, "passed"),
        ("2 skipped in 0.05s", {"skipped": 2}, "skipped"),
        (
            "1 failed, 2 passed, 1 warning in 0.05s",
            {"failed": 1, "passed": 2, "warning": 1},
            "failed",
        ),
    ],
)
def test_counts_of_tests(run, last: str, counts: dict[str, int], status: str) -> None:
    step = run.Step("tests", 1, (), run.tests)
    outcome = run.judged(step, 1 if "failed" in counts else 0, f"...\n{last}\n", True)
    assert (outcome.facts["tests"], outcome.status) == (counts, status)


def test_counters_of_each_kernel(run) -> None:
    """As `ncu --csv --page raw` writes them, among what the program and the profiler print."""
    names = ["ID", "Kernel Name", *run.COUNTERS]
    rows = [names, ["", "", "us", "%", "%", "%"], ["0", "gemm", "12.5", "81.2", "40", "0"]]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    found = run.counters(f"==PROF== Connected\nhello\n{text}\n==PROF== Disconnected\n")
    values = dict(zip(run.COUNTERS, ["12.5", "81.2", "40", "0"], strict=True))
    assert found == {"kernels": [{"Kernel Name": "gemm", **values}]}
