"""All that only a GPU can show, in one command, for a machine that is rented by the minute.

    python3 benchmarks/gpu/run.py [STEP ...] [--output FILE] [--budget SECONDS]

Each step is a process with a time limit of its own; after each the JSON is written anew, and a table comes last.
Nothing has to be installed where prepare.py's archive was unpacked. Without a GPU it is a rehearsal: each step does all
that comes before its first launch.

Exit code: 0 everything passed, 1 something did not, 2 rehearsed without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from no_gpu import NO_GPU

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PASSED, FAILED, LATE, SKIPPED, REHEARSED = "passed", "failed", "timed out", "skipped", "rehearsed"
BUDGET = 780  # seconds: 13 of 15 minutes, so that the results come back
LEAST = 10  # seconds in which no step is begun
WORKERS = str(min(8, os.cpu_count() or 1))  # of pytest
UNHURRIED = 5  # times the limits in a rehearsal, where no minute is paid for
KEPT = 6000  # characters of each output

Found = dict[str, Any]


def no_facts(text: str) -> Found:
    """Nothing but the exit code counts."""
    return {}


def json_lines(text: str) -> Found:
    """The JSON objects that a step printed, one per line."""
    return {"results": [json.loads(line) for line in text.splitlines() if line.startswith("{")]}


def json_object(text: str) -> Found:
    """The JSON object that a step's output ends with."""
    return {"results": json.loads(text[text.index("{") :])} if "{" in text else {}


def tests(text: str) -> Found:
    """pytest's counts."""
    last = next((line for line in reversed(text.splitlines()) if " in " in line), "")
    return {"tests": {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", last)}}


def counters(text: str) -> Found:
    """What Nsight Compute says of each kernel: a row of units follows that of names."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    return {"kernels": [{k: v for k, v in row.items() if k in KEEP_COUNTERS} for row in rows[1:]]}


COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "share of the memory's bandwidth",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "share of the L2's",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "share of the tensor cores'",
}
KEEP_COUNTERS = ("Kernel Name", *COUNTERS)


@dataclass(frozen=True)
class Step:
    """One part of the run.

    Attributes:
        name: on the command line and in the JSON.
        limit: seconds.
        command: what is run; "{work}" is a folder for its files, "{workers}" a number for pytest.
        read: what its output says, for the JSON.
        tool: a program that runs the command, with its options; the step is skipped where it is missing.
        needs: Python modules, of which one must be there.
    """

    name: str
    limit: int
    command: tuple[str | Path, ...]
    read: Callable[[str], Found] = no_facts
    tool: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def pytest(file: str, *options: str) -> tuple[str | Path, ...]:
    """A command that runs tests."""
    return (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        *options,
        ROOT / "tests" / "gpu" / file,
    )


NCU = (
    *("ncu", "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off"),
    *("--metrics", ",".join(COUNTERS)),
)
STEPS = (
    Step("kernels", 150, (sys.executable, HERE / "kernels.py"), json_lines),
    Step(
        "plugin-tests",
        180,
        pytest(
            "test_plugins_on_gpu.py", "-n", "{workers}", "-k", "not sanitizer and not benchmark"
        ),
        tests,
    ),
    Step(
        "plugin-times",
        200,
        (
            sys.executable,
            ROOT / "benchmarks" / "plugins.py",
            "--no-peers",
            "--work",
            "{work}",
            "--output",
            "{work}/times.json",
        ),
    ),
    Step(
        "sanitizer",
        150,
        pytest("test_plugins_on_gpu.py", "-n", "{workers}", "-k", "sanitizer"),
        tests,
    ),
    *(
        Step(
            f"counters-{tokens}",
            60,
            (sys.executable, HERE / "profiled.py", str(tokens)),
            counters,
            NCU,
        )
        for tokens in (1, 4096)
    ),
    Step("cuda", 60, (ROOT / "build" / "cpp" / "release" / "cuda_device",)),
    Step("self-tests", 150, (sys.executable, HERE / "self_tests.py"), json_lines),
    Step("gpu-tests", 300, pytest("test_on_gpu.py", "-n", "{workers}"), tests),
    Step("cpp-tests", 200, pytest("test_cpp_on_gpu.py"), tests, needs=("tensorrt",)),
    Step("attention", 300, (sys.executable, HERE / "forms.py", "{work}"), json_lines),
    Step("provider", 150, (sys.executable, HERE / "provider.py", "{work}"), json_lines),
)


@dataclass
class Outcome:
    """What came of a step."""

    name: str
    status: str
    seconds: float = 0.0
    why: str = ""
    facts: Found = field(default_factory=dict)
    output: str = ""


def environment() -> dict[str, str]:
    """A step's environment: our Python from here, wheels that came along, and no network."""
    paths = [str(ROOT), *([str(site())] if site().is_dir() else [])]
    known = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *([known] if known else [])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def site() -> Path:
    """Where the wheels are unpacked."""
    return ROOT / "site"


def unpack_wheels() -> str:
    """Unpack the wheels that came along; what went wrong, if anything did."""
    wheels = sorted((ROOT / "wheels").glob("*.whl"))
    if not wheels or site().is_dir():
        return ""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command = [*pip, "--target", str(site()), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stderr[-KEPT:] if done.returncode else ""


ASK_TORCH = """
import json, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps({"torch": torch.__version__, "gpu": gpu}))
"""


def machine() -> Found:
    """The GPU, its driver, the versions and the tools; without the machine's name."""
    facts: Found = {"python": platform.python_version(), "cores": os.cpu_count(), "gpu": None}
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=120
        )
        facts |= json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-KEPT:]}
    except subprocess.TimeoutExpired:
        facts["error"] = "PyTorch did not say within 120 s which GPU there is"
    if shutil.which("nvidia-smi"):
        asked = "name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        facts["nvidia-smi"] = dict(
            zip(asked.split(","), done.stdout.strip().split(", "), strict=False)
        )
    for name in ("ncu", "compute-sanitizer", "nvcc"):
        facts[name] = found_tool(name) is not None
    return facts


