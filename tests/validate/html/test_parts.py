"""The tables of what was judged and of half precision, and the plot of its ratios."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from qwenport.validate import identity, rows
from qwenport.validate.html import coverage as table
from qwenport.validate.html.page import SECTIONS
from qwenport.validate.html.rounding import BOUNDS, plots, worst
from qwenport.validate.localisation import WHOLE_LAYER
from qwenport.validate.rounding import RoundingError, Spread
from qwenport.validate.scenarios import SCENARIOS

from .page import opened
from .pieces import coverage, rounding
from .reports import extremes, passing

ROOT = Path(__file__).resolve().parents[3]


def test_the_wheel_ships_every_template() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    shipped = setup["package-data"]["qwenport.validate.html"]
    folder = ROOT / "validate" / "html"
    others = [path for path in folder.iterdir() if path.suffix not in {".py", ""}]
    assert others
    assert all(any(path.match(pattern) for pattern in shipped) for path in others)


def judged(**changes: Any) -> dict[str, tuple[str, str, str | None]]:
    return {
        row.name: (row.judged, row.allowed, row.every) for row in table.rows_of(coverage(**changes))
    }


def test_what_was_judged_stands_beside_what_the_target_allows() -> None:
    found = judged()
    every = "1, 2, 4 to 7, 9, 12 to 18, 26, 33, 64, 65, 100, 221, 511, 512"
    assert found["Step widths"][1:] == ("1 to 512", every)
    assert found["Step widths"][0].endswith(", … (22 widths)")
    assert found["Batches"] == ("1 to 3, 8", "1 to 8", None)
    assert found["Rows"] == ("0 to 7", "0 to 7", None)
    assert found["Spans"] == ("64, 128, 512, 32,768 (4 in all)", "512 spans", None)
    assert found["Cache capacities"] == ("64, 192, 32,768", "512 sizes up to 32,768", None)
    assert found["Positions"] == (
        "0 to 511, 32,700 to 32,767 (580 in all)",
        "0 to 32,767",
        None,
    )
    assert found["Positions, token by token"][0] == "5 to 100, 32,760 to 32,767 (104 in all)"
    assert found["Attention distance, whole model"] == ("575", "32,767", None)
    assert found["Attention distance, layer 3 alone"] == ("32,766", "32,767", None)
    assert found["Token ids, whole model"] == ("1,225", "151,936", None)
    assert found["Half precision"][0] == "513"
    assert judged(rounding=0)["Half precision"][0] == "not judged"
    assert found["Budget and seed"][0] == "standard, 7"
    assert "Experts" not in found


def test_experts_without_tokens_are_named_by_layer() -> None:
    experts = [
        {"layer": 2, "experts": 64, "without_tokens": [3, 4, 5, 60]},
        {"layer": 3, "experts": 64, "without_tokens": []},
    ]
    assert judged(experts=experts)["Experts"][:2] == ("124", "128 in 2 layers")
    page = opened(passing(coverage=coverage(experts=experts)))
    assert ["layer 2", "3 to 5, 60"] in page.rows
    assert not any(row[:1] == ["layer 3"] and len(row) == 2 for row in page.rows)


def test_what_was_left_out_follows_at_once() -> None:
    page = opened(passing())
    after = page.text[page.text.index("Not judged") : page.text.index("Target and reference")]
    for sentence in coverage()["left_out"]:
        assert sentence in after
    assert "nothing that was left out" in opened(passing(coverage=coverage(left_out=[]))).text


def test_every_kind_of_row_has_its_section() -> None:
    by_title = {section.title: section for section in SECTIONS}
    exact = (identity.WEIGHTS, identity.GRAPH, identity.FILES, rows.CONSTANTS)
    assert all(by_title["Identity"].has(name) for name in exact)
    pieces = (rows.PARSED, rows.ROPE_TABLES, rows.EMBEDDING, rows.ROUTING, "distance of layer 17")
    assert all(by_title["Structure and pieces"].has(name) for name in pieces)
    assert all(
        by_title["Half precision"].has(name) for name in (rows.LAYERS, rows.OPERATORS, "in bf16")
    )
    assert not any(section.has(s.name) for section in SECTIONS for s in SCENARIOS)


def test_the_operators_furthest_off_come_first() -> None:
    errors = rounding(24, bad=3)
    found = worst(errors)
    assert (found[0].error["layer"], found[0].error["operator"]) == (3, "input_layernorm")
    assert found[0].kind == "systematic" and found[0].excess > 1 >= found[1].excess
    assert [place.excess for place in found] == sorted((p.excess for p in found), reverse=True)
    assert all(place.error["operator"] != WHOLE_LAYER for place in found)


def test_the_excess_is_the_one_that_the_verdict_uses() -> None:
    for error in rounding(3, bad=1):
        spreads = {kind: tuple(Spread(**each) for each in error[kind]) for kind in BOUNDS}
        judged_by = RoundingError(**(error | spreads))
        shown = [place for place in worst([error]) if place.error is error]
        assert all(place.excess == judged_by.excess for place in shown)


def test_nan_in_an_operator_is_worse_than_any_ratio() -> None:
    errors = rounding(4, bad=1)
    errors[9]["nonfinite"] = 7
    assert worst(errors)[0].error is errors[9]
    page = opened(passing(rounding=errors))
    assert any("NaN or infinity at 7 of 512 positions" in row for row in page.rows)


def test_ratios_are_drawn_by_layer_with_their_bound() -> None:
    relative, systematic = plots(rounding(24))
    for plot in (relative, systematic):
        assert plot.svg.count('class="bound"') == 1
        assert plot.svg.count('class="mark first"') == plot.svg.count('class="mark second"') == 25
        assert plot.svg.count("whisker") == 50
        assert ">end</text>" in plot.svg
    for plot, bound in ((relative, BOUNDS["relative"]), (systematic, BOUNDS["systematic"])):
        assert f"it may be {bound:g} at most" in plot.words
    assert plots(extremes()["operators only"]["rounding"]) == []


def test_a_bound_is_drawn_at_its_height() -> None:
    """A layer whose lower end is exactly on the bound ends where the dashed line is."""
    errors = rounding(1)
    for spread in errors[3]["relative"]:
        spread |= {"times_own": 4.0, "least": BOUNDS["relative"]}
    relative, _ = plots(errors)
    line = relative.svg[: relative.svg.index('class="bound"')].rpartition("<line")[2]
    bound = line.partition('y1="')[2].partition('"')[0]
    ends = relative.svg.split("<line")
    whiskers = [each for each in ends if "whisker" in each][:1]
    assert f'y2="{bound}"' in whiskers[0]
