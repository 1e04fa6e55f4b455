"""A report's page: the verdict and its subject, the scenarios in sections, the templates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from qwenport.contract import ENGINE, NETWORK, PACKAGE
from qwenport.validate import identity, rows
from qwenport.validate.html import coverage, plots, rounding, svg, words

TEMPLATE_NAME = "report.html.j2"
COLUMNS = 6  # scenarios side by side, as many as fit on a sheet of paper
LISTED = 4  # failed scenarios named next to the verdict; the others if the reader expands the list

METRICS = (
    ("positions", "positions", "judged"),
    ("vocab", "vocabulary", "logits per position"),
    ("nonfinite", "not finite", "NaN and infinite logits of the target"),
    ("rel_l2", "rel-L2", "‖target − reference‖ / ‖reference‖, all positions as one vector"),
    ("own_ratio", "times own error", "rel-L2 / transformers' own: in that dtype, in fp32 rounding"),
    ("worst_rel_l2", "worst rel-L2", "of one position"),
    ("worst_position", "worst position", "where that is, counted from 0"),
    ("effective_positions", "effective positions", "over how many positions the error is spread"),
    ("max_abs", "max abs", "largest |target − reference|, in logits"),
    ("mean_abs", "mean abs", "mean |target − reference|, in logits"),
    ("cosine_p5", "cosine p5", "5th percentile, over positions, of the cosine similarity"),
    ("kl_mean", "KL mean", "KL(reference ‖ target) in nats, over positions"),
    ("kl_p99", "KL p99", "its 99th percentile"),
    ("top1", "same top-1", "share of positions with the same most likely token"),
    ("top1_clear", "same top-1, clear", "the same, without near-ties"),
    ("near_ties", "near-ties", "positions where the reference's two best logits are too close"),
    ("near_tie_margin", "near-tie margin", "closer than this, in logits; the largest of all"),
    ("smallest_margin", "smallest margin", "between the reference's two best logits"),
    ("first_disagreement", "first disagreement", "first position with another top-1"),
    ("first_disagreement_margin", "its margin", "the reference's, at that position"),
    ("top5_overlap", "top-5 overlap", "share of the five most likely tokens that both name"),
)
INTERVALS = {
    "own_ratio": "own_ratio_interval",
    "kl_mean": "kl_interval",
    "top1_clear": "top1_interval",
}
JUDGED_AS = {
    PACKAGE: "the package's graph",
    NETWORK: "the network that TensorRT's parser reads from the package",
    ENGINE: "the engine",
}
REFERENCE_MODES = {"whole": "loaded whole", "streamed": "one layer in memory at a time"}


@dataclass(frozen=True)
class Section:
    """Scenarios that belong together.

    Attributes:
        names: the scenarios' names; None for those in no other section.
        prefix: name prefix of further scenarios.
    """

    title: str
    text: str
    names: tuple[str, ...] | None
    prefix: str | None = None

    def has(self, name: str) -> bool:
        """Whether the section contains a scenario."""
        named = self.names is not None and name in self.names
        return named or (self.prefix is not None and name.startswith(self.prefix))


SECTIONS = (
    Section(
        "Identity",
        "Is it what the exporter makes of this checkpoint? Compared byte for byte and node for node.",
        (identity.WEIGHTS, identity.GRAPH, identity.FILES, rows.CONSTANTS),
    ),
    Section(
        "Structure and pieces",
        "What can be judged by itself: the parsed network, the tables, the embedding, single layers, routers.",
        (rows.PARSED, rows.ROPE_TABLES, rows.EMBEDDING, rows.ROUTING),
        "distance of ",
    ),
    Section(
        "Ways of running",
        "Logits against transformers', in every way in which a session can be fed.",
        None,
    ),
    Section(
        "Half precision",
        "The rounding of the declared types against transformers' own in the same dtype.",
        (rows.LAYERS, rows.OPERATORS, "in bf16", "in fp16"),
    ),
)


def render(report: dict[str, Any]) -> str:
    """Render the page for a report's JSON object, schema version 3.

    Args:
        report: as in report.json; non-finite numbers are the strings "NaN", "Infinity", "-Infinity".
    """
    # A target's error may contain anything, and a path may contain bytes that are not text.
    shown: dict[str, Any] = words.visible(report)
    scenarios = shown["scenarios"]
    return _template().render(
        report=shown,
        verdict=verdict_of(shown),
        failed=[s for s in scenarios if s["status"] == "failed"],
        columns=COLUMNS,
        listed=LISTED,
        measured=[s for s in scenarios if s["metrics"] is not None],
        sections=_sections(scenarios),
        metrics=METRICS,
        intervals=INTERVALS,
        marks=svg.MARKS,
        judged_as=JUDGED_AS.get(shown["judged_as"], shown["judged_as"]),
        reference_mode=REFERENCE_MODES.get(shown["reference_mode"], shown["reference_mode"]),
        coverage=None if shown["coverage"] is None else coverage.rows_of(shown["coverage"]),
        series=plots.SERIES,
        layers=plots.layers(shown["layers_error"], shown["fault"]),
        positions=plots.positions(scenarios),
        divergences=plots.divergences(scenarios),
        bands=plots.bands(shown["routing"]),
        rounding_plots=rounding.plots(shown["rounding"]),
        quantiles=list(zip(rounding.SERIES, rounding.quantiles(shown["rounding"]), strict=False)),
        crowded=rounding.is_crowded(shown["rounding"]),
        worst=rounding.worst(shown["rounding"]),
        bounds=rounding.BOUNDS,
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
    environment.filters["figure"] = words.figure
    environment.filters["interval"] = words.interval
    environment.filters["margin"] = words.margin
    environment.filters["place"] = rounding.place_of
    environment.filters["without_tokens"] = coverage.without_tokens
    return environment.get_template(TEMPLATE_NAME)


def _sections(scenarios: Sequence[dict[str, Any]]) -> list[tuple[Section, str, list[Any]]]:
    """(section, its tally, its scenarios), for non-empty sections."""
    found = []
    for section in SECTIONS:
        members = [s for s in scenarios if _section_of(s["name"]) is section]
        if members:
            found.append((section, tally(members), members))
    return found


def _section_of(name: str) -> Section:
    named = (section for section in SECTIONS if section.has(name))
    return next(named, next(section for section in SECTIONS if section.names is None))


def tally(scenarios: Sequence[dict[str, Any]]) -> str:
    """For example "9 passed, 1 failed"."""
    counts = Counter(scenario["status"] for scenario in scenarios)
    known = ("passed", "failed", "not run")
    return ", ".join(f"{counts[each]} {each}" for each in known if counts[each]) or "none was run"


@dataclass(frozen=True)
class Verdict:
    """`kind` is "holds", "qualified" (holds, but less was judged), "fails" or "open"."""

    kind: str
    headline: str
    text: str
    judged: str


def verdict_of(report: dict[str, Any]) -> Verdict:
    """The verdict in words, always with what was judged."""
    told = tally(report["scenarios"])
    judged = report["verdict"].rpartition("; judged: ")[2]
    count, layers = report["layers_judged"], report["layers"]
    partly = f" in the first {count} of {layers} layers" if count < layers else ""
    if not report["complete"]:
        text = (
            "The run ended before everything was judged, and nothing on this page is a verdict on "
            f"the target. Scenarios until then: {told}."
        )
        return Verdict("open", "Interrupted: no verdict", text, judged)
    text = f"Scenarios: {told}."
    if any(scenario["status"] == "failed" for scenario in report["scenarios"]):
        return Verdict("fails", f"Parity does not hold{partly}", text, judged)
    if not report["passed"]:
        text = f"No scenario compared logits. {text}"
        return Verdict("open", "Parity is not shown", text, judged)
    if coverage.is_empty(report["coverage"]):
        text = f"The report does not say what was judged. {text}"
        return Verdict("open", "Parity is not shown", text, judged)
    loosened = ", by loosened bounds" if report["loosened"] else ""
    if partly or loosened:
        return Verdict("qualified", f"Parity holds{partly}{loosened}", text, judged)
    text = f"The target computes what transformers computes, within the bounds below. {text}"
    return Verdict("holds", "Parity holds", text, judged)