def found_tool(name: str) -> str | None:
    """A program of PATH, or of the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def missing(step: Step) -> str:
    """Why a step cannot run on a machine with a GPU; "" if it can."""
    import importlib.util

    if step.tool and found_tool(step.tool[0]) is None:
        return f"{step.tool[0]} is not installed"
    if step.needs and not any(importlib.util.find_spec(name) for name in step.needs):
        return f"{' and '.join(step.needs)} is not installed"
    if step.command[0] != sys.executable and not Path(step.command[0]).is_file():
        return f"{Path(step.command[0]).name} was not compiled"
    return ""


def perform(step: Step, gpu: bool, seconds: float, work: Path) -> Outcome:
    """Run a step within its limit."""
    why = missing(step)
    if why and (gpu or step.needs or "compiled" in why):
        return Outcome(step.name, SKIPPED, why=why)
    work.mkdir(parents=True, exist_ok=True)
    tool: Sequence[str] = step.tool if gpu else ()
    command = [str(found_tool(tool[0])), *tool[1:]] if tool else []
    places = {"{work}": str(work), "{workers}": WORKERS if gpu else "0"}
    for part in map(str, step.command):
        for place, value in places.items():
            part = part.replace(place, value)
        command.append(part)
    start = time.perf_counter()
    with (work / "output").open("w+", encoding="utf-8", errors="replace") as stream:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            limit = step.limit if gpu else step.limit * UNHURRIED
            code: int | None = child.wait(timeout=min(limit, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(child)
        stream.seek(0)
        text = stream.read()
    outcome = judged(step, code, text, gpu)
    outcome.seconds = round(time.perf_counter() - start, 1)
    times = work / "times.json"
    if times.is_file():
        outcome.facts["results"] = json.loads(times.read_text(encoding="utf-8"))
    return outcome


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a step and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def judged(step: Step, code: int | None, text: str, gpu: bool) -> Outcome:
    """What a step's exit code and output say."""
    lines = text.strip().splitlines() or [""]
    try:
        facts = step.read(text)
    except (ValueError, KeyError, IndexError) as error:
        facts = {"unread": f"{type(error).__name__}: {error}"}
    outcome = Outcome(step.name, PASSED, facts=facts, output=text[-KEPT:])
    counts = facts.get("tests", {})
    if code is None:
        outcome.status, outcome.why = LATE, f"after its limit: {lines[-1]}"
    elif not gpu and (NO_GPU in text or "there is none here" in text) and not counts.get("failed"):
        outcome.status, outcome.why = REHEARSED, NO_GPU
    elif code == 2 and lines[-1].startswith("skipped: "):
        outcome.status, outcome.why = SKIPPED, lines[-1].removeprefix("skipped: ")
    elif code:
        outcome.status, outcome.why = FAILED, lines[-1]
    elif counts and not counts.get("passed"):
        outcome.status, outcome.why = SKIPPED, "no test could run here"
    elif counts:
        outcome.why = ", ".join(f"{count} {what}" for what, count in counts.items())
    return outcome


def main() -> int:
    """Run the steps; see the module's docstring."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"some of: {', '.join(names)} (default: all)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu-run.json"),
        help="where the JSON goes (default: %(default)s)",
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds for all steps (default: %(default)s)"
    )
    given = parser.parse_args()
    if unknown := set(given.steps) - set(names):
        parser.error(f"no step {', '.join(sorted(unknown))}; the steps are {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a step that runs is stopped, too
    end = time.monotonic() + given.budget
    print("looking at the machine ...", flush=True)
    data: Found = {
        "benchmark": "gpu-run",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wheels": unpack_wheels()
        or [path.name for path in sorted((ROOT / "wheels").glob("*.whl"))],
        "machine": machine(),
        "steps": [],
    }
    gpu = data["machine"]["gpu"] is not None
    print(f"{data['machine']['gpu'] or 'no GPU: a rehearsal'}", flush=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        for step in STEPS:
            if given.steps and step.name not in given.steps:
                continue
            left = end - time.monotonic()
            print(f"{step.name} ...", end=" ", flush=True)
            if left < LEAST:
                outcome = Outcome(step.name, LATE, why="not begun: the budget is spent")
            else:
                outcome = perform(step, gpu, left, Path(scratch) / step.name)
            outcomes.append(outcome)
            print(outcome.status, flush=True)
            data["steps"] = [asdict(outcome) for outcome in outcomes]
            partial = given.output.with_name(f".{given.output.name}.partial")
            partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            partial.replace(given.output)
    print()
    for outcome in outcomes:
        print(f"{outcome.name:14} {outcome.status:10} {outcome.seconds:6.1f} s  {outcome.why:.80}")
    print(f"written: {given.output}")
    if any(outcome.status in (FAILED, LATE) for outcome in outcomes):
        return 1
    return 0 if gpu else 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the JSON has the steps that ended, if any did")
