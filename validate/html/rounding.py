"""Half precision at every layer and operator: ratios to transformers' own error, and where they are worst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwenport.validate.html.plots import broken_in_words
from qwenport.validate.html.svg import (
    LogScale,
    Plot,
    across,
    dots,
    is_broken,
    joined,
    mark,
    plot,
    rank,
    round_ticks,
    spread,
    text,
    whisker,
)
from qwenport.validate.html.words import figure
from qwenport.validate.localisation import WHOLE_LAYER
from qwenport.validate.thresholds import ROUNDING_SYSTEMATIC_TIMES_OWN, ROUNDING_TIMES_OWN
from qwenport.wording import counted

BOUNDS = {"relative": ROUNDING_TIMES_OWN, "systematic": ROUNDING_SYSTEMATIC_TIMES_OWN}
TITLES = {
    "relative": "Relative error, times transformers' own",
    "systematic": "Its systematic part, times transformers' own",
}
SERIES = ("first", "second")  # quantiles
HEIGHT = 200.0
CROWDED = 24  # more whole layers than this need a full-width plot
WORST = 12  # operators listed individually


@dataclass(frozen=True)
class Place:
    """An operator and its worst number; None if it has none.

    Attributes:
        excess: the lower end of the ratio in units of its bound; above 1 it fails.
        kind: "relative" or "systematic".
        spread: as in report.json.
    """

    error: dict[str, Any]
    excess: float
    kind: str | None
    spread: dict[str, Any] | None
    bound: float | None


def place_of(error: dict[str, Any]) -> str:
    """For example "layer 3"."""
    return "behind the layers" if error["layer"] is None else f"layer {error['layer']}"


def worst(errors: Sequence[dict[str, Any]]) -> list[Place]:
    """The operators furthest beyond their bound, or nearest to it."""
    inside = [_place(error) for error in errors if error["operator"] != WHOLE_LAYER]
    return sorted(inside, key=lambda place: -place.excess)[:WORST]


def quantiles(errors: Sequence[dict[str, Any]]) -> list[str]:
    """The quantiles that the plots show, one per series."""
    for error in errors:
        if error["relative"]:
            return [figure(spread["quantile"]) for spread in error["relative"][: len(SERIES)]]
    return []


def is_crowded(errors: Sequence[dict[str, Any]]) -> bool:
    """Whether the plots have so many layers that marks must be smaller."""
    return sum(error["operator"] == WHOLE_LAYER for error in errors) > CROWDED


def plots(errors: Sequence[dict[str, Any]]) -> list[Plot]:
    """The ratios of whole layers and of what follows them, one plot per kind of error."""
    whole = [each for each in errors if each["operator"] == WHOLE_LAYER or each["layer"] is None]
    return [_plot(kind, whole) for kind in BOUNDS] if whole else []


def _place(error: dict[str, Any]) -> Place:
    found = [
        (rank(float(spread["least"])) / bound, kind, spread, bound)
        for kind, bound in BOUNDS.items()
        for spread in error[kind]
    ]
    most = max(found, key=lambda each: each[0], default=(0.0, None, None, None))
    return Place(error, math.inf if error["nonfinite"] else most[0], *most[1:])


def _plot(kind: str, errors: Sequence[dict[str, Any]]) -> Plot:
    bound = BOUNDS[kind]
    names = [
        error["operator"] if error["layer"] is None else f"layer {error['layer']}"
        for error in errors
    ]
    every = [float(s[key]) for e in errors for s in e[kind] for key in ("times_own", "least")]
    scale = LogScale.of([*every, bound], HEIGHT)
    xs = spread(len(errors))
    apart = min(0.8, (xs[1] - xs[0]) / 6) if len(xs) > 1 else 0.8
    parts = [*scale.grid(), across(scale.y(bound), "bound")]
    for index, series in enumerate(SERIES):
        found = [
            (x + (index - 0.5) * apart, name, error[kind][index])
            for x, name, error in zip(xs, names, errors, strict=True)
            if index < len(error[kind])
        ]
        ratios = [float(spread["times_own"]) for _, _, spread in found]
        points = [(x, scale.y(ratio)) for (x, _, _), ratio in zip(found, ratios, strict=True)]
        parts.append(joined(points, [0 < r < math.inf for r in ratios], HEIGHT, series))
        parts.append(dots(points, HEIGHT, "broken", [*map(is_broken, ratios)]))
        for (x, y), (_, name, each), ratio in zip(points, found, ratios, strict=True):
            if not is_broken(ratio):
                parts.append(whisker(x, y, scale.y(float(each["least"])), series))
                tip = f"{name}: {figure(ratio)}, at least {figure(each['least'])}"
                parts.append(mark(x, y, series, f"{tip}, at quantile {figure(each['quantile'])}"))
    below = HEIGHT + 18
    parts += [text(xs[i], below, _label(errors[i])) for i in _labelled(errors)]
    parts.append(text(50, below + 20, "layer"))
    return plot(f"rounding-{kind}", TITLES[kind], _words(kind, errors, names), HEIGHT, parts)


def _words(kind: str, errors: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    ends = [
        (rank(float(spread["least"])), name)
        for error, name in zip(errors, names, strict=True)
        for spread in error[kind]
    ]
    words = []
    if ends:
        most, name = max(ends)
        words.append(
            f"Largest lower end {figure(most)}, at {name}; it may be {BOUNDS[kind]:g} at most."
        )
    words += [
        f"NaN or infinity at {error['nonfinite']:,} of {counted(error['positions'], 'position')} of {name}."
        for error, name in zip(errors, names, strict=True)
        if error["nonfinite"]
    ]
    return words + broken_in_words(
        (f"{name} at quantile {figure(spread['quantile'])}", float(spread["times_own"]))
        for error, name in zip(errors, names, strict=True)
        for spread in error[kind][: len(SERIES)]
    )


def _label(error: dict[str, Any]) -> str:
    return "end" if error["layer"] is None else str(error["layer"])


def _labelled(errors: Sequence[dict[str, Any]]) -> list[int]:
    """Places that get a label: round numbers, and the end if there is room."""
    ticks = list(round_ticks(len(errors)))
    last = len(errors) - 1
    if len(ticks) > 1 and last not in ticks:
        if last - ticks[-1] < (ticks[1] - ticks[0]) / 2:
            ticks.pop()
        ticks.append(last)
    return ticks
