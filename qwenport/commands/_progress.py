"""A progress bar on stderr. Silent where nobody watches: with --quiet, or where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""


@contextmanager
def progress_bar(opening: str, quiet: bool) -> Iterator[Progress]:
    """Yield a callback that moves a bar and names what is under way; the bar vanishes at the end.

    Args:
        opening: what is under way until the callback is first called.
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
