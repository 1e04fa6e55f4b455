"""report.json as one HTML page to be read offline: no script, no request, every plot an inline SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

TEMPLATE_NAME = "report.html.j2"

# Plots are as wide as the page lets them be, so x is in percent; heights are in pixels, and text keeps its size.
LAYERS_HEIGHT, POSITIONS_HEIGHT, HISTOGRAM_HEIGHT, BAND_HEIGHT = 280.0, 130.0, 190.0, 44.0
EDGE = 22.0  # of a log axis's own lines for zeros, below, and for what is not finite, above
INSET = 2.0  # percent left free beside the first and the last point
MOST_BINS = 36
LEAST_BAR = 0.6  # percent
NAMED = 4  # values that are not finite and are named one by one in a caption

# Lines are told apart by their marks and dashes, not by colour alone.
SERIES = {
    "accumulated": "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0z",
    "local": "M-3.7-3.7h7.4v7.4h-7.4z",
    "own": "M0-5 5 0 0 5-5 0z",
}
MARKS = SERIES | {"worst": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0z"}

METRICS = (
    ("positions", "positions", "judged"),
    ("vocab", "vocabulary", "logits a position"),
    ("nonfinite", "not finite", "NaN and infinite logits of the target"),
    ("rel_l2", "rel-L2", "‖target − reference‖ / ‖reference‖, all positions as one vector"),
    ("own_ratio", "times own error", "rel-L2 / transformers' own rel-L2 in the target's dtype"),
    ("worst_rel_l2", "worst rel-L2", "of one position"),
    ("worst_position", "worst position", "where that is, counted from 0"),
    ("max_abs", "max abs", "largest |target − reference|, in logits"),
    ("mean_abs", "mean abs", "mean |target − reference|, in logits"),
    ("cosine_p5", "cosine p5", "5th percentile, over positions, of the cosine similarity"),
    ("kl_mean", "KL mean", "KL(reference ‖ target) in nats, over positions"),
    ("kl_p99", "KL p99", "its 99th percentile"),
    ("top1", "same top-1", "share of positions with the same most likely token"),
    ("top1_clear", "same top-1, clear", "the same, without near-ties"),
    ("near_ties", "near-ties", "positions where the reference's two best logits are too close"),
    ("near_tie_margin", "near-tie margin", "closer than this, in logits"),
    ("smallest_margin", "smallest margin", "between the reference's two best logits"),
    ("first_disagreement", "first disagreement", "first position with another top-1"),
    ("first_disagreement_margin", "its margin", "the reference's, at that position"),
    ("top5_overlap", "top-5 overlap", "share of the five most likely tokens that both name"),
)
JUDGED_AS = {
    "package": "the package's graph",
    "tensorrt-network": "the network that TensorRT's parser reads from the package",
    "engine": "the engine",
}
REFERENCE_MODES = {"whole": "loaded whole", "streamed": "one layer in memory at a time"}

_Point = tuple[float, float]  # percent of the width, pixels from the top


def render(report: dict[str, Any]) -> str:
    """The page for a report's JSON object of schema version 2.

    Args:
        report: as in report.json; numbers that are not finite are the strings "NaN", "Infinity", "-Infinity".
    """
    # A target may raise an error with anything in it, and a path may hold bytes that are no text.
    visible: dict[str, Any] = _visible(report)
    scenarios = visible["scenarios"]
    return _template().render(
        report=visible,
        verdict=_verdict(visible),
        failed=[s for s in scenarios if s["status"] == "failed"],
        measured=[s for s in scenarios if s["metrics"] is not None],
        metrics=METRICS,
        series=SERIES,
        judged_as=JUDGED_AS.get(visible["judged_as"], visible["judged_as"]),
        reference_mode=REFERENCE_MODES.get(visible["reference_mode"], visible["reference_mode"]),
        layers=_layers(visible["layers_error"], visible["fault"]),
        positions=_positions(scenarios),
        divergences=_divergences(scenarios),
        bands=_bands(visible["routing"]),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["figure"] = _figure
    environment.filters["range"] = _range
    return environment.get_template(TEMPLATE_NAME)


def _visible(value: Any) -> Any:
    """The same, with characters that cannot be seen written as escapes; \\u202e would reorder a path."""
    if isinstance(value, dict):
        return {_visible(key): _visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(item) for item in value]
    if isinstance(value, str):
        return "".join(
            c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
            for c in value
        )
    return value


def _figure(value: float | str | None, digits: int = 3) -> str:
    """A number to be read; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    number = float(value)
    if math.isfinite(number):
        return f"{number:.{digits}g}"
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _range(band: dict[str, Any]) -> str:
    """For example "1e-05 to 0.0001"."""
    if float(band["most"]) == math.inf:
        return f"{float(band['least']):g} or more"
    return f"{float(band['least']):g} to {float(band['most']):g}"


