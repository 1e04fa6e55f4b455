"""What proving parity costs: the bundled checkpoints whole, and the shape of Qwen2.5-7B streamed.

    python benchmarks/validation.py
    python benchmarks/validation.py --quick

Every run is `qwenport validate` in a process of its own, all scenarios: a package run by onnxruntime, and the network
that TensorRT's parser makes of it. The 7B shape (15 GB of random bf16 weights) is larger than what the process may
hold, so both sides go one decoder layer at a time. No peer has a parity command that can fail, so there is nobody to
compare with.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from exporters import make_shape, ours
from measure import ROOT, measure, read_once
from report import Bar, Report, middle, options, output_path
from rich.table import Table

EXAMPLES = ("tiny-qwen2.5", "tiny-qwen2-moe")
SHAPE = "qwen2.5-7b-instruct"
MAX_SEQ_LEN = "8192"  # as far as a single layer is run
WAYS = {"package": (), "network": ("--as", "tensorrt-network")}
BUNDLED_SECONDS, STREAMED_BYTES = 120, 7e9
GB = 1e9


@dataclass(frozen=True)
class Entrant:
    """One model, judged in one way."""

    model: str
    way: str
    checkpoint: Path
    package: Path
    streamed: bool

    @property
    def name(self) -> str:
        """In the report."""
        return f"{self.model}, {self.way}"

    def command(self) -> list[str | Path]:
        """`qwenport validate`."""
        start: list[str | Path] = [sys.executable, "-m", "qwenport", "validate", self.package]
        streamed = ("--stream",) if self.streamed else ()
        reference = ("--reference", self.checkpoint, "--quiet", "--json")
        return [*start, *reference, *WAYS[self.way], *streamed]


def export(checkpoint: Path, package: Path, work: Path, *arguments: str) -> Path:
    """Make the package afresh."""
    shutil.rmtree(package, ignore_errors=True)
    package.parent.mkdir(parents=True, exist_ok=True)
    done = measure(ours(checkpoint, *arguments)(package), work / "logs" / "validation-export.log")
    if done.code:
        raise click.ClickException(f"cannot export {checkpoint.name}: {done.error}")
    return package


def run(entrant: Entrant, turn: int, work: Path, report: Report) -> None:
    """Validate once and record it."""
    done = measure(entrant.command(), work / "logs" / f"validation-{entrant.name}.log")
    facts: dict[str, Any] = {}
    if done.result:
        metrics = [s["metrics"] for s in done.result["scenarios"] if s["metrics"]]
        facts = {
            "passed": done.result["passed"],
            "reference_mode": done.result["reference_mode"],
            "positions": sum(m["positions"] for m in metrics),
            "worst_rel_l2": max(m["rel_l2"] for m in metrics),
            "worst_own_ratio": max(m["own_ratio"] for m in metrics),
        }
    report.add_run(
        entrant.name,
        turn=turn,
        seconds=done.seconds,
        peak_rss_bytes=done.peak_rss,
        **facts,
        load=done.load,
        others=done.others,
        error=done.error,
    )


def summarise(report: Report, entrant: Entrant) -> dict[str, Any]:
    """The medians of one entrant."""
    runs = [r for r in report.data["runs"] if r["contender"] == entrant.name]
    failed = [r["error"] or "parity does not hold" for r in runs if not r.get("passed")]
    return {
        "contender": entrant.name,
        "streamed": entrant.streamed,
        "seconds": middle(report.values(entrant.name, "seconds")),
        "peak_rss_bytes": max(report.values(entrant.name, "peak_rss_bytes"), default=None),
        "worst_own_ratio": max(report.values(entrant.name, "worst_own_ratio"), default=None),
        "runs": len(runs),
        "error": failed[0] if failed else None,
    }


def bars(summary: list[dict[str, Any]]) -> list[Bar]:
    """All bundled checkpoints, package and network, in two minutes; the large one within its memory."""
    small = [row["seconds"] for row in summary if not row["streamed"]]
    large = [row["peak_rss_bytes"] for row in summary if row["streamed"]]
    return [
        Bar("bundled checkpoints, all together", sum(small), BUNDLED_SECONDS, "at most", "s"),
        Bar(
            "7B shape, peak RSS",
            max(large) / GB if large else None,
            STREAMED_BYTES / GB,
            "at most",
            "GB",
        ),
    ]


def table(summary: list[dict[str, Any]]) -> Table:
    """For people."""
    made = Table("model, judged as", "wall", "peak RSS", "worst, in transformers' own error")
    for row in summary:
        if row["error"]:
            made.add_row(row["contender"], "failed")
            continue
        made.add_row(
            row["contender"],
            f"{row['seconds']:.1f} s",
            f"{row['peak_rss_bytes'] / GB:.2f} GB",
            f"{row['worst_own_ratio']:.2f}",
        )
    return made


@click.command(context_settings={"show_default": True})
@options("validation", repeats=3)
def main(quick: bool, no_peers: bool, repeats: int, work: Path, output: Path | None) -> None:
    """Time `validate`, and what it holds in memory. The 7B shape is run once."""
    repeats = 1 if quick else repeats
    folder = work / "validation"
    entrants = []
    for name in EXAMPLES[:1] if quick else EXAMPLES:
        checkpoint = ROOT / "examples" / name
        package = export(checkpoint, folder / f"{name}.package", work, "--weights", "copy")
        entrants += [Entrant(name, way, checkpoint, package, False) for way in WAYS]
    shape = "tiny" if quick else SHAPE
    checkpoint = make_shape(shape, work, sparse=False)
    length = () if quick else ("--max-seq-len", MAX_SEQ_LEN)
    package = export(checkpoint, folder / f"{shape}.package", work, *length)
    large = [Entrant(shape, way, checkpoint, package, True) for way in WAYS]
    report = Report("validation", quick, {"repeats": repeats, "peers": False})
    for turn in range(1, repeats + 1):
        for entrant in entrants:
            run(entrant, turn, work, report)
    read_once(checkpoint)
    for entrant in large:
        run(entrant, 1, work, report)
    shutil.rmtree(folder, ignore_errors=True)
    summary = [summarise(report, entrant) for entrant in (*entrants, *large)]
    judged = [] if quick else bars(summary)
    report.finish(table(summary), summary, judged, output_path("validation", quick, work, output))
    if any(row["error"] for row in summary):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
