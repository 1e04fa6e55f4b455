"""Plots of a report: errors by layer and by position, KL divergences, routers' margins."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from qwenport.validate.html.svg import (
    LogScale,
    Plot,
    across,
    bar,
    decades_of,
    dots,
    gridline,
    is_broken,
    joined,
    mark,
    plot,
    power,
    rank,
    round_step,
    round_ticks,
    rule,
    spread,
    text,
)
from qwenport.validate.html.words import figure, margin

SERIES = ("accumulated", "local", "own")
LAYERS_HEIGHT, POSITIONS_HEIGHT, HISTOGRAM_HEIGHT, BAND_HEIGHT = 280.0, 130.0, 190.0, 44.0
MOST_BINS = 36
LEAST_BAR = 0.6  # percent
NAMED = 4  # non-finite values that a caption names one by one


def layers(rows: Sequence[dict[str, Any]], fault: dict[str, Any] | None) -> Plot | None:
    """Error by layer: one line per series."""
    if not rows:
        return None
    names = [row["name"] for row in rows]
    values = {series: [float(row[series]) for row in rows] for series in SERIES}
    scale = LogScale.of([v for line in values.values() for v in line], LAYERS_HEIGHT)
    xs = spread(len(rows))
    parts = scale.grid()
    bad = None if fault is None or fault["layer"] is None else f"layer {fault['layer']}"
    if bad in names:
        parts.append(rule(xs[names.index(bad)]))
    for series in reversed(SERIES):  # the first one lies on top
        heights = [scale.y(value) for value in values[series]]
        points = list(zip(xs, heights, strict=True))
        # No line leads to a zero on this scale, nor to a NaN.
        drawn = [0 < value < math.inf for value in values[series]]
        parts.append(joined(points, drawn, LAYERS_HEIGHT, series))
        parts.append(dots(points, LAYERS_HEIGHT, "broken", [*map(is_broken, values[series])]))
        parts += [
            mark(*point, series, f"{name}, {series}: {figure(value)}")
            for point, name, value in zip(points, names, values[series], strict=True)
            if not is_broken(value)
        ]
    # "embedding" is wider than a number: labels that would collide with it are left out.
    offset = int(names[0] == "embedding")
    labelled = [i + offset for i in round_ticks(len(names) - offset)]
    if offset:
        labelled = [0, *(i for i in labelled if xs[i] > 16)]
    below = LAYERS_HEIGHT + 18
    parts += [text(xs[i], below, short(names[i].removeprefix("layer "))) for i in labelled]
    parts.append(text(50, below + 20, "layer"))

    accumulated, local = values["accumulated"], values["local"]
    worst = max(range(len(rows)), key=lambda i: rank(local[i]))
    words = [
        f"Accumulated error: {figure(accumulated[0])} at {names[0]}"
        + (f", {figure(accumulated[-1])} at {names[-1]}." if len(rows) > 1 else "."),
        f"Largest local error: {figure(local[worst])} at {names[worst]}, "
        f"where transformers' own rounding is {figure(values['own'][worst])}.",
        *broken_in_words(
            (f"{series} at {name}", value)
            for series in SERIES
            for name, value in zip(names, values[series], strict=True)
        ),
    ]
    if bad in names:
        words.append(f"The dashed upright line is {bad}, where the fault starts.")
    return plot("layers", "Error by layer", words, LAYERS_HEIGHT, parts)


def positions(scenarios: Sequence[dict[str, Any]]) -> list[Plot]:
    """Error by position: one plot per scenario, all on the same scale."""
    found = [
        (s, [float(v) for v in s["by_position"]["rel_l2"]], _rel_l2_bound(s))
        for s in scenarios
        if s["by_position"] is not None and s["by_position"]["rel_l2"]
    ]
    every = [v for _, values, bound in found for v in (*values, *bound)]
    scale = LogScale.of(every, POSITIONS_HEIGHT)
    plots = []
    for number, (scenario, values, bound) in enumerate(found):
        xs = spread(len(values))
        parts = scale.grid()
        parts += [across(scale.y(value), "bound") for value in bound]
        points = [(x, scale.y(value)) for x, value in zip(xs, values, strict=True)]
        broken = [*map(is_broken, values)]
        parts.append(dots(points, POSITIONS_HEIGHT, "whole", [not each for each in broken]))
        parts.append(dots(points, POSITIONS_HEIGHT, "broken", broken))
        worst = max(range(len(values)), key=lambda i: rank(values[i]))
        if not broken[worst]:
            tip = f"position {worst}: {figure(values[worst])}"
            parts.append(mark(*points[worst], "worst", tip))
        below = POSITIONS_HEIGHT + 18
        parts += [text(xs[i], below, str(i)) for i in round_ticks(len(values))]

        words = [f"{len(values):,} positions. Largest {figure(values[worst])}, at {worst}"]
        words[0] += f"; median {figure(median(values))}." if len(values) > 1 else "."
        if zeros := sum(value == 0 for value in values):
            words.append(f"{zeros:,} are 0.")
        if differences := [float(v) for v in scenario["by_position"]["difference"]]:
            most = max(differences, key=rank)
            words.append(f"Largest ‖target − reference‖: {figure(most)} logits.")
        words += broken_in_words((f"position {i}", value) for i, value in enumerate(values))
        plots.append(plot(f"positions-{number}", scenario["name"], words, POSITIONS_HEIGHT, parts))
    return plots


def _rel_l2_bound(scenario: dict[str, Any]) -> list[float]:
    bounds = [float(c["bound"]) for c in scenario["checks"] if c["metric"] == "rel-L2"]
    return [bound for bound in bounds[:1] if 0 < bound < math.inf]


def divergences(scenarios: Sequence[dict[str, Any]]) -> Plot | None:
    """Histogram of the KL divergence at all scenarios' positions."""
    lists = [s["by_position"]["kl"] for s in scenarios if s["by_position"] is not None]
    values = [float(v) for each in lists for v in each]
    if not values:
        return None
    positive = [v for v in values if 0 < v < math.inf]
    broken = sum(map(is_broken, values))
    zeros = len(values) - len(positive) - broken
    # Room for four-digit labels at the narrowest width.
    left, right = 16.0, 82.0 if broken else 100.0
    columns = [(0.0, 8.0, zeros, f"exactly 0: {zeros:,}")]
    labels = [(4.0, "0")]
    if broken:
        columns.append((91.0, 100.0, broken, f"not finite: {broken:,}"))
        labels.append((95.5, "NaN, ∞"))
    if positive:
        low, high = decades_of(positive)
        # Whole fractions or multiples of a decade, so that bin edges coincide with labels.
        width = next((w for w in (0.25, 0.5, 1.0) if (high - low) / w <= MOST_BINS), None)
        width = width or float(math.ceil((high - low) / MOST_BINS))
        bins = math.ceil((high - low) / width)
        counts = Counter(min(int((math.log10(v) - low) / width), bins - 1) for v in positive)
        step = (right - left) / bins
        for i, count in counts.items():
            edges = f"1e{low + i * width:g} to 1e{low + (i + 1) * width:g}"
            columns.append((left + i * step, left + (i + 1) * step, count, f"{edges}: {count:,}"))
        every = round_step(high - low, 5)
        labels += [(left + step * (e - low) / width, power(e)) for e in range(low, high + 1, every)]
    most = max(count for _, _, count, _ in columns)
    unit = (HISTOGRAM_HEIGHT - 14) / most
    parts = []
    for count in range(0, most + 1, round_step(most, 4)):
        parts += gridline(HISTOGRAM_HEIGHT - count * unit, f"{count:,}")
    parts += [
        bar(start, end, HISTOGRAM_HEIGHT, max(count * unit, 1.5), tip)
        for start, end, count, tip in columns
        if count
    ]
    below = HISTOGRAM_HEIGHT + 18
    parts += [text(x, below, label) for x, label in labels]
    parts.append(text(50, below + 20, "KL(reference ‖ target), nats"))

    words = [
        f"{len(values):,} positions of all scenarios; {zeros:,} have a divergence of exactly 0."
    ]
    if positive:
        words.append(
            f"The others: {figure(min(positive))} to {figure(max(positive))}, "
            f"median {figure(median(positive))}."
        )
    if broken:
        words.append(f"{broken:,} are not finite: the bar at the right.")
    return plot("divergences", "KL divergence", words, HISTOGRAM_HEIGHT, parts)