@dataclass(frozen=True)
class _Verdict:
    """`kind` is "holds", "qualified" (it holds, but less was asked), "fails" or "open"."""

    kind: str
    headline: str
    text: str


def _verdict(report: dict[str, Any]) -> _Verdict:
    counts = Counter(scenario["status"] for scenario in report["scenarios"])
    tally = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none was run"
    judged, layers = report["layers_judged"], report["layers"]
    partly = f" in the first {judged} of {layers} layers" if judged < layers else ""
    if not report["complete"]:
        text = (
            "The run ended before everything was judged, and nothing on this page is a verdict on "
            f"the target. Scenarios until then: {tally}."
        )
        return _Verdict("open", "Interrupted: no verdict", text)
    if counts["failed"]:
        return _Verdict("fails", f"Parity does not hold{partly}", f"Scenarios: {tally}.")
    if not report["passed"]:
        text = f"No scenario compared logits. Scenarios: {tally}."
        return _Verdict("open", "Parity is not shown", text)
    loosened = ", by loosened bounds" if report["loosened"] else ""
    text = f"Scenarios: {tally}."
    if partly or loosened:
        return _Verdict("qualified", f"Parity holds{partly}{loosened}", text)
    text = f"The target computes what transformers computes, within the bounds below. {text}"
    return _Verdict("holds", "Parity holds", text)


@dataclass(frozen=True)
class _Plot:
    """`words` say what the picture shows, to those who do not see it as well."""

    key: str
    title: str
    words: str
    svg: Markup


def _layers(rows: Sequence[dict[str, Any]], fault: dict[str, Any] | None) -> _Plot | None:
    """Error by layer: one line a series."""
    if not rows:
        return None
    names = [row["name"] for row in rows]
    values = {series: [float(row[series]) for row in rows] for series in SERIES}
    scale = _LogScale.of([v for line in values.values() for v in line], LAYERS_HEIGHT)
    xs = _spread(len(rows))
    parts = scale.grid()
    bad = None if fault is None or fault["layer"] is None else f"layer {fault['layer']}"
    if bad in names:
        parts.append(_rule(xs[names.index(bad)]))
    for series in reversed(SERIES):  # the first one lies on top
        heights = [scale.y(value) for value in values[series]]
        points = list(zip(xs, heights, strict=True))
        # Nothing leads to a zero on this scale, nor to a NaN.
        drawn = [0 < value < math.inf for value in values[series]]
        parts.append(_joined(points, drawn, LAYERS_HEIGHT, series))
        parts.append(_dots(points, LAYERS_HEIGHT, "broken", [*map(_is_broken, values[series])]))
        parts += [
            _mark(*point, series, f"{name}, {series}: {_figure(value)}")
            for point, name, value in zip(points, names, values[series], strict=True)
            if not _is_broken(value)
        ]
    # "embedding" is wider than a number: what would collide with it gets no label.
    offset = int(names[0] == "embedding")
    labelled = [i + offset for i in _round_ticks(len(names) - offset)]
    if offset:
        labelled = [0, *(i for i in labelled if xs[i] > 16)]
    below = LAYERS_HEIGHT + 18
    parts += [_text(xs[i], below, _short(names[i].removeprefix("layer "))) for i in labelled]
    parts.append(_text(50, below + 20, "layer"))

    accumulated, local = values["accumulated"], values["local"]
    worst = max(range(len(rows)), key=lambda i: _rank(local[i]))
    words = [
        f"Accumulated error: {_figure(accumulated[0])} at {names[0]}"
        + (f", {_figure(accumulated[-1])} at {names[-1]}." if len(rows) > 1 else "."),
        f"Largest local error: {_figure(local[worst])} at {names[worst]}, "
        f"where transformers' own rounding is {_figure(values['own'][worst])}.",
        *_broken(
            (f"{series} at {name}", value)
            for series in SERIES
            for name, value in zip(names, values[series], strict=True)
        ),
    ]
    if bad in names:
        words.append(f"The dashed upright line is {bad}, where the fault starts.")
    return _plot("layers", "Error by layer", words, LAYERS_HEIGHT, parts)


