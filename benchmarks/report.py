"""What every benchmark says: the machine, the versions, a table, the bars, and one JSON file.

docs/benchmarks.md describes the JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import click
from measure import ROOT, WORK, cores
from rich.console import Console
from rich.table import Table

SCHEMA = 1
PACKAGES = (
    "numpy onnx onnx-ir onnxruntime onnxruntime-genai optimum optimum-onnx polygraphy safetensors "
    "tensorrt-rtx tokenizers torch transformers"
).split()
QUIET_LOAD = 0.6  # of the machine's cores; above it, times say more about the neighbours

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Bar:
    """A bound that the result is to keep.

    Attributes:
        name: what is bounded, in words.
        value: what was measured; None where it could not be.
        limit: the bound.
        kind: "at most" or "at least".
        unit: of both numbers.
    """

    name: str
    value: float | None
    limit: float
    kind: str
    unit: str

    @property
    def holds(self) -> bool | None:
        """Whether it is kept; None where nothing was measured."""
        if self.value is None:
            return None
        return self.value <= self.limit if self.kind == "at most" else self.value >= self.limit


def options(name: str, repeats: int) -> Callable[[Function], Function]:
    """Add the options that all benchmarks have."""

    def add(command: Function) -> Function:
        for option in (
            click.option(
                "--quick", is_flag=True, help="A tiny shape, once, without peers: a smoke test."
            ),
            click.option("--no-peers", is_flag=True, help="Only Qwenport."),
            click.option(
                "--repeats",
                type=click.IntRange(min=1),
                default=repeats,
                help="Runs of each contender, in turns; the median counts.",
            ),
            click.option(
                "--work",
                type=click.Path(path_type=Path),
                default=WORK,
                show_default="benchmarks/work",
                help="Checkpoints, peers' environments and scratch files. Large; kept.",
            ),
            click.option(
                "--output",
                type=click.Path(path_type=Path, dir_okay=False),
                show_default=f"benchmarks/results/{name}-DATE.json; with --quick in the work folder",
                help="Where the JSON goes.",
            ),
        ):
            command = option(command)
        return command

    return add


def machine() -> dict[str, Any]:
    """What ran it. No name and no address."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": (_field("/etc/os-release", "PRETTY_NAME", "=") or platform.system()).strip('"'),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def _field(file: str, key: str, separator: str = ":") -> str | None:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(separator)
        if name.strip() == key:
            return value.strip()
    return None


def versions(python: str | Path = sys.executable) -> dict[str, str]:
    """Versions of the packages that matter in an environment."""
    code = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        "for name in sys.argv[1:]:\n try: found[name] = version(name)\n"
        " except PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    run = subprocess.run(
        [str(python), "-c", code, *PACKAGES], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(run.stdout)
    return found


def qwenport_version() -> str:
    """Our version, with the commit and whether the tree had changes."""
    from qwenport import __version__

    def git(*arguments: str) -> str:
        try:
            command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "--short=10", "HEAD")
    changed = git(
        "status", "--porcelain", "--", "exporter", "plugins", "engines", "validate", "qwenport"
    )
    return __version__ + (f" ({commit}{', with changes' if changed else ''})" if commit else "")


def middle(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return median(values) if values else None


class Report:
    """One benchmark's run, from the first look at the machine to the JSON file."""

    def __init__(self, name: str, quick: bool, settings: dict[str, Any]) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else 120)
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": name,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "quick": quick,
            "settings": settings,
            "machine": machine(),
            "versions": {"qwenport": {"qwenport": qwenport_version(), **versions()}},
            "runs": [],
        }
        limit = QUIET_LOAD * self.data["machine"]["cores"]
        if os.getloadavg()[0] > limit and not quick:
            self.say(f"[yellow]the machine is busy (load {os.getloadavg()[0]:.2f})[/yellow]")

    def say(self, text: str) -> None:
        """Tell the reader what is going on."""
        self.console.print(text, highlight=False)

    def add_versions(self, peer: str, python: Path) -> None:
        """Record what a peer's environment holds."""
        self.data["versions"][peer] = versions(python)

    def add_run(self, contender: str, **facts: Any) -> None:
        """Record one run and tell it."""
        self.data["runs"].append({"contender": contender, **facts})
        shown = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in facts.items()
            if value is not None and not isinstance(value, dict | list)
        )
        self.say(f"  {contender}: {shown}")

    def values(self, contender: str, key: str) -> list[float]:
        """All of a contender's values of a key."""
        return [
            run[key]
            for run in self.data["runs"]
            if run["contender"] == contender and run.get(key) is not None
        ]

    def failed(self, contender: str) -> bool:
        """Whether a contender has failed: there is no point in running it again."""
        return any(r["contender"] == contender and r.get("error") for r in self.data["runs"])

    def finish(
        self, table: Table, summary: list[dict[str, Any]], bars: list[Bar], output: Path
    ) -> None:
        """Print the machine, the table and the bars; write the JSON."""
        facts = self.data["machine"]
        facts["load_at_end"] = [round(load, 2) for load in os.getloadavg()]
        self.data["summary"] = summary
        self.data["bars"] = [{**asdict(bar), "holds": bar.holds} for bar in bars]
        self.say(
            f"\n{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, "
            f"{facts['os']}, Python {facts['python']}, load {facts['load'][0]} before and "
            f"{facts['load_at_end'][0]} after"
        )
        for name, packages in self.data["versions"].items():
            self.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in packages.items()))
        self.console.print(table)
        for row in summary:
            if row["error"]:
                self.say(f"{row['contender']} failed: {row['error']}")
        if bars:
            self.console.print(_bars_table(bars))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        self.say(f"written: {output}")


def _bars_table(bars: list[Bar]) -> Table:
    table = Table("bar", "bound", "measured", "", title="Bars")
    words = {True: "[green]holds[/green]", False: "[red]does not hold[/red]", None: "not measured"}
    for bar in bars:
        value = "-" if bar.value is None else f"{bar.value:.4g} {bar.unit}"
        table.add_row(bar.name, f"{bar.kind} {bar.limit:.4g} {bar.unit}", value, words[bar.holds])
    return table


def output_path(name: str, quick: bool, work: Path, output: Path | None) -> Path:
    """Where the JSON goes."""
    if output is not None:
        return output
    folder = work / "quick" if quick else ROOT / "benchmarks" / "results"
    return folder / f"{name}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"
