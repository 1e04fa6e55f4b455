"""The cost of proving parity: the bundled checkpoints whole, and the shape of Qwen2.5-7B streamed.

    python benchmarks/validation.py
    python benchmarks/validation.py --quick

Every run is `qwenport validate` in a separate process, with all scenarios: a package run by onnxruntime, and the
network that TensorRT's parser makes from it. The 7B shape (15 GB of random bf16 weights) exceeds the memory that the
process may use, so both sides run one decoder layer at a time. No peer has a parity command that can fail, so there is
no comparison.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters import export_anew, make_shape
from measure import ROOT, measure, read_once
from report import GB, Bar, Columns, Report, Result, benchmark, figure, middle, scaled, table

EXAMPLES = ("tiny-qwen2.5", "tiny-qwen2-moe")
SHAPE = "qwen2.5-7b-instruct"
MAX_SEQ_LEN = "8192"  # a single layer is run this far
WAYS = {"package": (), "network": ("--as", "tensorrt-network")}
BUNDLED_SECONDS, STREAMED_BYTES = 120, 7e9
COLUMNS: Columns = {
    "model, judged as": figure("contender"),
    "wall": figure("seconds", "{:.1f} s"),
    "peak RSS": figure("peak_rss_bytes", "{:.2f} GB", GB),
    "worst, in transformers' own error": figure("worst_own_ratio", "{:.2f}"),
}


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
        """The name in the report."""
        return f"{self.model}, {self.way}"

    def command(self) -> list[str | Path]:
        """`qwenport validate`."""
        start: list[str | Path] = [sys.executable, "-m", "qwenport", "validate", self.package]
        streamed = ("--stream",) if self.streamed else ()
        reference = ("--reference", self.checkpoint, "--quiet", "--json")
        return [*start, *reference, *WAYS[self.way], *streamed]


def run(entrant: Entrant, turn: int, report: Report) -> None:
    """Validate once and record it."""
    done = measure(entrant.command(), report.log(entrant.name))
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
    """The bounds: all bundled checkpoints, package and network, in two minutes; the large one within its memory."""
    small = [row["seconds"] for row in summary if not row["streamed"]]
    rss = scaled(max(row["peak_rss_bytes"] for row in summary if row["streamed"]), GB)
    return [
        Bar("bundled checkpoints, all together", sum(small), BUNDLED_SECONDS, "at most", "s"),
        Bar("7B shape, peak RSS", rss, STREAMED_BYTES / GB, "at most", "GB"),
    ]


@benchmark("validation", repeats=3)
def main(report: Report) -> Result:
    """Time `qwenport validate` and measure its peak memory. The 7B shape is run once."""
    report.settings["peers"] = False  # there are none
    folder = report.work / "validation"
    entrants = []
    for name in EXAMPLES[:1] if report.quick else EXAMPLES:
        checkpoint = ROOT / "examples" / name
        package = export_anew(checkpoint, folder / f"{name}.package", report, "--weights", "copy")
        entrants += [Entrant(name, way, checkpoint, package, False) for way in WAYS]
    shape = "tiny" if report.quick else SHAPE
    checkpoint = make_shape(shape, report.work, sparse=False)
    length = () if report.quick else ("--max-seq-len", MAX_SEQ_LEN)
    package = export_anew(checkpoint, folder / f"{shape}.package", report, *length)
    large = [Entrant(shape, way, checkpoint, package, True) for way in WAYS]
    for turn in report.turns():
        for entrant in entrants:
            run(entrant, turn, report)
    read_once(checkpoint)
    for entrant in large:
        run(entrant, 1, report)
    shutil.rmtree(folder, ignore_errors=True)
    summary = [summarise(report, entrant) for entrant in (*entrants, *large)]
    judged = [] if report.quick else bars(summary)
    own = [row["contender"] for row in summary]
    return Result([table("`qwenport validate`, medians", COLUMNS, summary)], summary, judged, own)


if __name__ == "__main__":
    main()