def _positions(scenarios: Sequence[dict[str, Any]]) -> list[_Plot]:
    """Error by position: one plot a scenario, all on one scale."""
    found = [
        (s["name"], [float(v) for v in s["by_position"]["rel_l2"]], _rel_l2_bound(s))
        for s in scenarios
        if s["by_position"] is not None and s["by_position"]["rel_l2"]
    ]
    every = [v for _, values, bound in found for v in (*values, *bound)]
    scale = _LogScale.of(every, POSITIONS_HEIGHT)
    plots = []
    for number, (name, values, bound) in enumerate(found):
        xs = _spread(len(values))
        parts = scale.grid()
        parts += [_across(scale.y(value), "bound") for value in bound]
        points = [(x, scale.y(value)) for x, value in zip(xs, values, strict=True)]
        broken = [*map(_is_broken, values)]
        parts.append(_dots(points, POSITIONS_HEIGHT, "whole", [not each for each in broken]))
        parts.append(_dots(points, POSITIONS_HEIGHT, "broken", broken))
        worst = max(range(len(values)), key=lambda i: _rank(values[i]))
        if not broken[worst]:
            tip = f"position {worst}: {_figure(values[worst])}"
            parts.append(_mark(*points[worst], "worst", tip))
        below = POSITIONS_HEIGHT + 18
        parts += [_text(xs[i], below, str(i)) for i in _round_ticks(len(values))]

        words = [f"{len(values):,} positions. Largest {_figure(values[worst])}, at {worst}"]
        words[0] += f"; median {_figure(_median(values))}." if len(values) > 1 else "."
        if zeros := sum(value == 0 for value in values):
            words.append(f"{zeros:,} are 0.")
        words += _broken((f"position {i}", value) for i, value in enumerate(values))
        plots.append(_plot(f"positions-{number}", name, words, POSITIONS_HEIGHT, parts))
    return plots


def _rel_l2_bound(scenario: dict[str, Any]) -> list[float]:
    bounds = [float(c["bound"]) for c in scenario["checks"] if c["metric"] == "rel-L2"]
    return [bound for bound in bounds[:1] if 0 < bound < math.inf]


def _divergences(scenarios: Sequence[dict[str, Any]]) -> _Plot | None:
    """How many positions of all scenarios have which KL divergence."""
    lists = [s["by_position"]["kl"] for s in scenarios if s["by_position"] is not None]
    values = [float(v) for each in lists for v in each]
    if not values:
        return None
    positive = [v for v in values if 0 < v < math.inf]
    broken = sum(map(_is_broken, values))
    zeros = len(values) - len(positive) - broken
    # Room for labels of four digits at the narrowest.
    left, right = 16.0, 82.0 if broken else 100.0
    columns = [(0.0, 8.0, zeros, f"exactly 0: {zeros:,}")]
    labels = [(4.0, "0")]
    if broken:
        columns.append((91.0, 100.0, broken, f"not finite: {broken:,}"))
        labels.append((95.5, "NaN, ∞"))
    if positive:
        low, high = _decades(positive)
        # Whole fractions or multiples of a decade, so that bins end where the labels are.
        width = next((w for w in (0.25, 0.5, 1.0) if (high - low) / w <= MOST_BINS), None)
        width = width or float(math.ceil((high - low) / MOST_BINS))
        bins = math.ceil((high - low) / width)
        counts = Counter(min(int((math.log10(v) - low) / width), bins - 1) for v in positive)
        step = (right - left) / bins
        for i, count in counts.items():
            edges = f"1e{low + i * width:g} to 1e{low + (i + 1) * width:g}"
            columns.append((left + i * step, left + (i + 1) * step, count, f"{edges}: {count:,}"))
        every = _round_step(high - low, 5)
        labels += [
            (left + step * (e - low) / width, _power(e)) for e in range(low, high + 1, every)
        ]
    most = max(count for _, _, count, _ in columns)
    unit = (HISTOGRAM_HEIGHT - 14) / most
    parts = []
    for count in range(0, most + 1, _round_step(most, 4)):
        parts += _gridline(HISTOGRAM_HEIGHT - count * unit, f"{count:,}")
    parts += [
        _bar(start, end, HISTOGRAM_HEIGHT, max(count * unit, 1.5), tip)
        for start, end, count, tip in columns
        if count
    ]
    below = HISTOGRAM_HEIGHT + 18
    parts += [_text(x, below, label) for x, label in labels]
    parts.append(_text(50, below + 20, "KL(reference ‖ target), nats"))

    words = [
        f"{len(values):,} positions of all scenarios; {zeros:,} have a divergence of exactly 0."
    ]
    if positive:
        words.append(
            f"The others: {_figure(min(positive))} to {_figure(max(positive))}, "
            f"median {_figure(_median(positive))}."
        )
    if broken:
        words.append(f"{broken:,} are not finite: the bar at the right.")
    return _plot("divergences", "KL divergence", words, HISTOGRAM_HEIGHT, parts)


