"""Export: wall time, peak memory and bytes written, ours and the peers'.

    python benchmarks/export.py
    python benchmarks/export.py --quick

A Qwen2.5-0.5B-shaped checkpoint by every contender, then Qwen2.5-72B's and Llama-3.1-405B's shapes
(sparse files) by ours. Every run is a process of its own; contenders take turns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from exporters import export_commands, make_shape
from measure import child_environment, file_bytes, measure, read_once, written_bytes
from report import Bar, Report, middle, options, output_path
from rich.table import Table

SHAPE, LARGE, LARGEST = "qwen2.5-0.5b-instruct", "qwen2.5-72b-instruct", "llama-3.1-405b-instruct"
OURS = "qwenport"
GENAI = "onnxruntime-genai"
GB, MB = 1e9, 1e6


@dataclass(frozen=True)
class Contender:
    """Something that exports a checkpoint."""

    name: str
    shape: str
    checkpoint: Path
    command: Callable[[Path], list[str | Path]]  # of the output directory
    own: bool


def contenders(report: Report, work: Path, quick: bool, peers: bool) -> list[Contender]:
    """Everything that is to run, with its checkpoint made."""
    shape = "tiny" if quick else SHAPE
    checkpoint = make_shape(shape, work, sparse=False)
    found = []
    for name, (command, own) in export_commands(report, checkpoint, work, peers).items():
        found.append(Contender(name, shape, checkpoint, command, own))
    for large in () if quick else (LARGE, LARGEST):
        sparse = make_shape(large, work, sparse=True)
        ((command, _),) = export_commands(report, sparse, work, peers=False).values()
        found.append(Contender(f"{OURS} {large}", large, sparse, command, True))
    return found


def run(contender: Contender, work: Path, report: Report) -> None:
    """Export once; the result is removed."""
    output = work / "exports" / contender.name.replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = child_environment(contender.own)
    log = work / "logs" / f"export-{output.name}.log"
    os.sync()  # what the one before wrote is not to slow this one down
    done = measure(contender.command(output), log, environment)
    report.add_run(
        contender.name,
        shape=contender.shape,
        seconds=round(done.seconds, 3),
        peak_rss_bytes=done.peak_rss,
        written_bytes=None if done.code else written_bytes(output, contender.checkpoint),
        load=done.load,
        others=done.others,
        error=done.error,
    )
    shutil.rmtree(output, ignore_errors=True)


def summarise(report: Report, contender: Contender) -> dict[str, Any]:
    """A contender's medians."""
    value = partial(report.values, contender.name)
    ok = not report.failed(contender.name)
    return {
        "contender": contender.name,
        "shape": contender.shape,
        "checkpoint_bytes": file_bytes(contender.checkpoint, "*.safetensors"),
        "runs": len(value("seconds")),
        "seconds": middle(value("seconds")) if ok else None,
        "peak_rss_bytes": middle(value("peak_rss_bytes")) if ok else None,
        "written_bytes": middle(value("written_bytes")) if ok else None,
        "error": next(iter(value("error")), None),
    }


def bars(summary: list[dict[str, Any]]) -> list[Bar]:
    """What our export is to keep."""
    by_name = {row["contender"]: row for row in summary}
    ours, large = by_name[OURS], by_name[f"{OURS} {LARGE}"]
    genai = {
        name: row["seconds"]
        for name, row in by_name.items()
        if name.startswith(GENAI) and row["seconds"]
    }
    found = []
    for name, seconds in genai.items():
        ratio = ours["seconds"] / seconds if ours["seconds"] else None
        found.append(Bar(f"wall time to {name}", ratio, 0.5, "at most", "x"))
    rss, written = scaled(ours["peak_rss_bytes"], GB), scaled(ours["written_bytes"], MB)
    found.append(Bar("peak RSS", rss, 1.0, "at most", "GB"))
    found.append(Bar("written", written, 100, "at most", "MB"))
    growth = large["seconds"] / ours["seconds"] if large["seconds"] and ours["seconds"] else None
    found.append(Bar("72B shape, wall time to 0.5B's", growth, 2.0, "at most", "x"))
    large_rss = scaled(large["peak_rss_bytes"], GB)
    found.append(Bar("72B shape, peak RSS", large_rss, 1.0, "at most", "GB"))
    return found


def scaled(value: float | None, unit: float) -> float | None:
    """A number in a larger unit."""
    return None if value is None else value / unit


def table(summary: list[dict[str, Any]]) -> Table:
    """The medians, for people."""
    made = Table("contender", "checkpoint", "wall", "peak RSS", "written", title="Export, medians")
    for row in summary:
        size = f"{row['checkpoint_bytes'] / GB:.2f} GB"
        if row["seconds"] is None:
            made.add_row(row["contender"], size, "failed")
            continue
        made.add_row(
            row["contender"],
            size,
            f"{row['seconds']:.2f} s",
            f"{row['peak_rss_bytes'] / GB:.2f} GB",
            f"{row['written_bytes'] / MB:.1f} MB",
        )
    return made


@click.command(context_settings={"show_default": True})
@options("export", repeats=3)
def main(quick: bool, no_peers: bool, repeats: int, work: Path, output: Path | None) -> None:
    """Time the export of a checkpoint, by Qwenport and by its peers."""
    repeats = 1 if quick else repeats
    report = Report("export", quick, {"repeats": repeats, "peers": not (no_peers or quick)})
    entrants = contenders(report, work, quick, peers=not (no_peers or quick))
    read_once(entrants[0].checkpoint)
    for turn in range(repeats):
        report.say(f"turn {turn + 1} of {repeats}")
        for contender in entrants:
            if not report.failed(contender.name):
                run(contender, work, report)
    summary = [summarise(report, contender) for contender in entrants]
    judged = [] if quick else bars(summary)
    report.finish(table(summary), summary, judged, output_path("export", quick, work, output))
    if report.failed(OURS):
        raise click.ClickException("our export failed")


if __name__ == "__main__":
    main()
