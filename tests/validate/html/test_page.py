"""The HTML report: every page well formed and harmless, and all of the report on it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given

from qwenport.validate import Check, Fault, OperatorError, Report, ScenarioResult
from qwenport.validate.coverage import Coverage, Experts
from qwenport.validate.html.words import figure, runs
from qwenport.validate.metrics import ByPosition, Interval, Metrics
from qwenport.validate.report import SCHEMA_VERSION, RouterBand
from qwenport.validate.rounding import RoundingError, Spread

from .page import Page, opened, seen, written
from .pieces import in_bf16, not_run, scenario
from .reports import HOSTILE, extremes, failing, hostile, interrupted, passing
from .strategies import any_report


def assert_scenarios_said(page: Page, report: dict[str, Any]) -> None:
    for each in report["scenarios"]:
        assert seen(each["name"]) in page.text
        assert seen(each["summary"]) in page.text
        assert seen(each["reason"] or "") in page.text
        assert each["status"] in page.text
        for check in each["checks"]:
            assert written(check["value"]) in page.text
            assert f"{check['relation']} {written(check['bound'])}" in page.text
        for key in ("own_ratio_interval", "kl_interval", "top1_interval"):
            ends = (each["metrics"] or {}).get(key)
            if ends is not None:
                digits = 6 if key == "top1_interval" else 3
                low, high = (figure(ends[end], digits) for end in ("low", "high"))
                assert f"{low} to {high} (" in page.text


def assert_coverage_said(page: Page, coverage: dict[str, Any]) -> None:
    cells = "".join(cell for row in page.rows for cell in row)
    for key, value in coverage.items():
        if isinstance(value, int) and (value or key != "rounding"):
            assert f"{value:,}" in page.text, key
    for text in (coverage["budget"], *coverage["left_out"], *coverage["layer_distance"]):
        assert seen(text) in page.text
    for key in ("spans", "capacities"):
        assert all(f"{value:,}" in cells for value in coverage[key])
    for key in ("step_widths", "batches", "rows"):
        for first, last in runs(coverage[key]):
            assert f"{first:,}" in cells and f"{last:,}" in cells
    for first, last in (*coverage["positions"], *coverage["single_positions"]):
        assert f"{first:,}" in cells and f"{last:,}" in cells


def assert_rounding_said(page: Page, rounding: list[dict[str, Any]]) -> None:
    for error in rounding:
        assert seen(error["operator"]) in page.text
        assert f"{error['nonfinite']:,}" in page.text
        for spread in (*error["relative"], *error["systematic"]):
            made, own, times, least = (
                figure(spread[key]) for key in ("made", "own", "times_own", "least")
            )
            assert f"{made} / {own} = {times}, at least {least}" in page.text


@given(any_report)
def test_any_report_is_a_well_formed_page_that_says_all_of_it(report: dict[str, Any]) -> None:
    page = opened(report)
    assert seen(report["verdict"].rpartition("; judged: ")[2]) in page.text
    assert_scenarios_said(page, report)
    coverage = report["coverage"]
    if coverage is not None:
        assert_coverage_said(page, coverage)
    assert_rounding_said(page, report["rounding"])
    for line in report["loosened"]:
        assert seen(line) in page.text
    for facts in ("environment", "hashes", "weights_sha256"):
        for key, value in report[facts].items():
            assert seen(key) in page.text and seen(value) in page.text
    assert seen(report["script"] or "") in page.text
    if report["fault"] is None:
        assert seen(report["unexplained"] or "") in page.text
    held = report["complete"] and report["passed"]
    held = held and all(each["status"] != "failed" for each in report["scenarios"])
    held = held and coverage is not None and bool(coverage["step_widths"])
    assert ("parity holds" in page.text.lower()) == held
    assert ("interrupted" in page.text.lower()) == (not report["complete"])


def test_the_reports_of_these_tests_have_the_keys_of_the_real_ones() -> None:
    def keys(of: type, *others: str, without: str = "") -> set[str]:
        return {field.name for field in dataclasses.fields(of)} - {without} | set(others)

    report = failing()
    assert report.keys() == keys(Report, "passed", "verdict")
    assert report["schema_version"] == SCHEMA_VERSION
    assert report["coverage"].keys() == keys(Coverage)
    assert report["coverage"]["experts"][0].keys() == keys(Experts)
    measured = report["scenarios"][0]
    assert measured.keys() == keys(ScenarioResult, "by_position")
    assert measured["checks"][0].keys() == keys(Check, "passed")
    assert measured["metrics"].keys() == keys(Metrics, without="by_position")
    assert measured["by_position"].keys() == keys(ByPosition)
    assert in_bf16(4)["metrics"]["kl_interval"].keys() == keys(Interval)
    assert report["rounding"][0].keys() == keys(RoundingError)
    assert report["rounding"][0]["relative"][0].keys() == keys(Spread)
    assert report["layers_error"][0].keys() == keys(OperatorError)
    assert report["fault"].keys() == keys(Fault)
    assert report["routing"][0].keys() == keys(RouterBand)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_report_becomes_markup(text: str) -> None:
    def shape(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes, _ in opened(report).elements]

    assert shape(hostile(failing(), text)) == shape(hostile(failing(), "plain"))
    assert seen(text) in opened(hostile(failing(), text)).text


@pytest.mark.parametrize(("name", "report"), extremes().items(), ids=list(extremes()))
def test_extremes_are_drawn(name: str, report: dict[str, Any]) -> None:
    assert str(report["target"]) in opened(report).text


def test_values_that_are_not_finite_are_said_in_words() -> None:
    page = opened(extremes()["some are not finite"])
    assert (
        "Not finite, at the top edge: accumulated at layer 2 (NaN), accumulated at layer 3 "
        "(-Infinity), local at layer 2 (Infinity)." in page.text
    )
    page = opened(extremes()["none is finite"])
    assert "Largest NaN, at 0" in page.text
    assert "3 are not finite" in page.text  # of the divergences


def test_every_position_is_drawn() -> None:
    page = opened(passing(scenarios=[scenario("long", 2000)]))
    (dots,) = (each["d"] for each in page.all("path") if each.get("class") == "dots whole")
    assert str(dots).count("M") == 2000


def test_a_dense_report_that_passes() -> None:
    page = opened(passing())
    assert "Routing" not in page.text and "Where the fault starts" not in page.text
    assert "Replay" not in page.text and page.all("pre") == []
    assert ["NaN and infinite logits", "0", "== 0", "passed", ""] in page.rows
    assert ["rel-L2", "5e-07", "<= 5e-06", "passed", ""] in page.rows
    assert ["model-00002-of-00002.safetensors", "17aa" * 16] in page.rows
    assert {"scope": "row", "class": "mono"} in page.all("th")


def test_a_report_that_fails_says_what_and_where_first() -> None:
    page = opened(failing())
    assert "Parity does not hold" in page.text and "parity holds" not in page.text.lower()
    banner = page.text[: page.text.index("What was judged")]
    assert "prefill failed: rel-L2 0.31, must be <= 5e-06 (worst at row 0 position 12)" in banner
    assert "greedy failed: the target raised RuntimeError: CUDA error\nout of memory" in banner
    assert failing()["fault"]["text"] in banner
    assert ["experts", "0.33", "0.31", "2.2e-07", "starts here"] in page.rows
    assert ["0.01 to 0.1", "28,214", "28,213", "1"] in page.rows
    assert ["0.1 or more", "86", "86", "0"] in page.rows
    assert failing()["script"] in page.text and len(page.all("pre")) == 1
    order = ["What was judged", "Scenarios", "Where the fault starts", "Replay"]
    order += ["Half precision, layer by layer", "Plots", "Routing", "Weights", "Environment"]
    places = [page.text.index(f"\n  {title}\n") for title in [*order, "Other hashes"]]
    assert places == sorted(places)


def test_a_failure_without_a_place_says_why() -> None:
    page = opened(failing(fault=None, unexplained="nothing can be looked into in an engine"))
    assert "Not found: nothing can be looked into in an engine." in page.text
    assert "no layer or operator was singled out" in opened(failing(fault=None)).text


def test_scenarios_stand_in_sections() -> None:
    page = opened(passing())
    headings = (
        ("Identity", "weights", "graph", "files", "constants"),
        ("Structure and pieces", "parsed network", "rope tables", "embedding"),
        ("Ways of running", "prefill", "last logits", "decode", "batches", "greedy"),
        ("Half precision", "rounding of layers", "rounding of operators", "in bf16"),
    )
    text = page.text[page.text.index("\n  Scenarios\n") :]
    places = []
    for title, *names in headings:
        places += [text.index(f"\n  {title} "), *(text.index(f" {name} passed") for name in names)]
    assert places == sorted(places)
    assert "Structure and pieces 4 passed" in text  # the distance of layer 3 is there too


def test_the_verdict_never_stands_without_what_was_judged() -> None:
    report = passing()
    page = opened(report)
    banner = page.text[page.text.index("Parity holds") : page.text.index("What was judged")]
    assert f"Judged: {report['verdict'].partition('judged: ')[2]}." in banner
    assert (
        page.text.lower().count("parity holds") == 1
    )  # not in the title, where it would stand alone
    for coverage in (None, extremes()["nothing covered"]["coverage"]):
        page = opened(passing(coverage=coverage))
        assert "Parity is not shown" in page.text and "parity holds" not in page.text.lower()


def test_intervals_stand_below_their_numbers() -> None:
    (row,) = [row for row in opened(passing()).rows if row[0] == "times own error"]
    assert row[-1] == "0.9080.806 to 1.02 (99.9%)"
    (row,) = [row for row in opened(passing()).rows if row[0] == "same top-1, clear"]
    assert row[-1] == "10.976675 to 1 (99.9%)"


def test_an_interrupted_report_gives_no_verdict() -> None:
    for passed in (True, False):
        page = opened(interrupted(passed=passed))
        assert "Interrupted: no verdict" in page.text
        assert not re.search("parity (holds|does not hold)", page.text, re.IGNORECASE)
        assert "Judged: steps of 64 tokens." in page.text


def test_a_verdict_on_less_than_everything_says_so() -> None:
    page = opened(passing(layers_judged=4, loosened=["rel-L2 at most 0.05 instead of 1e-05"]))
    banner = page.text[: page.text.index("What was judged")]
    assert "Parity holds in the first 4 of 24 layers, by loosened bounds" in banner
    assert "rel-L2 at most 0.05 instead of 1e-05" in banner


def test_a_report_in_which_nothing_was_compared_shows_nothing() -> None:
    page = opened(passing(passed=False, scenarios=[not_run("decode", "why")]))
    assert "Parity is not shown" in page.text
