"""Export: wall time, peak memory and bytes written, ours and the peers'.

    python benchmarks/export.py
    python benchmarks/export.py --quick

A Qwen2.5-0.5B-shaped checkpoint by every contender, then Qwen2.5-72B's and Llama-3.1-405B's shapes
(sparse files) by ours, 72B's also quantized: pack-quantized, by reference, and GPTQ with act-order, which is
repacked and takes 42 GB of disk. Every run is a separate process; contenders take turns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from exporters import export_commands, make_shape, ours
from measure import child_environment, file_bytes, measure, read_once, written_bytes
from report import GB, MB, Bar, Columns, Report, Result, benchmark, figure, middle, scaled, table
from shapes import QUANTIZED

SHAPE, LARGE, LARGEST = "qwen2.5-0.5b-instruct", "qwen2.5-72b-instruct", "llama-3.1-405b-instruct"
OURS = "qwenport"
GENAI = "onnxruntime-genai"
COLUMNS: Columns = {
    "contender": figure("contender"),
    "checkpoint": figure("checkpoint_bytes", "{:.2f} GB", GB),
    "wall": figure("seconds", "{:.2f} s"),
    "peak RSS": figure("peak_rss_bytes", "{:.2f} GB", GB),
    "written": figure("written_bytes", "{:.1f} MB", MB),
}


@dataclass(frozen=True)
class Contender:
    """Something that exports a checkpoint."""

    name: str
    shape: str
    checkpoint: Path
    command: Callable[[Path], list[str | Path]]  # takes the output directory
    own: bool


def contenders(report: Report) -> list[Contender]:
    """Every contender, with its checkpoint made."""
    shape = "tiny" if report.quick else SHAPE
    checkpoint = make_shape(shape, report.work, sparse=False)
    found = []
    for name, (command, own) in export_commands(report, checkpoint).items():
        found.append(Contender(name, shape, checkpoint, command, own))
    for large in () if report.quick else (LARGE, LARGEST):
        sparse = make_shape(large, report.work, sparse=True)
        found.append(Contender(f"{OURS} {large}", large, sparse, ours(sparse), True))
    for quantized in () if report.quick else QUANTIZED:
        sparse = make_shape(LARGE, report.work, sparse=True, quantized=quantized)
        found.append(Contender(f"{OURS} {LARGE} {quantized}", LARGE, sparse, ours(sparse), True))
    return found


def run(contender: Contender, report: Report) -> None:
    """Export once; the result is removed."""
    output = report.work / "exports" / contender.name.replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = child_environment(contender.own)
    os.sync()  # so that the previous run's writes do not slow this one down
    done = measure(contender.command(output), report.log(contender.name), environment)
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
    error = report.error(contender.name)
    return {
        "contender": contender.name,
        "shape": contender.shape,
        "checkpoint_bytes": file_bytes(contender.checkpoint, "*.safetensors"),
        "runs": len(value("seconds")),
        "seconds": middle(value("seconds")) if not error else None,
        "peak_rss_bytes": middle(value("peak_rss_bytes")) if not error else None,
        "written_bytes": middle(value("written_bytes")) if not error else None,
        "error": error,
    }


def bars(summary: list[dict[str, Any]]) -> list[Bar]:
    """The bounds that our export must keep."""
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
    gptq, packed = (by_name[f"{OURS} {LARGE} {name}"] for name in ("gptq", "pack-quantized"))
    gptq_rss = scaled(gptq["peak_rss_bytes"], GB)
    found.append(Bar("72B shape, GPTQ, peak RSS", gptq_rss, 1.0, "at most", "GB"))
    slower = (
        packed["seconds"] / large["seconds"] if packed["seconds"] and large["seconds"] else None
    )
    found.append(Bar("72B shape, pack-quantized to bf16, wall time", slower, 1.1, "at most", "x"))
    return found


@benchmark("export", repeats=3)
def main(report: Report) -> Result:
    """Time the export of a checkpoint, by Qwenport and by its peers."""
    entrants = contenders(report)
    read_once(entrants[0].checkpoint)
    for _ in report.turns():
        for contender in entrants:
            if not report.error(contender.name):
                run(contender, report)
    summary = [summarise(report, contender) for contender in entrants]
    judged = [] if report.quick else bars(summary)
    return Result([table("Export, medians", COLUMNS, summary)], summary, judged, [OURS])


if __name__ == "__main__":
    main()
