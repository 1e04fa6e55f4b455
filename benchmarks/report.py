"""What all benchmarks share: the command line, the machine and versions, the tables, the bars and the JSON file.

A benchmark is a function that measures, decorated with `benchmark`; it states only its own options and columns.
docs/benchmarks.md describes the JSON.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import click
from measure import CONTENDERS, ROOT, WORK, Run, child_environment, cores, measure
from rich.console import Console
from rich.table import Table

SCHEMA = 1
PACKAGES = (
    "numpy onnx onnx-ir onnxruntime onnxruntime-genai optimum optimum-onnx polygraphy safetensors "
    "tensorrt-rtx tokenizers torch transformers"
).split()
QUIET_LOAD = 0.6  # of the machine's cores; above it, times say more about other processes
GB, MB = 1e9, 1e6
QUICK = "A smoke test: the smallest setting, once, without peers that need an installation."

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""Title -> what the column says about a row."""


@dataclass(frozen=True)
class Bar:
    """A bound that the result must keep.

    Attributes:
        name: what is bounded, in words.
        value: the measured value; None if it could not be measured.
        limit: the bound.
        kind: "at most" or "at least".
        unit: unit of both numbers.
    """

    name: str
    value: float | None
    limit: float
    kind: str
    unit: str

    @property
    def holds(self) -> bool | None:
        """Whether the bound is kept; None if nothing was measured."""
        if self.value is None:
            return None
        return self.value <= self.limit if self.kind == "at most" else self.value >= self.limit


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        tables: the summary, for people.
        summary: one object per contender, with its `error` or None.
        bars: the bounds and whether they are kept; a smoke test drops them.
        own: names of Qwenport's contenders: if one of them fails, so does the benchmark.
    """

    tables: Sequence[Table]
    summary: list[dict[str, Any]]
    bars: Sequence[Bar] = ()
    own: Collection[str] = ()


def benchmark(
    name: str,
    repeats: int | None = None,
    *,
    quick_peers: bool = False,
    bars_must_hold: bool = False,
) -> Callable[[Callable[..., Result]], click.Command]:
    """Make a command of a function that measures: it gets a Report and its own options, and returns a Result.

    Args:
        name: name of the benchmark and of its JSON file.
        repeats: default number of turns; None if the benchmark takes none and has no peers.
        quick_peers: whether --quick runs the peers too, because they need no installation.
        bars_must_hold: whether the exit code is 1 if a bar does not hold.
    """

    def decorate(measured: Callable[..., Result]) -> click.Command:
        @wraps(measured)
        def main(
            quick: bool,
            work: Path,
            output: Path | None,
            repeats: int | None = None,
            no_peers: bool = False,
            **options: Any,
        ) -> None:
            settings: dict[str, Any] = {}
            if repeats is not None:
                peers = not no_peers and (quick_peers or not quick)
                settings = {"repeats": 1 if quick else repeats, "peers": peers}
            report = Report(name, quick, settings, work)
            result = measured(report, **options)
            report.finish(result, output)
            own = [row for row in result.summary if row["contender"] in result.own]
            failed = dict.fromkeys(row["contender"] for row in own if row["error"])
            if failed:
                raise click.ClickException(f"{', '.join(failed)} failed")
            if bars_must_hold:
                broken = [bar.name for bar in result.bars if bar.holds is False]
                if broken:
                    raise click.ClickException(f"does not hold: {', '.join(broken)}")

        comparing = (
            click.option("--no-peers", is_flag=True, help="Only Qwenport."),
            click.option(
                "--repeats",
                type=click.IntRange(min=1),
                default=repeats,
                help="Runs of each contender, in turns; the median counts.",
            ),
        )
        common = (
            click.option("--quick", is_flag=True, help=QUICK),
            *(comparing if repeats is not None else ()),
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
        )
        for option in reversed(common):
            option(main)
        return click.command(context_settings={"show_default": True})(main)

    return decorate


def machine() -> dict[str, Any]:
    """A description of the machine, without name or address."""
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
    """Versions of the relevant packages in an environment."""
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
    """The median; None for no values."""
    return median(values) if values else None


def scaled(value: float | None, unit: float) -> float | None:
    """A number in a larger unit."""
    return None if value is None else value / unit


def figure(key: str, form: str = "{}", unit: float | None = None) -> Callable[[Row], str]:
    """A column of a row's value of `key`, in a `unit` if given; empty where the value is None."""

    def cell(row: Row) -> str:
        value = row[key]
        return "" if value is None else form.format(value / unit if unit else value)

    return cell


