"""Parts of a plot. Plots are as wide as the page allows, so x is in percent; y is in pixels from the top."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

EDGE = 22.0  # height of a log axis's extra lines for zeros, below, and for non-finite values, above
INSET = 2.0  # percent left free next to the first and the last point

_CIRCLE = "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0z"
_SQUARE = "M-3.7-3.7h7.4v7.4h-7.4z"
_DIAMOND = "M0-5 5 0 0 5-5 0z"
_RING = "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0z"

# Lines differ in their marks and dashes, not in colour alone.
MARKS = {
    "accumulated": _CIRCLE,
    "local": _SQUARE,
    "own": _DIAMOND,
    "first": _CIRCLE,
    "second": _SQUARE,
    "worst": _RING,
}

Point = tuple[float, float]  # percent of the width, pixels from the top


@dataclass(frozen=True)
class Plot:
    """`words` describe the picture, also for those who cannot see it."""

    key: str
    title: str
    words: str
    svg: Markup


@dataclass(frozen=True)
class LogScale:
    """Value -> height. Zeros get their own line below the decades, non-finite values one above them."""

    decades: tuple[int, int] | None  # exponents; None if no value is positive and finite
    zeros: bool
    broken: bool
    height: float

    @classmethod
    def of(cls, values: Sequence[float], height: float) -> LogScale:
        positive = [v for v in values if 0 < v < math.inf]
        return cls(
            decades_of(positive) if positive else None,
            any(v <= 0 and not is_broken(v) for v in values),
            any(map(is_broken, values)),
            height,
        )

    def y(self, value: float) -> float:
        if is_broken(value):
            return 0.0
        if value <= 0 or self.decades is None:
            return self.height
        return self._y(math.log10(value))

    def _y(self, exponent: float) -> float:
        low, high = self.decades or (0, 1)
        top = EDGE if self.broken else 0.0
        bottom = self.height - (EDGE if self.zeros else 0.0)
        return bottom - (exponent - low) / (high - low) * (bottom - top)

    def grid(self) -> list[Markup]:
        """Horizontal lines with their labels."""
        lines = []
        if self.decades:
            low, high = self.decades
            for exponent in range(low, high + 1, round_step(high - low, self.height // 35)):
                lines += gridline(self._y(exponent), power(exponent))
        if self.zeros:
            lines += gridline(self.height, "0")
        if self.broken:
            lines += gridline(0, "NaN, ∞")
        return lines


def power(exponent: int) -> str:
    return f"1e{exponent}" if exponent else "1"


def decades_of(positive: Sequence[float]) -> tuple[int, int]:
    low = math.floor(math.log10(min(positive)))
    return low, max(math.ceil(math.log10(max(positive))), low + 1)


def spread(count: int) -> list[float]:
    """Positions of `count` points, in percent."""
    if count == 1:
        return [50.0]
    return [INSET + (100 - 2 * INSET) * i / (count - 1) for i in range(count)]


def round_step(span: int, most: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50 ... that divides `span` into at most `most` steps."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if span <= step * factor * most:
                return step * factor
        step *= 10


def round_ticks(count: int) -> range:
    return range(0, count, round_step(max(count - 1, 1), 6))


def is_broken(value: float) -> bool:
    return not math.isfinite(value)


def rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def plot(
    key: str, title: str, words: Sequence[str], height: float, parts: Iterable[Markup]
) -> Plot:
    svg = Markup(
        '<svg class="chart" role="img" width="100%" height="{height:g}" '
        'aria-labelledby="{key}-title" aria-describedby="{key}-words">'
        '<title id="{key}-title">{title}</title>{parts}</svg>'
    ).format(height=height, key=key, title=title, parts=Markup("").join(parts))
    return Plot(key, title, " ".join(words), svg)


def text(x: float, y: float, text: str, *, anchor: str = "middle") -> Markup:
    return Markup('<text x="{:.2f}%" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def gridline(y: float, label: str) -> list[Markup]:
    """A horizontal line, its label left of the plot."""
    return [
        across(y, "grid"),
        Markup('<text x="-8" y="{:.1f}" dy="4" text-anchor="end">{}</text>').format(y, label),
    ]


def across(y: float, kind: str) -> Markup:
    return Markup('<line x1="0" x2="100%" y1="{:.1f}" y2="{:.1f}" class="{}"/>').format(y, y, kind)


def rule(x: float) -> Markup:
    """A vertical line where a fault starts."""
    return Markup('<line x1="{:.2f}%" x2="{:.2f}%" y1="0" y2="100%" class="fault"/>').format(x, x)


def whisker(x: float, y: float, end: float, series: str) -> Markup:
    """A vertical line from a mark to the end of its interval."""
    return Markup(
        '<line x1="{:.2f}%" x2="{:.2f}%" y1="{:.1f}" y2="{:.1f}" class="whisker {}"/>'
    ).format(x, x, y, end, series)


def bar(
    left: float, right: float, bottom: float, height: float, tip: str, kind: str = "bar"
) -> Markup:
    return Markup(
        '<rect x="{:.2f}%" y="{:.1f}" width="{:.2f}%" height="{:.1f}" class="{}">'
        "<title>{}</title></rect>"
    ).format(left, bottom - height, right - left, height, kind, tip)


def mark(x: float, y: float, kind: str, tip: str) -> Markup:
    """A mark that keeps its shape at any plot width; `tip` is its tooltip."""
    return Markup(
        '<svg x="{:.2f}%" y="{:.1f}" class="mark {}"><title>{}</title><path d="{}"/></svg>'
    ).format(x, y, kind, tip, MARKS[kind])


def joined(points: Sequence[Point], drawn: Sequence[bool], height: float, series: str) -> Markup:
    """A line through the drawn points, interrupted at the others."""
    steps, pen = [], "M"
    for (x, y), present in zip(points, drawn, strict=True):
        if present:
            steps.append(f"{pen}{x:.2f} {y:.1f}")
        pen = "L" if present else "M"
    return _stretched("".join(steps), height, f"line {series}")


def dots(points: Sequence[Point], height: float, kind: str, drawn: Sequence[bool]) -> Markup:
    """Thousands of points in one path: zero-length lines of which only the caps are visible."""
    steps = [
        f"M{x:.2f} {y:.1f}h0" for (x, y), present in zip(points, drawn, strict=True) if present
    ]
    return _stretched("".join(steps), height, f"dots {kind}")


def _stretched(path: str, height: float, kind: str) -> Markup:
    """A path whose x is in percent, as wide as the plot; its strokes keep their width."""
    if not path:
        return Markup("")
    return Markup(
        '<svg width="100%" height="{height:g}" viewBox="0 0 100 {height:g}" '
        'preserveAspectRatio="none"><path class="{kind}" d="{path}"/></svg>'
    ).format(height=height, kind=kind, path=path)
