"""`qwenport selftest`: does an engine reproduce its proof on this machine?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwenport import QwenportError
from qwenport.commands._common import (
    EXIT_NO_PARITY,
    PATH,
    note,
    output_options,
    print_json,
    runnable_kind,
)
from qwenport.commands._progress import progress_bar
from qwenport.wording import counted

if TYPE_CHECKING:
    from qwenport.engines import SelfTest


@click.command("selftest")
@click.argument("engine_dir", metavar="ENGINE", type=PATH)
@output_options
def command(engine_dir: Path, quiet: bool, as_json: bool) -> None:
    """Run the proof that ENGINE carries, on the GPU or CPU that it runs on here.

    The proof holds token sequences and fingerprints of the logits that the package gives on the CPU. They
    are fed in every way that sessions do it: prefill, chunks, single tokens, ragged rows, across the spans'
    edges, after going back, with unused cache slots full of huge numbers. Of a failure the first call, row,
    position and span of each case are printed.

    A pass is remembered for this engine, device, driver and runtime; programs can require it
    (`require_self_test`). `qwenport validate` on the package, or `qwenport build`, makes the proof.

    Exit codes: 0 passed, 1 the engine does not reproduce its proof, 2 it cannot be run.

    \b
    Examples:
      qwenport selftest qwen.engine
      qwenport selftest qwen.engine --json
    """
    if runnable_kind(engine_dir) != "engine":
        raise QwenportError(
            f"{engine_dir} is a package; `qwenport validate` judges it, and engines of it have a self-test"
        )
    from qwenport.engines import self_test

    with progress_bar("loading the engine", quiet) as progress:
        found = self_test(engine_dir, progress=progress)
    if as_json:
        print_json(_facts(engine_dir, found))
    else:
        for failure in found.failures:
            click.echo(f"FAILED   {failure}")
        click.echo(f"{engine_dir}: {_verdict(found)}")
    if not found.passed:
        raise click.exceptions.Exit(EXIT_NO_PARITY)
    if not found.remembered:
        note(
            "the pass could not be written down, see XDG_CACHE_HOME: it counts for no program",
            quiet,
        )


def _verdict(found: SelfTest) -> str:
    ran = f"{counted(found.cases, 'case')}, {counted(found.marks, 'comparison')}"
    if found.left_out:
        ran += f"; cases left out, which need more rows or slots than it has: {found.left_out}"
    if not found.passed:
        return f"FAILED its self-test in {len(found.failures)} of {ran}"
    return f"passed its self-test: {ran}; largest error {found.worst:.2g} of what is allowed"


def _facts(engine: Path, found: SelfTest) -> dict[str, Any]:
    def failure(fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "error": fields["error"] if math.isfinite(fields["error"]) else None}

    return {
        "engine": str(engine),
        "passed": found.passed,
        "remembered": found.remembered,
        "cases": found.cases,
        "left_out": found.left_out,
        "comparisons": found.marks,
        "largest_error_of_bound": found.worst if math.isfinite(found.worst) else None,
        "failures": [failure(dataclasses.asdict(f)) for f in found.failures],
    }
