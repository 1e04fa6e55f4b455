"""Formats a report's numbers and texts for its page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def visible(value: Any) -> Any:
    """The same value with invisible characters escaped; \\u202e would reorder a path."""
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    if isinstance(value, str):
        return "".join(
            c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
            for c in value
        )
    return value


def figure(value: float | str | None, digits: int = 3) -> str:
    """A readable number; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    number = float(value)
    if math.isfinite(number):
        return f"{number:.{digits}g}"
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def interval(ends: dict[str, Any], digits: int = 3) -> str:
    """For example "0.806 to 1.02 (99.9%)"."""
    share = f"{100 * float(ends['confidence']):g}%"
    return f"{figure(ends['low'], digits)} to {figure(ends['high'], digits)} ({share})"


def margin(band: dict[str, Any]) -> str:
    """For example "1e-05 to 0.0001"."""
    if float(band["most"]) == math.inf:
        return f"{float(band['least']):g} or more"
    return f"{float(band['least']):g} to {float(band['most']):g}"


def runs(values: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as (first, last) pairs of consecutive runs."""
    found: list[tuple[int, int]] = []
    for value in sorted(values):
        if found and value <= found[-1][1] + 1:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    return found


def ranges(pairs: Iterable[Sequence[int]]) -> list[str]:
    """For example ["0 to 511", "700"]."""
    found = []
    for first, last in pairs:
        between = ", " if last == first + 1 else " to "
        found.append(f"{first:,}" if first == last else f"{first:,}{between}{last:,}")
    return found
