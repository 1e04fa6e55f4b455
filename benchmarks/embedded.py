"""The C++ runtime: choosing a token on the CPU, and decode steps on a GPU with and without CUDA graphs.

    python benchmarks/embedded.py
    python benchmarks/embedded.py --engine tiny.engine     # where there is a GPU and TensorRT
    python benchmarks/embedded.py --quick

Needs `make cpp`. Every run is a separate process; contenders take turns.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import click
from measure import ROOT
from report import Columns, Report, Result, benchmark, figure, middle, table

sys.path.insert(0, str(ROOT / "tests" / "cpp"))
from builds import BuildError, built

VOCAB = 151_936  # of Qwen2.5
SETTINGS = {
    "greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    "temperature": {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    "top-p": {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
    "top-k, top-p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
}
SAMPLERS = ("C++", "Python", "transformers")
RUNTIMES = ("C++, CUDA graphs", "C++, without graphs", "Python")
CONTEXT, STEPS = 128, 10_000
COLUMNS: Columns = {
    "what: who": figure("contender"),
    "per step": figure("median_seconds", "{:.0f} us", 1e-6),
    "steps per second": figure("steps_per_second", "{:.0f}"),
    "device memory grew by": figure("device_growth_bytes", "{} bytes"),
}


def run(script: str, contender: str, facts: dict[str, Any], turn: int, report: Report) -> None:
    """Run one process; `contender` and `facts` go into its request."""
    request = {"contender": contender.partition(": ")[2], **facts}
    done = report.call(contender, f"{script}.py", request)
    seconds = done.result.get("seconds", [])
    report.add_run(
        contender,
        turn=turn,
        median_seconds=middle(seconds),
        steps=len(seconds),
        device_growth_bytes=done.result.get("device_growth"),
        tokens=done.result.get("tokens"),
        load=done.load,
        others=done.others,
        error=done.error,
    )


def summarise(report: Report, contender: str) -> dict[str, Any]:
    """A contender's medians."""
    times = report.values(contender, "median_seconds")
    return {
        "contender": contender,
        "runs": len(times),
        "median_seconds": middle(times),
        "steps_per_second": 1 / median(times) if times else None,
        "device_growth_bytes": max(report.values(contender, "device_growth_bytes"), default=None),
        "error": report.error(contender),
    }


@benchmark("embedded", repeats=3)
@click.option(
    "--engine",
    type=click.Path(exists=True, path_type=Path, file_okay=False),
    help="A `tensorrt` engine directory for the local GPU; without it decoding is not measured.",
)
def main(report: Report, engine: Path | None) -> Result:
    """Time the C++ runtime's sampling, and its decode steps on a GPU."""
    try:
        build = built("release")
    except BuildError as error:
        raise click.ClickException(str(error)) from error
    draws, steps = (3, 50) if report.quick else (50, STEPS)
    report.settings |= {"vocab": VOCAB, "draws": draws, "engine": engine is not None}
    samplers = SAMPLERS if report.peers else SAMPLERS[:2]
    drawing = {f"{name}: {who}": name for name in SETTINGS for who in samplers}
    decoding = [f"decode: {who}" for who in RUNTIMES] if engine else []
    for turn in report.turns():
        for contender, name in drawing.items():
            facts: dict[str, Any] = {**SETTINGS[name], "vocab": VOCAB, "draws": draws}
            facts["repetition_penalty"] = 1.0
            facts["library"] = str(build / "libqwenport_stand_in.so")
            run("sampling", contender, facts, turn, report)
        for contender in decoding:
            facts = {"engine": str(engine), "context": CONTEXT, "steps": steps}
            facts["library"] = str(build / "runtime" / "libqwenport.so")
            facts["tests"] = str(ROOT / "tests")
            run("embedded_decode", contender, facts, turn, report)
    for name in SETTINGS:
        ours, theirs = (report.values(f"{name}: {who}", "tokens") for who in SAMPLERS[:2])
        if ours != theirs:
            raise click.ClickException(f"{name}: C++ and Python drew different tokens")
    summary = [summarise(report, contender) for contender in (*drawing, *decoding)]
    own = [contender for contender in (*drawing, *decoding) if "transformers" not in contender]
    return Result([table("Medians", COLUMNS, summary)], summary, own=own)


if __name__ == "__main__":
    main()