def _bands(routing: Sequence[dict[str, Any]]) -> _Plot | None:
    """The share of expert choices that differ, by the router's margin."""
    if not routing:
        return None
    parts = []
    for number, band in enumerate(routing):
        top = number * BAND_HEIGHT
        choices, differing = band["choices"], band["choices"] - band["agreeing"]
        share = 100 * differing / choices if choices else 0.0
        said = f"{differing:,} of {choices:,} ({share:.3g}%)"
        parts.append(_text(0, top + 16, _range(band), anchor="start"))
        parts.append(_text(100, top + 16, said, anchor="end"))
        parts.append(_bar(0, 100, top + 32, 8, said, "track"))
        if differing > 0:
            # One choice among many is still seen.
            parts.append(_bar(0, max(share, LEAST_BAR), top + 32, 8, said))
    choices = sum(band["choices"] for band in routing)
    differing = choices - sum(band["agreeing"] for band in routing)
    words = [
        f"{differing:,} of {choices:,} choices differ; the table has them by margin, in logits."
    ]
    height = BAND_HEIGHT * len(routing)
    return _plot("bands", "Choices that differ, by the router's margin", words, height, parts)


@dataclass(frozen=True)
class _LogScale:
    """Value -> height. Zeros get a line of their own below the decades, what is not finite one above them."""

    decades: tuple[int, int] | None  # exponents; None where no value is positive and finite
    zeros: bool
    broken: bool
    height: float

    @classmethod
    def of(cls, values: Sequence[float], height: float) -> _LogScale:
        positive = [v for v in values if 0 < v < math.inf]
        return cls(
            _decades(positive) if positive else None,
            any(v <= 0 and not _is_broken(v) for v in values),
            any(map(_is_broken, values)),
            height,
        )

    def y(self, value: float) -> float:
        if _is_broken(value):
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
        """Lines across, with their labels."""
        lines = []
        if self.decades:
            low, high = self.decades
            for exponent in range(low, high + 1, _round_step(high - low, self.height // 35)):
                lines += _gridline(self._y(exponent), _power(exponent))
        if self.zeros:
            lines += _gridline(self.height, "0")
        if self.broken:
            lines += _gridline(0, "NaN, ∞")
        return lines


def _power(exponent: int) -> str:
    return f"1e{exponent}" if exponent else "1"


def _decades(positive: Sequence[float]) -> tuple[int, int]:
    low = math.floor(math.log10(min(positive)))
    return low, max(math.ceil(math.log10(max(positive))), low + 1)


def _spread(count: int) -> list[float]:
    """Places of `count` points, in percent."""
    if count == 1:
        return [50.0]
    return [INSET + (100 - 2 * INSET) * i / (count - 1) for i in range(count)]


def _round_step(span: int, most: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50 ... that divides `span` into at most `most` steps."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if span <= step * factor * most:
                return step * factor
        step *= 10


def _round_ticks(count: int) -> range:
    return range(0, count, _round_step(max(count - 1, 1), 6))


def _is_broken(value: float) -> bool:
    return not math.isfinite(value)


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _median(values: Sequence[float]) -> float:
    """The lower one of two; NaN counts as the largest."""
    return sorted(values, key=_rank)[(len(values) - 1) // 2]


def _short(text: str) -> str:
    return text if len(text) <= 10 else text[:9] + "…"


def _broken(named: Iterable[tuple[str, float]]) -> list[str]:
    """A sentence that names the values that are not finite, or nothing."""
    found = [f"{name} ({_figure(v)})" for name, v in named if _is_broken(v)]
    if not found:
        return []
    rest = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
    return [f"Not finite, at the top edge: {', '.join(found[:NAMED])}{rest}."]


def _plot(
    key: str, title: str, words: Sequence[str], height: float, parts: Iterable[Markup]
) -> _Plot:
    svg = Markup(
        '<svg class="chart" role="img" width="100%" height="{height:g}" '
        'aria-labelledby="{key}-title" aria-describedby="{key}-words">'
        '<title id="{key}-title">{title}</title>{parts}</svg>'
    ).format(height=height, key=key, title=title, parts=Markup("").join(parts))
    return _Plot(key, title, " ".join(words), svg)


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> Markup:
    return Markup('<text x="{:.2f}%" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def _gridline(y: float, label: str) -> list[Markup]:
    """A line across, its label left of the plot."""
    return [
        _across(y, "grid"),
        Markup('<text x="-8" y="{:.1f}" dy="4" text-anchor="end">{}</text>').format(y, label),
    ]


def _across(y: float, kind: str) -> Markup:
    return Markup('<line x1="0" x2="100%" y1="{:.1f}" y2="{:.1f}" class="{}"/>').format(y, y, kind)


def _rule(x: float) -> Markup:
    """An upright line, where a fault starts."""
    return Markup('<line x1="{:.2f}%" x2="{:.2f}%" y1="0" y2="100%" class="fault"/>').format(x, x)


def _bar(
    left: float, right: float, bottom: float, height: float, tip: str, kind: str = "bar"
) -> Markup:
    return Markup(
        '<rect x="{:.2f}%" y="{:.1f}" width="{:.2f}%" height="{:.1f}" class="{}">'
        "<title>{}</title></rect>"
    ).format(left, bottom - height, right - left, height, kind, tip)


def _mark(x: float, y: float, kind: str, tip: str) -> Markup:
    """A mark that keeps its shape however wide the plot becomes; `tip` shows when it is pointed at."""
    return Markup(
        '<svg x="{:.2f}%" y="{:.1f}" class="mark {}"><title>{}</title><path d="{}"/></svg>'
    ).format(x, y, kind, tip, MARKS[kind])


def _joined(points: Sequence[_Point], drawn: Sequence[bool], height: float, series: str) -> Markup:
    """A line through the points that are drawn, broken where one is not."""
    steps, pen = [], "M"
    for (x, y), present in zip(points, drawn, strict=True):
        if present:
            steps.append(f"{pen}{x:.2f} {y:.1f}")
        pen = "L" if present else "M"
    return _stretched("".join(steps), height, f"line {series}")


def _dots(points: Sequence[_Point], height: float, kind: str, drawn: Sequence[bool]) -> Markup:
    """Thousands of points in one path: lines without a length, of which only the ends are seen."""
    steps = [
        f"M{x:.2f} {y:.1f}h0" for (x, y), present in zip(points, drawn, strict=True) if present
    ]
    return _stretched("".join(steps), height, f"dots {kind}")


def _stretched(path: str, height: float, kind: str) -> Markup:
    """A path whose x is in percent, as wide as the plot; its strokes are not stretched."""
    if not path:
        return Markup("")
    return Markup(
        '<svg width="100%" height="{height:g}" viewBox="0 0 100 {height:g}" '
        'preserveAspectRatio="none"><path class="{kind}" d="{path}"/></svg>'
    ).format(height=height, kind=kind, path=path)
