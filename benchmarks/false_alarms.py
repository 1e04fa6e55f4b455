"""Does `validate` call a real model wrong that is right? SmolLM2-135M in half precision, judged on many texts.

    python benchmarks/false_alarms.py
    python benchmarks/false_alarms.py --quick

The model (benchmarks/smollm2.py) has the outlier activations of a trained model, which random weights have not. Its
package in bf16, as published, and in fp16 is judged in two forms, run by onnxruntime and as the network that
TensorRT's parser makes of it, each time with another prompt file: a slice of a page of docs/. The package, which runs
in fp32, is judged with two of them. As many run at once as there are cores. Every verdict that parity does not hold is
a false alarm. With --quick the bundled checkpoint stands in for it, in bf16 with one prompt.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from exporters import ours
from measure import ROOT, WORK, child_environment, cores, measure
from report import Bar, Report, output_path
from rich.table import Table
from smollm2 import make_checkpoint

FORMS = {"package": (), "network": ("--as", "tensorrt-network")}
DTYPES = ("bf16", "fp16")
PROMPTS = 10
PROMPTS_OF_PACKAGE = (
    2  # run in fp32: what differs from prompt to prompt is rounding, which only the network has
)
CHARACTERS = 6000  # of a prompt file, about 1,500 tokens
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
        """In the report."""
        return f"{self.dtype}, {self.form}"

    def command(self, prompts: Path, budget: str) -> list[str | Path]:
        """`qwenport validate`."""
        start: list[str | Path] = [sys.executable, "-m", "qwenport", "validate", self.package]
        asked = ("--reference", self.checkpoint, "--prompts", prompts, "--budget", budget)
        return [*start, *asked, *FORMS[self.form], "--quiet", "--json"]


def write_prompts(folder: Path, count: int) -> list[Path]:
    """`count` prompt files, each from another page of docs/ as long as there are pages."""
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


def export(checkpoint: Path, package: Path, work: Path, *arguments: str) -> Path:
    """Make the package afresh."""
    shutil.rmtree(package, ignore_errors=True)
    package.parent.mkdir(parents=True, exist_ok=True)
    done = measure(ours(checkpoint, *arguments)(package), work / "logs" / "false-alarms-export.log")
    if done.code:
        raise click.ClickException(f"cannot export {checkpoint.name}: {done.error}")
    return package


def run(entrant: Entrant, number: int, prompts: Path, budget: str, work: Path) -> dict[str, Any]:
    """Validate once, on one core; a record."""
    log = work / "logs" / f"false-alarms-{entrant.name}-{number}.log"
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
    """Row -> the rel-L2 of its logits over transformers' own, with its interval where one was taken."""
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
    """The operator or layer whose error is largest beside transformers' own, in its lower end."""
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


def table(summary: list[dict[str, Any]]) -> Table:
    """For people."""
    made = Table(
        "judged", "false alarms", "logits, x transformers' own", "worst operator", "CPU per run"
    )
    for row in summary:
        ratio, worst = row["ratio"], row["worst_rounding"]
        made.add_row(
            row["contender"],
            f"{row['false_alarms']} of {row['runs']}",
            f"{ratio[0]:.2f} to {ratio[1]:.2f}" if ratio else "",
            f"{worst['times_own']:.2f} x, layer {worst['layer']} {worst['operator']}"
            if worst
            else "",
            f"{row['cpu_seconds'] / max(1, row['runs']):.0f} s",
        )
    return made


def bars(summary: list[dict[str, Any]]) -> list[Bar]:
    """None may be called wrong, and every one must get a verdict."""
    alarms = sum(row["false_alarms"] for row in summary)
    silent = sum(row["error"] is not None for row in summary)
    return [
        Bar("false alarms", alarms, 0, "at most", "runs"),
        Bar("without a verdict", silent, 0, "at most", "packages"),
    ]


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="One prompt, the bundled checkpoint: a smoke test.")
@click.option(
    "--prompts",
    "count",
    type=click.IntRange(min=1),
    default=PROMPTS,
    help="Prompt files to judge with.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=WORK,
    show_default="benchmarks/work",
    help="Where checkpoints, packages and logs go.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="benchmarks/results/false_alarms-DATE.json; with --quick in the work folder",
    help="Where the JSON goes.",
)
def main(quick: bool, count: int, work: Path, output: Path | None) -> None:
    """Judge a real model that is right, on many texts."""
    count, budget = (1, "quick") if quick else (count, "standard")
    checkpoint = TINY if quick else make_checkpoint(work / "smollm2-135m")
    folder = work / "false-alarms"
    length = () if quick else ("--max-seq-len", MAX_SEQ_LEN)
    entrants = []
    for dtype in DTYPES[:1] if quick else DTYPES:
        package = export(checkpoint, folder / dtype, work, "--dtype", dtype, *length)
        entrants += [Entrant(dtype, form, checkpoint, package) for form in FORMS]
    settings = {"model": checkpoint.name, "prompts": count, "budget": budget}
    report = Report("false_alarms", quick, settings)
    files = write_prompts(folder / "prompts", count)
    todo = [
        (entrant, number)
        for number in range(count)
        for entrant in entrants
        if entrant.form != "package" or number < PROMPTS_OF_PACKAGE
    ]
    with ThreadPoolExecutor(cores()) as pool:
        records = pool.map(lambda each: run(*each, files[each[1]], budget, work), todo)
        for (entrant, _), record in zip(todo, records, strict=True):
            report.add_run(entrant.name, **record)
    shutil.rmtree(folder, ignore_errors=True)
    summary = [summarise(report, entrant) for entrant in entrants]
    judged = bars(summary)
    where = output_path("false_alarms", quick, work, output)
    report.finish(table(summary), summary, [] if quick else judged, where)
    if not all(bar.holds for bar in judged):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
