"""Shared by the commands: options, notes, readable numbers, and the check that a target can run."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import click

from qwenport import QwenportError
from qwenport.contract import ONNXRUNTIME

Function = TypeVar("Function", bound=Callable[..., Any])

EXIT_NO_PARITY = 1
PATH = click.Path(path_type=Path)


def output_options(command: Function) -> Function:
    """Add --quiet and --json, for commands that run long or whose results programs read."""
    command = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
    )(command)
    return click.option("-q", "--quiet", is_flag=True, help="No progress bars and no notes.")(
        command
    )


def limits(subject: str, default_batch: int | None = None) -> Callable[[Function], Function]:
    """Add --max-seq-len and --max-batch. Without `default_batch`, both default to `subject`'s."""

    def add(command: Function) -> Function:
        command = click.option(
            "--max-batch",
            type=click.IntRange(min=1),
            metavar="N",
            default=default_batch,
            help="Rows (texts) that can run at once.",
            show_default=f"{subject}'s" if default_batch is None else True,
        )(command)
        return click.option(
            "--max-seq-len",
            type=click.IntRange(min=1),
            metavar="N",
            help="Positions, prompt and answer together.",
            show_default=f"all that {subject} allows",
        )(command)

    return add


def force_clean_option(command: Function) -> Function:
    """Add --force-clean, for commands that write a directory."""
    return click.option(
        "--force-clean",
        is_flag=True,
        help="Remove the scratch directories of earlier runs for the same place, even if they may still be running. "
        "Those whose process is gone are removed anyway.",
    )(command)


@contextmanager
def whole_or_interrupted(target: Path) -> Iterator[None]:
    """Ignore Ctrl-C once this process has published `target`: the command has succeeded."""
    from qwenport.exporter import published

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not published(target):
            before(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        # after success only the end of the process is left
        signal.signal(signal.SIGINT, signal.SIG_IGN if published(target) else before)


def note(text: str | None, quiet: bool) -> None:
    """Print a note on stderr, unless it is empty or `quiet` is set."""
    if text and not quiet:
        click.echo(f"note: {text}", err=True)


def stream(text: str) -> None:
    """Write a piece of text to stdout, where it is seen at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def print_json(data: dict[str, Any]) -> None:
    """Print a result as JSON, for programs."""
    click.echo(json.dumps(data, indent=1, ensure_ascii=False))


def bytes_of(directory: Path) -> int:
    """Total size of all files under a directory in bytes; several links to one file count once."""
    files = (path.stat() for path in directory.rglob("*") if path.is_file())
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


def runtime_of(manifest: dict[str, Any]) -> str:
    """What runs an engine, in words: "tensorrt-rtx 1.7.1.116 for sm86, sm89"."""
    runtime = f"{manifest['flavour']} {manifest['runtime_version']}"
    if manifest["flavour"] == ONNXRUNTIME:
        return f"{runtime} or newer on the CPU"
    return f"{runtime} for {', '.join(manifest['gpus'])}"


def runnable_kind(target: Path) -> Literal["package", "engine"]:
    """`kind_of` a target to run; refuses a checkpoint and says what to do instead.

    Raises:
        PackageError: see `kind_of`.
        QwenportError: it is a checkpoint.
    """
    from qwenport.exporter import kind_of

    kind = kind_of(target)
    if kind == "checkpoint":
        raise QwenportError(
            f"{target} is a checkpoint; export it first: qwenport export {target} PACKAGE"
        )
    return kind