def table(title: str, columns: Columns, rows: Iterable[Row]) -> Table:
    """A table for people. Of a row with an error it says only the first column, and that it failed."""
    made = Table(*columns, title=title)
    first = next(iter(columns.values()))
    for row in rows:
        cells = [cell(row) for cell in columns.values()] if not row.get("error") else None
        made.add_row(*(cells or (first(row), "failed")))
    return made


HOLDS = {True: "[green]holds[/green]", False: "[red]does not hold[/red]", None: "not measured"}
BAR_COLUMNS: Columns = {
    "bar": figure("name"),
    "bound": lambda bar: f"{bar['kind']} {bar['limit']:.4g} {bar['unit']}",
    "measured": lambda bar: figure("value", f"{{:.4g}} {bar['unit']}")(bar) or "-",
    "": lambda bar: HOLDS[bar["holds"]],
}


class Report:
    """One benchmark's run, from the first look at the machine to the JSON file."""

    def __init__(self, name: str, quick: bool, settings: dict[str, Any], work: Path = WORK) -> None:
        self.quick, self.settings, self.work = quick, settings, work
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

    @property
    def peers(self) -> bool:
        """Whether peers take part."""
        return bool(self.settings["peers"])

    def turns(self, part: str = "") -> Iterator[int]:
        """The turns, from 1; each is announced."""
        repeats = self.settings["repeats"]
        for turn in range(1, repeats + 1):
            self.say(f"{part}turn {turn} of {repeats}")
            yield turn

    def log(self, contender: str) -> Path:
        """The file for what a contender's process writes to stderr."""
        name = re.sub(r"[^\w.]+", "-", f"{self.data['benchmark']} {contender}")
        return self.work / "logs" / f"{name}.log"

    def call(
        self,
        contender: str,
        script: str,
        request: Mapping[str, Any],
        python: str | Path = sys.executable,
        own: bool = True,
    ) -> Run:
        """Run a script of contenders/ in its own process; its argument is `request` as JSON."""
        command = [python, CONTENDERS / script, json.dumps(request)]
        return measure(command, self.log(contender), child_environment(own))

    def say(self, text: str) -> None:
        """Print a message about the progress."""
        self.console.print(text, highlight=False)

    def add_versions(self, peer: str, python: Path) -> None:
        """Record the versions in a peer's environment."""
        self.data["versions"][peer] = versions(python)

    def add_run(self, contender: str, **facts: Any) -> None:
        """Record one run and print it."""
        self.data["runs"].append({"contender": contender, **facts})
        shown = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in facts.items()
            if value is not None and not isinstance(value, dict | list)
        )
        self.say(f"  {contender}: {shown}")

    def values(self, contender: str, key: str) -> list[Any]:
        """All of a contender's values of a key."""
        return [
            run[key]
            for run in self.data["runs"]
            if run["contender"] == contender and run.get(key) is not None
        ]

    def error(self, contender: str) -> str | None:
        """A contender's first error; None if it has not failed."""
        return next(iter(self.values(contender, "error")), None)

    def finish(self, result: Result, output: Path | None) -> None:
        """Print the machine, the tables and the bars, and write the JSON."""
        facts = self.data["machine"]
        facts["load_at_end"] = [round(load, 2) for load in os.getloadavg()]
        self.data["summary"] = result.summary
        bars = () if self.quick else result.bars
        self.data["bars"] = [{**asdict(bar), "holds": bar.holds} for bar in bars]
        self.say(
            f"\n{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, "
            f"{facts['os']}, Python {facts['python']}, load {facts['load'][0]} before and "
            f"{facts['load_at_end'][0]} after"
        )
        for name, packages in self.data["versions"].items():
            self.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in packages.items()))
        for made in result.tables:
            self.console.print(made)
        for row in result.summary:
            if row["error"]:
                self.say(f"{row['contender']} failed: {row['error']}")
        if bars:
            self.console.print(table("Bars", BAR_COLUMNS, self.data["bars"]))
        if output is None:
            folder = self.work / "quick" if self.quick else ROOT / "benchmarks" / "results"
            day = time.strftime("%Y-%m-%d", time.gmtime())
            output = folder / f"{self.data['benchmark']}-{day}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        self.say(f"written: {output}")
