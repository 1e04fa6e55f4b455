"""Does `validate` reject a correct real model? SmolLM2-135M in half precision, judged on many texts.

    python benchmarks/false_alarms.py
    python benchmarks/false_alarms.py --quick

The model (benchmarks/smollm2.py) has the outlier activations of a trained model, which random weights lack. Its
package in bf16, as published, and in fp16 is judged in two forms, run by onnxruntime and as the network that
TensorRT's parser makes from it, each time with another prompt file: a slice of a page of docs/. The package, which runs
in fp32, is judged with two of them. As many run at once as there are cores. Every verdict that parity does not hold is
a false alarm. With --quick the bundled checkpoint replaces the model, in bf16 with one prompt.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from exporters import export_anew
from measure import ROOT, child_environment, cores, measure
from report import Bar, Columns, Report, Result, Row, benchmark, figure, table
from smollm2 import make_checkpoint

FORMS = {"package": (), "network": ("--as", "tensorrt-network")}
DTYPES = ("bf16", "fp16")
PROMPTS = 10
PROMPTS_OF_PACKAGE = (
    2  # run in fp32: only rounding differs between prompts, and only the network has it
)
CHARACTERS = 6000  # per prompt file, about 1,500 tokens
MAX_SEQ_LEN = "2048"
TINY = ROOT / "examples" / "tiny-qwen2.5"
HALF = (
    "in bf16",
    "in fp16",
    "rounding of layers",
    "rounding of operators",
)  # rows of half precision


@dataclass(frozen=True)
class Entrant:
    """One package, judged in one form."""

    dtype: str
    form: str
    checkpoint: Path
    package: Path

    @property
    def name(self) -> str:
        """The name in the report."""
        return f"{self.dtype}, {self.form}"

    def command(self, prompts: Path, budget: str) -> list[str | Path]:
        """`qwenport validate`."""
        start: list[str | Path] = [sys.executable, "-m", "qwenport", "validate", self.package]
        asked = ("--reference", self.checkpoint, "--prompts", prompts, "--budget", budget)
        return [*start, *asked, *FORMS[self.form], "--quiet", "--json"]


def write_prompts(folder: Path, count: int) -> list[Path]:
    """Write `count` prompt files, each from another page of docs/ as long as there are pages."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        page, turn = pages[number % len(pages)], number // len(pages)
        start = min(turn * CHARACTERS, max(0, len(page) - CHARACTERS))
        file = folder / f"prompts-{number}.txt"
        file.write_text(page[start : start + CHARACTERS], encoding="utf-8")
        files.append(file)
    return files


def run(
    entrant: Entrant, number: int, prompts: Path, budget: str, report: Report
) -> dict[str, Any]:
    """Validate once, on one core; return a record."""
    log = report.log(f"{entrant.name} {number}")
    one_core = child_environment() | {"OMP_NUM_THREADS": "1"}
    done = measure(entrant.command(prompts, budget), log, one_core)
    facts: dict[str, Any] = {
        "prompts": number,
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "passed": None,
        "error": done.error if done.result == {} else None,
    }
    if done.result:
        facts |= {
            "passed": done.result["passed"],
            "verdict": done.result["verdict"],
            "failed": [s["name"] for s in done.result["scenarios"] if s["status"] == "failed"],
            "ratios": ratios_of(done.result),
            "worst_rounding": worst_rounding(done.result),
        }
    return facts


def ratios_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Row -> the rel-L2 of its logits over transformers' own, with its interval if there is one."""
    found = {}
    for scenario in result["scenarios"]:
        metrics = scenario["metrics"]
        if metrics is None or metrics["own_ratio"] is None:
            continue
        found[scenario["name"]] = {"ratio": metrics["own_ratio"]}
        if metrics["own_ratio_interval"] is not None:
            found[scenario["name"]] |= metrics["own_ratio_interval"]
    return found