def bands(routing: Sequence[dict[str, Any]]) -> Plot | None:
    """The share of expert choices that differ, by the router's margin."""
    if not routing:
        return None
    parts = []
    for number, band in enumerate(routing):
        top = number * BAND_HEIGHT
        choices, differing = band["choices"], band["choices"] - band["agreeing"]
        share = 100 * differing / choices if choices else 0.0
        said = f"{differing:,} of {choices:,} ({share:.3g}%)"
        parts.append(text(0, top + 16, margin(band), anchor="start"))
        parts.append(text(100, top + 16, said, anchor="end"))
        parts.append(bar(0, 100, top + 32, 8, said, "track"))
        if differing > 0:
            # A single choice among many stays visible.
            parts.append(bar(0, max(share, LEAST_BAR), top + 32, 8, said))
    choices = sum(band["choices"] for band in routing)
    differing = choices - sum(band["agreeing"] for band in routing)
    words = [
        f"{differing:,} of {choices:,} choices differ; the table has them by margin, in logits."
    ]
    height = BAND_HEIGHT * len(routing)
    return plot("bands", "Choices that differ, by the router's margin", words, height, parts)


def median(values: Sequence[float]) -> float:
    """The lower of two middle values; NaN counts as the largest."""
    return sorted(values, key=rank)[(len(values) - 1) // 2]


def short(text: str) -> str:
    return text if len(text) <= 10 else text[:9] + "…"


def broken_in_words(named: Iterable[tuple[str, float]]) -> list[str]:
    """A sentence that names the non-finite values, or nothing."""
    found = [f"{name} ({figure(v)})" for name, v in named if is_broken(v)]
    if not found:
        return []
    rest = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return [f"Not finite, at the top edge: {', '.join(found[:NAMED])}{rest}."]
