"""`qwenport demo`: every step on the repository's small checkpoints, as the commands one would type."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

import qwenport
from qwenport import QwenportError
from qwenport.commands._common import PATH, bytes_of
from qwenport.wording import size

EXIT_NO_PARITY, EXIT_ERROR = 1, 2
GPUS = "sm86,sm89,sm120"
PROMPT = "Once upon a time"
CHECKPOINTS = ("tiny-qwen2.5", "tiny-qwen2-moe")
IN_CHUNKS, LONG_TEXT = "tiny-qwen2.5-1m", "long_tale.txt"


@dataclass(frozen=True)
class Step:
    """One command of the demo. `makes` is the directory that it writes, `needs` the one that it reads.

    `stdin` is the text file that it is given.
    """

    model: str
    name: str
    arguments: tuple[str, ...]
    needs: Path
    makes: Path | None = None
    stdin: Path | None = None


@dataclass
class Outcome:
    """The outcome of a step."""

    step: Step
    result: str
    exit_code: int = 0
    seconds: float | None = None
    bytes: int | None = None


@click.command("demo")
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    help="Keep packages, engines and reports here; DIR must not exist.",
    show_default="a temporary directory, removed at the end",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress bars and no notes.")
def command(out: Path | None, quiet: bool) -> None:
    """Take the small checkpoints of the repository, a dense one and a mixture of experts, from export to text,
    the dense one with weights in 4 bits too, and one with dual chunk attention through a long text. No GPU is needed.

    Each step prints the command it stands for, and a table sums them up. Exit codes: 0 all steps
    done, 1 parity does not hold, 2 a step failed, for instance for a missing extra.

    \b
    Examples:
      qwenport demo
      qwenport demo --out demo/
    """
    checkpoints = _bundled_checkpoints()
    with _working_directory(out) as directory:
        planned = [
            step for checkpoint in checkpoints for step in steps(checkpoint, directory, quiet)
        ]
        planned += few_bits(checkpoints[0], directory, quiet)
        planned += in_chunks(checkpoints[0].parent, directory, quiet)
        outcomes = [_run(step) for step in planned]
    _summarise(outcomes)
    if out is not None:
        click.echo(f"kept in {out}")
    _conclude(outcomes)


def steps(checkpoint: Path, out: Path, quiet: bool) -> list[Step]:
    """The commands, in order."""
    model = checkpoint.name
    package, engine = out / f"{model}.package", out / f"{model}.engine"
    source, made, built = str(checkpoint), str(package), str(engine)
    silent = ("--quiet",) if quiet else ()
    weights = () if _can_link(checkpoint, out) else ("--weights", "copy")
    parity = ("--reference", source, *silent)
    network = ("--as", "tensorrt-network")
    rtx = ("--target", "tensorrt-rtx", "--gpu", GPUS)
    text = ("--prompt", PROMPT, "--temperature", "0.7", "--seed", "1")
    commands: list[tuple[tuple[str, ...], Path, Path | None]] = [
        (("export", source, made, *weights, *silent), checkpoint, package),
        (("inspect", made, "--brief"), package, None),
        (("validate", made, *parity, "--report", f"{package}.parity"), package, None),
        (("validate", made, *parity, "--report", f"{engine}.parity", *network), package, None),
        (("build", made, built, *rtx, *silent), package, engine),
        (("inspect", built, "--brief"), engine, None),
        (("generate", made, *text, *silent), package, None),
    ]
    return [Step(model, words[0], words, needs, makes) for words, needs, makes in commands]


def few_bits(checkpoint: Path, out: Path, quiet: bool) -> list[Step]:
    """The commands for the same model with weights in 4 bits, in order."""
    model = f"{checkpoint.name} int4"
    package, engine = (
        out / f"{checkpoint.name}-int4.package",
        out / f"{checkpoint.name}-int4.engine",
    )
    made, built = str(package), str(engine)
    silent = ("--quiet",) if quiet else ()
    commands: list[tuple[tuple[str, ...], Path, Path | None]] = [
        (("export", str(checkpoint), made, "--quantize", "int4", *silent), checkpoint, package),
        (("inspect", made, "--brief"), package, None),
        (
            ("validate", made, "--reference", str(checkpoint), "--budget", "quick", *silent),
            package,
            None,
        ),
        (("build", made, built, "--target", "onnxruntime", *silent), package, engine),
        (("selftest", built, *silent), engine, None),
        (
            ("generate", built, "--prompt", PROMPT, "--temperature", "0.7", "--seed", "1", *silent),
            engine,
            None,
        ),
    ]
    return [Step(model, words[0], words, needs, makes) for words, needs, makes in commands]


def in_chunks(examples: Path, out: Path, quiet: bool) -> list[Step]:
    """The commands for the model with dual chunk attention, which continues a text across many chunks."""
    checkpoint, text = examples / IN_CHUNKS, examples / LONG_TEXT
    package, engine = out / f"{IN_CHUNKS}.package", out / f"{IN_CHUNKS}.engine"
    source, made, built = str(checkpoint), str(package), str(engine)
    silent = ("--quiet",) if quiet else ()
    weights = () if _can_link(checkpoint, out) else ("--weights", "copy")
    parity = ("--reference", source, "--budget", "quick", *silent)
    sampling = ("--temperature", "0.7", "--seed", "1", *silent)
    commands: list[tuple[tuple[str, ...], Path, Path | None, Path | None]] = [
        (
            ("export", source, made, "--max-batch", "1", *weights, *silent),
            checkpoint,
            package,
            None,
        ),
        (("validate", made, *parity), package, None, None),
        (("build", made, built, "--target", "onnxruntime", *silent), package, engine, None),
        (("selftest", built, *silent), engine, None, None),
        (("generate", built, "--prompt", "-", *sampling), engine, None, text),
    ]
    return [
        Step(IN_CHUNKS, words[0], words, needs, makes, stdin)
        for words, needs, makes, stdin in commands
    ]


def _bundled_checkpoints() -> list[Path]:
    examples = Path(qwenport.__file__).resolve().parent.parent / "examples"
    checkpoints = [examples / name for name in CHECKPOINTS]
    if not all(checkpoint.is_dir() for checkpoint in checkpoints):
        raise QwenportError(
            "demo runs on the checkpoints in examples/, which only a source checkout has: "
            "clone the repository and run `make demo`"
        )
    return checkpoints


@contextmanager
def _working_directory(out: Path | None) -> Iterator[Path]:
    """`out`, created, and kept unless it stays empty; or a temporary directory that is removed."""
    if out is None:
        directory = Path(tempfile.mkdtemp(prefix="qwenport-demo-"))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return
    if out.exists():
        raise QwenportError(f"{out} exists already; choose another name or remove it")
    if not out.absolute().parent.is_dir():
        raise QwenportError(f"{out.absolute().parent}: no such directory to write {out.name} in")
    out.mkdir()
    try:
        yield out
    finally:
        if not any(out.iterdir()):
            out.rmdir()


def _can_link(checkpoint: Path, out: Path) -> bool:
    """Whether `export --weights link` works between the two; it does not across file systems."""
    probe = out / ".probe"
    try:
        os.link(checkpoint / "model.safetensors", probe)
    except OSError:
        return False
    probe.unlink()
    return True


def _run(step: Step) -> Outcome:
    """Run a step in this process, as the command line would."""
    if not step.needs.exists():
        return Outcome(step, f"skipped: there is no {step.needs.name}")
    from qwenport.cli import cli

    read = "" if step.stdin is None else f" < {shlex.quote(str(step.stdin))}"
    click.secho(f"\n$ qwenport {shlex.join(step.arguments)}{read}", bold=True)
    start = time.perf_counter()
    outcome = Outcome(step, "done")
    parent = click.get_current_context().find_root()
    name, *arguments = step.arguments
    chosen = cli.get_command(parent, name)
    assert chosen is not None
    try:
        with (
            chosen.make_context(name, arguments, parent=parent) as context,
            _reading(step.stdin),
        ):
            chosen.invoke(context)
    except click.exceptions.Exit as exit_:
        if exit_.exit_code not in (0, EXIT_NO_PARITY):
            raise  # interrupted
        outcome.exit_code = exit_.exit_code
        outcome.result = "done" if exit_.exit_code == 0 else "parity does not hold"
    except QwenportError as error:
        outcome.exit_code, outcome.result = EXIT_ERROR, str(error)
        click.echo(f"failed: {error}")
    outcome.seconds = time.perf_counter() - start
    if step.makes is not None and step.makes.exists():
        outcome.bytes = bytes_of(step.makes)
    return outcome


@contextmanager
def _reading(path: Path | None) -> Iterator[None]:
    """Make a file stdin, as a shell's `<` does."""
    if path is None:
        yield
        return
    before = sys.stdin
    with path.open(encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _summarise(outcomes: list[Outcome]) -> None:
    click.echo("\nmodel              step      result                 seconds      bytes")
    for outcome in outcomes:
        result = "failed" if outcome.exit_code == EXIT_ERROR else outcome.result
        seconds = "" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        written = "" if outcome.bytes is None else size(outcome.bytes)
        names = f"{outcome.step.model:<18} {outcome.step.name:<9}"
        click.echo(f"{names} {result:<22} {seconds:>7} {written:>10}".rstrip())


def _conclude(outcomes: list[Outcome]) -> None:
    """Exit with the worst exit code, and raise the first error as the command line's own."""
    failed = [outcome for outcome in outcomes if outcome.exit_code == EXIT_ERROR]
    if failed:
        step = failed[0].step
        raise QwenportError(f"{step.name} of {step.model}: {failed[0].result}")
    if any(outcome.exit_code for outcome in outcomes):
        raise click.exceptions.Exit(EXIT_NO_PARITY)
