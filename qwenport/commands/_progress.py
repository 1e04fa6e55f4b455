"""A progress bar on stderr. Silent with --quiet, or if stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qwenport.contract import Progress

"""Called with (what is being done, units done, units in all)."""


@contextmanager
def progress_bar(opening: str, quiet: bool) -> Iterator[Progress]:
    """Yield a callback that advances a bar and names the current work; the bar vanishes at the end.

    Args:
        opening: the text shown until the first call.
        quiet: draw nothing.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(opening, total=None)
        yield lambda what, done, total: bars.update(
            task, description=what, completed=done, total=total
        )