def worst_rounding(result: dict[str, Any]) -> dict[str, Any] | None:
    """The operator or layer with the largest error relative to transformers' own, by the interval's lower end."""
    spreads = [
        {"layer": place["layer"], "operator": place["operator"], "kind": kind, **spread}
        for place in result["rounding"]
        for kind in ("relative", "systematic")
        for spread in place[kind]
    ]
    return max(spreads, key=lambda spread: spread["times_own"], default=None)


def summarise(report: Report, entrant: Entrant) -> dict[str, Any]:
    """The verdicts of one entrant."""
    runs = [r for r in report.data["runs"] if r["contender"] == entrant.name]
    failed = [r["error"] for r in runs if r["error"]]
    rounded = [row for r in runs for name, row in r.get("ratios", {}).items() if name in HALF]
    roundings = [r["worst_rounding"] for r in runs if r.get("worst_rounding")]
    return {
        "contender": entrant.name,
        "runs": len(runs),
        "false_alarms": sum(r["passed"] is False for r in runs),
        "ratio": [min(r["ratio"] for r in rounded), max(r["ratio"] for r in rounded)]
        if rounded
        else None,
        "highest_lower_end": max((r["low"] for r in rounded), default=None),
        "worst_rounding": max(roundings, key=lambda spread: spread["times_own"], default=None),
        "cpu_seconds": sum(r["cpu_seconds"] for r in runs),
        "error": failed[0] if failed else None,
    }


def _cpu(row: Row) -> str:
    return f"{row['cpu_seconds'] / max(1, row['runs']):.0f} s"


COLUMNS: Columns = {
    "judged": figure("contender"),
    "false alarms": lambda row: f"{row['false_alarms']} of {row['runs']}",
    "logits, x transformers' own": figure("ratio", "{0[0]:.2f} to {0[1]:.2f}"),
    "worst operator": figure(
        "worst_rounding", "{0[times_own]:.2f} x, layer {0[layer]} {0[operator]}"
    ),
    "CPU per run": _cpu,
}


def bars(summary: list[dict[str, Any]]) -> list[Bar]:
    """The bounds: no correct model may be rejected, and every one must get a verdict."""
    alarms = sum(row["false_alarms"] for row in summary)
    silent = sum(row["error"] is not None for row in summary)
    return [
        Bar("false alarms", alarms, 0, "at most", "runs"),
        Bar("without a verdict", silent, 0, "at most", "packages"),
    ]


@benchmark("false_alarms", bars_must_hold=True)
@click.option(
    "--prompts",
    "count",
    type=click.IntRange(min=1),
    default=PROMPTS,
    help="Prompt files to judge with.",
)
def main(report: Report, count: int) -> Result:
    """Judge a correct real model (SmolLM2-135M in bf16 and fp16) on many texts: `validate` must not reject it."""
    count, budget = (1, "quick") if report.quick else (count, "standard")
    checkpoint = TINY if report.quick else make_checkpoint(report.work / "smollm2-135m")
    folder = report.work / "false-alarms"
    length = () if report.quick else ("--max-seq-len", MAX_SEQ_LEN)
    entrants = []
    for dtype in DTYPES[:1] if report.quick else DTYPES:
        package = export_anew(checkpoint, folder / dtype, report, "--dtype", dtype, *length)
        entrants += [Entrant(dtype, form, checkpoint, package) for form in FORMS]
    report.settings |= {"model": checkpoint.name, "prompts": count, "budget": budget}
    files = write_prompts(folder / "prompts", count)
    todo = [
        (entrant, number)
        for number in range(count)
        for entrant in entrants
        if entrant.form != "package" or number < PROMPTS_OF_PACKAGE
    ]
    with ThreadPoolExecutor(cores()) as pool:
        running = [
            pool.submit(run, entrant, number, files[number], budget, report)
            for entrant, number in todo
        ]
        for (entrant, _), record in zip(todo, running, strict=True):
            report.add_run(entrant.name, **record.result())
    shutil.rmtree(folder, ignore_errors=True)
    summary = [summarise(report, entrant) for entrant in entrants]
    return Result([table("Verdicts", COLUMNS, summary)], summary, bars(summary))


if __name__ == "__main__":
    main()
