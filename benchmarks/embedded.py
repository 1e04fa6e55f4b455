"""The C++ runtime: choosing a token on the CPU, and decode steps on a GPU with and without CUDA graphs.

    python benchmarks/embedded.py
    python benchmarks/embedded.py --engine tiny.engine     # where there is a GPU and TensorRT
    python benchmarks/embedded.py --quick

Needs `make cpp`. Every run is a process of its own; contenders take turns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click
from measure import CONTENDERS, ROOT, child_environment, measure
from report import Report, middle, options, output_path
from rich.table import Table

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


def run(
    script: str, contender: str, facts: dict[str, Any], turn: int, work: Path, report: Report
) -> None:
    """One process; its `contender` and `facts` go into its request."""
    request = {"contender": contender.partition(": ")[2], **facts}
    log = work / "logs" / f"{script}-{contender.replace(' ', '-').replace(',', '')}.log"
    command = [sys.executable, CONTENDERS / f"{script}.py", json.dumps(request)]
    done = measure(command, log, child_environment())
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
        "error": next(iter(report.values(contender, "error")), None),
    }


def table(summary: list[dict[str, Any]]) -> Table:
    """The medians, for people."""
    made = Table("what: who", "a step", "steps a second", "device memory grew by", title="Medians")
    for row in summary:
        if row["error"] or row["median_seconds"] is None:
            made.add_row(row["contender"], "failed" if row["error"] else "not measured")
            continue
        grown = row["device_growth_bytes"]
        made.add_row(
            row["contender"],
            f"{row['median_seconds'] * 1e6:.0f} us",
            f"{row['steps_per_second']:.0f}",
            "" if grown is None else f"{grown} bytes",
        )
    return made


@click.command(context_settings={"show_default": True})
@options("embedded", repeats=3)
@click.option(
    "--engine",
    type=click.Path(exists=True, path_type=Path, file_okay=False),
    help="A `tensorrt` engine directory for the GPU at hand; without it decoding is not measured.",
)
def main(
    quick: bool, no_peers: bool, repeats: int, work: Path, output: Path | None, engine: Path | None
) -> None:
    """Time the C++ runtime's sampling, and its decode steps on a GPU."""
    try:
        build = built("release")
    except BuildError as error:
        raise click.ClickException(str(error)) from error
    repeats, draws, steps = (1, 3, 50) if quick else (repeats, 50, STEPS)
    settings = {"repeats": repeats, "vocab": VOCAB, "draws": draws, "engine": engine is not None}
    report = Report("embedded", quick, settings)
    samplers = SAMPLERS[:2] if no_peers or quick else SAMPLERS
    drawing = {f"{name}: {who}": name for name in SETTINGS for who in samplers}
    decoding = [f"decode: {who}" for who in RUNTIMES] if engine else []
    for turn in range(1, repeats + 1):
        report.say(f"turn {turn} of {repeats}")
        for contender, name in drawing.items():
            facts = {**SETTINGS[name], "vocab": VOCAB, "draws": draws, "repetition_penalty": 1.0}
            facts["library"] = str(build / "libqwenport_stand_in.so")
            run("sampling", contender, facts, turn, work, report)
        for contender in decoding:
            facts = {"engine": str(engine), "context": CONTEXT, "steps": steps}
            facts["library"] = str(build / "runtime" / "libqwenport.so")
            facts["tests"] = str(ROOT / "tests")
            run("embedded_decode", contender, facts, turn, work, report)
    for name in SETTINGS:
        ours, theirs = (report.values(f"{name}: {who}", "tokens") for who in SAMPLERS[:2])
        if ours != theirs:
            raise click.ClickException(f"{name}: C++ and Python drew different tokens")
    summary = [summarise(report, contender) for contender in (*drawing, *decoding)]
    report.finish(table(summary), summary, [], output_path("embedded", quick, work, output))
    for contender in (*drawing, *decoding):
        if "transformers" not in contender and report.failed(contender):
            raise click.ClickException(f"{contender} failed")


if __name__ == "__main__":
    main()
