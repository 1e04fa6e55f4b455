"""The HTML report: every page well formed and harmless, whatever is in the report; in a browser, nothing overflows."""

from __future__ import annotations

import html
import itertools
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.validate.html import render

VOID = {"meta"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TAGS = set(
    "html head meta title style body main header section div p h1 h2 h3 h4 span strong code a ul li dl dt dd "
    "table thead tbody tr th td figure figcaption details summary svg text line path rect".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv content name class id href role tabindex scope rowspan aria-label aria-labelledby "
    "aria-describedby aria-hidden width height viewbox preserveaspectratio overflow x y x1 x2 y1 y2 dy d "
    "text-anchor".split()
)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://example.com/x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style><style>@import url(http://example.com)</style>",
    "</title></svg>--><!-- ]]>",
    "{{ 7 * 7 }}{% raw %}",
    "&amp;&lt;&#60;",
    "javascript:alert(1)",
    "line\nline\r\n\ttab",
    "\u202egnp.exe\x00\x1b[31m\udc80\u2028",
    "",
    "x" * 300,
]


class Page(HTMLParser):
    """A page as a list of elements; to be unbalanced is an error."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []  # , ancestors
        self.text = ""
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag == "tr":
            self.rows.append([])
        elif tag in {"th", "td"}:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> closes nothing outside of SVG"
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        """The attributes of each element of these kinds."""
        return [attributes for tag, attributes, _ in self.elements if tag in tags]


def opened(report: dict[str, Any]) -> Page:
    """The report's page, after a look for anything that no page may have."""
    source = render(report)
    source.encode()  # has no lone surrogate
    page = Page(source)
    tags = [tag for tag, _, _ in page.elements]
    assert set(tags) <= TAGS
    assert {name for _, attributes, _ in page.elements for name in attributes} <= ATTRIBUTES
    assert_nothing_is_fetched(page, source)
    assert_accessible(page)
    assert_drawn(page)
    return page


def assert_nothing_is_fetched(page: Page, source: str) -> None:
    """TAGS and ATTRIBUTES have nothing that loads but href, and CSS."""
    assert all(str(attributes["href"]).startswith("#") for attributes in page.all("a"))
    assert all("href" not in each for tag, each, _ in page.elements if tag != "a")
    assert page.all("meta")[1] == {"http-equiv": "Content-Security-Policy", "content": POLICY}
    assert [tag for tag, _, _ in page.elements].count("style") == 1
    style = source[source.index("<style>") : source.index("</style>")].lower()
    assert not re.search(r"url\(|@import|image-set|src\(|@font-face|//|\\", style)


def assert_accessible(page: Page) -> None:
    """Headings in order, headers with a scope, pictures with a name and words, ids that exist."""
    levels = [int(tag[1]) for tag, _, _ in page.elements if tag in {"h1", "h2", "h3", "h4"}]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(each.get("scope") for each in page.all("th"))
    ids = [each["id"] for _, each, _ in page.elements if "id" in each]
    assert len(set(ids)) == len(ids)
    for tag, attributes, ancestors in page.elements:
        if tag == "svg" and "svg" not in ancestors and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img"
            assert attributes["aria-labelledby"] in ids and attributes["aria-describedby"] in ids
        if str(attributes.get("href")).startswith("#"):
            assert str(attributes["href"])[1:] in ids
        if "scroll" in str(attributes.get("class")).split():
            assert attributes["tabindex"] == "0" and attributes["aria-label"]


def assert_drawn(page: Page) -> None:
    """Every coordinate of a plot is a number, and inside of it."""
    height = 0.0
    for tag, attributes, ancestors in page.elements:
        if tag == "svg" and attributes.get("class") == "chart":
            height = float(str(attributes["height"]))
        if "svg" not in ancestors:
            continue
        for name in {"x", "y", "x1", "x2", "y1", "y2", "width", "height"} & set(attributes):
            text = str(attributes[name])
            number = float(text.removesuffix("%"))
            if text.endswith("%"):
                assert 0 <= number <= 100
            elif tag != "text" and "mark" not in str(attributes.get("class")).split():
                assert 0 <= number <= height
        if tag == "path":
            numbers = re.findall(r"[a-z]*[-+.0-9]*", str(attributes["d"]).lower())
            assert not re.search("nan|inf", "".join(numbers))
            if str(attributes.get("class")).startswith(("line", "dots")) and height:
                places = re.findall(r"[ML]([-.0-9]+) ([-.0-9]+)", str(attributes["d"]))
                assert all(0 <= float(x) <= 100 and 0 <= float(y) <= height for x, y in places)


def seen(text: str) -> str:
    """Text as the page shows it."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def written(value: float | str) -> str:
    """A bound's value as the page shows it."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def metrics(positions: int, **changes: Any) -> dict[str, Any]:
    return {
        "positions": positions,
        "vocab": 151936,
        "nonfinite": 0,
        "max_abs": 2.1e-5,
        "mean_abs": 1.7e-6,
        "rel_l2": 5.8e-7,
        "worst_rel_l2": 3.1e-6,
        "worst_position": min(17, positions - 1),
        "cosine_p5": 0.9999999999,
        "kl_mean": 3.4e-12,
        "kl_p99": 4.1e-11,
        "top1": 1.0,
        "top1_clear": 1.0,
        "near_ties": 1,
        "near_tie_margin": 1e-3,
        "smallest_margin": 4.2e-4,
        "first_disagreement": None,
        "first_disagreement_margin": None,
        "top5_overlap": 0.998,
        "own_ratio": None,
        **changes,
    }


def scenario(
    name: str, positions: int, *, scale: float = 5e-7, failed: bool = False, seed: int = 0
) -> dict[str, Any]:
    """A scenario with an error around `scale` at each position; the bound that it fails is the one on rel-L2."""
    rng = random.Random(f"{name} {seed}")
    rel_l2 = [scale * rng.lognormvariate(0, 0.4) for _ in range(positions)]
    kl = [0.0 if rng.random() < 0.05 else (r * rng.lognormvariate(0, 1)) ** 2 * 20 for r in rel_l2]
    checks = [
        {"metric": "NaN and infinite logits", "value": 0, "relation": "==", "bound": 0},
        {"metric": "rel-L2", "value": scale, "relation": "<=", "bound": 5e-6},
        {"metric": "same top-1 outside near-ties", "value": 1.0, "relation": ">=", "bound": 1.0},
    ]
    for check in checks:
        check |= {"where": None, "passed": True}
    if failed:
        checks[1] |= {"passed": False, "where": "worst at row 0 position 12"}
    return {
        "name": name,
        "summary": f"What {name} would be described as, in a few words",
        "status": "failed" if failed else "passed",
        "reason": None,
        "seconds": 1.25,
        "checks": checks,
        "metrics": metrics(positions, rel_l2=scale, worst_rel_l2=max(rel_l2)),
        "by_position": {"rel_l2": rel_l2, "kl": kl},
    }


def not_run(name: str, reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "summary": "Rows of different lengths, chunked, decoded, some idle",
        "status": "not run",
        "reason": reason,
        "seconds": 0.0,
        "checks": [],
        "metrics": None,
        "by_position": None,
    }


def layer_errors(count: int, *, bad: int | None = None) -> list[dict[str, Any]]:
    rng = random.Random(count)
    rows = [{"name": "embedding", "accumulated": 0.0, "local": 0.0, "own": 0.0}]
    for layer in range(count):
        wrong = 0.31 if layer == bad else 0.0
        spread = 0.31 / math.sqrt(layer - bad + 1) if bad is not None and layer >= bad else 0.0
        rows.append(
            {
                "name": f"layer {layer}",
                "accumulated": 1.2e-7 * math.sqrt(layer + 1) + spread,
                "local": 1.1e-7 * rng.lognormvariate(0, 0.1) + wrong,
                "own": 1.0e-7 * rng.lognormvariate(0, 0.1),
            }
        )
    return rows


def passing(**changes: Any) -> dict[str, Any]:
    """A dense model that passes."""
    return {
        "schema_version": 2,
        "passed": True,
        "complete": True,
        "target": "tiny.package",
        "judged_as": "package",
        "target_dtype": "bf16",
        "compute_dtype": "fp32",
        "reference": "examples/tiny-qwen2.5",
        "reference_mode": "whole",
        "reference_weights": "fp32",
        "layers_judged": 24,
        "layers": 24,
        "prompts": "the package's tokenizer on a text about the sea, 512 tokens",
        "own_rounding": 5.1e-7,
        "cache_slots": 512,
        "max_seq_len": 32768,
        "loosened": [],
        "scenarios": [
            {
                **not_run("rope tables", ""),
                "summary": "Every row of the package's cos and sin tables",
                "status": "passed",
                "reason": None,
                "checks": [
                    {
                        "metric": "error of rope.cos, in units of rounding",
                        "value": 0.41,
                        "relation": "<=",
                        "bound": 1.0,
                        "where": "worst at position 31999",
                        "passed": True,
                    }
                ],
            },
            scenario("prefill", 64),
            scenario("full cache", 64),
            scenario("decode", 45),
            scenario("chunked prefill", 100),
            scenario("ragged batch", 144),
            scenario("greedy", 32),
        ],
        "layers_error": layer_errors(24),
        "fault": None,
        "routing": [],
        "replayed": 0,
        "environment": {
            "date": "2026-01-31T12:00:00+00:00",
            "qwenport": "0.1.0",
            "python": "3.11.2",
            "platform": "Linux x86_64",
            "torch": "2.9.1",
            "transformers": "5.0.0",
            "onnxruntime": "1.24.1",
        },
        "hashes": {
            "target manifest": "3f9a" * 16,
            "target model.onnx": "07c1" * 16,
            "reference config.json": "be52" * 16,
        },
        **changes,
    }


def failing(**changes: Any) -> dict[str, Any]:
    """A mixture of experts of which one layer is wrong."""
    operators = [
        ("input norm", 1.3e-6, 8.1e-8, 7.9e-8),
        ("attention", 1.4e-6, 1.9e-7, 1.7e-7),
        ("post-attention norm", 1.4e-6, 8.2e-8, 8.0e-8),
        ("router logits", 1.5e-6, 1.1e-7, 1.2e-7),
        ("router weights", 1.6e-6, 9.0e-8, 9.1e-8),
        ("experts", 0.33, 0.31, 2.2e-7),
        ("shared expert", 1.5e-6, 1.6e-7, 1.5e-7),
    ]
    routing = [
        (0.0, 1e-6, 3, 1),
        (1e-6, 1e-5, 11, 8),
        (1e-5, 1e-4, 64, 62),
        (1e-4, 1e-3, 518, 516),
        (1e-3, 1e-2, 5104, 5104),
        (1e-2, 1e-1, 28214, 28213),
        (1e-1, "Infinity", 86, 86),
    ]
    broken = scenario("decode", 45, scale=0.42, failed=True)
    broken["by_position"]["rel_l2"][9:12] = ["NaN", "Infinity", "NaN"]
    broken["metrics"] |= {"rel_l2": "NaN", "nonfinite": 151936 * 3, "kl_mean": "NaN"}
    broken["checks"][0] |= {"value": 455808, "passed": False, "where": "first at position 9"}
    broken["checks"][1] |= {"value": "NaN"}
    report = passing(
        passed=False,
        target="exports/qwen3-moe.package",
        judged_as="tensorrt-network",
        compute_dtype="bf16",
        reference="checkpoints/a-mixture-of-experts",
        reference_mode="streamed",
        layers=48,
        layers_judged=48,
        scenarios=[
            scenario("prefill", 64, scale=0.31, failed=True),
            scenario("full cache", 64, scale=0.28, failed=True),
            broken,
            not_run("ragged batch", "the target was made for one row"),
            {
                **not_run("greedy", "the target raised RuntimeError: CUDA error\nout of memory"),
                "status": "failed",
            },
        ],
        layers_error=layer_errors(48, bad=17),
        fault={
            "scenario": "prefill",
            "layer": 17,
            "operator": "experts",
            "input_error": 1.6e-6,
            "output_error": 0.33,
            "local_error": 0.31,
            "own_error": 2.2e-7,
            "text": "The fault starts in layer 17, at its experts: an error of 1.6e-06 goes in, 0.33 comes out.",
            "operators": [
                {"name": name, "accumulated": accumulated, "local": local, "own": own}
                for name, accumulated, local, own in operators
            ],
        },
        routing=[
            {"least": least, "most": most, "choices": choices, "agreeing": agreeing}
            for least, most, choices, agreeing in routing
        ],
        replayed=14,
    )
    return report | changes


def interrupted(**changes: Any) -> dict[str, Any]:
    """Stopped in the second scenario, of a quick look by loosened bounds."""
    return passing(
        complete=False,
        layers_judged=4,
        loosened=["rel-L2 at most 0.05 instead of 1e-05", "same top-1 at least 0.9 instead of 1"],
        scenarios=[scenario("prefill", 64), not_run("decode", "interrupted")],
        layers_error=layer_errors(4)[:3],
        **changes,
    )


def extremes() -> dict[str, dict[str, Any]]:
    """Reports that a plot could stumble over."""
    bare = passing(scenarios=[], layers_error=[], environment={}, hashes={})
    one = [{"name": "embedding", "accumulated": 1e-7, "local": 1e-7, "own": 1e-7}]
    zeros = [{"name": f"layer {i}", "accumulated": 0.0, "local": 0, "own": 0.0} for i in range(3)]
    broken = layer_errors(6)
    broken[3] |= {"accumulated": "NaN", "local": "Infinity"}
    broken[4] |= {"accumulated": "-Infinity"}
    never = [dict.fromkeys(row, "NaN") | {"name": row["name"]} for row in layer_errors(3)]
    far = [
        {"name": "embedding", "accumulated": 5e-324, "local": 1.7e308, "own": 1.0},
        {"name": "layer 0", "accumulated": 1.0, "local": 1e-300, "own": 10.0},
    ]

    def at(rel_l2: list[Any], kl: list[Any]) -> dict[str, Any]:
        return scenario("prefill", 8) | {"by_position": {"rel_l2": rel_l2, "kl": kl}}

    bands = [
        {"least": 0.0, "most": "Infinity", "choices": 0, "agreeing": 0},
        {"least": 0.0, "most": 1e-6, "choices": 10**9, "agreeing": 10**9 - 1},
    ]
    return {
        "nothing": bare,
        "one layer": passing(layers_error=one),
        "only zeros": passing(layers_error=zeros, scenarios=[at([0.0, 0.0], [0.0, 0.0])]),
        "some are not finite": passing(layers_error=broken),
        "none is finite": passing(
            layers_error=never, scenarios=[at(["NaN"] * 3, ["Infinity"] * 3)]
        ),
        "the range of a double": passing(
            layers_error=far, scenarios=[at([5e-324, 1.7e308], [5e-324, 1.7e308])]
        ),
        "one position": passing(scenarios=[at([1e-6], [1e-12])]),
        "no position": passing(scenarios=[at([], [])]),
        "equal values": passing(scenarios=[at([1e-6] * 5, [1e-12] * 5)]),
        "80 layers, 2000 positions": passing(
            layers_error=layer_errors(80), scenarios=[scenario(n, 2000) for n in ("a", "b", "c")]
        ),
        "odd bands": passing(routing=bands, replayed=1),
        "a fault nowhere": failing(
            fault=failing()["fault"] | {"layer": None, "operators": []}, layers_error=[]
        ),
        "a fault that was not found": failing(fault=None),
    }


def hostile(report: Any, text: str) -> Any:
    """The report with every string but those with a meaning replaced."""
    if isinstance(report, dict):
        fixed = {"status", "relation", "judged_as", "reference_mode", "most"}
        return {
            key: value if key in fixed else hostile(value, text) for key, value in report.items()
        }
    if isinstance(report, list):
        return [hostile(item, text) for item in report]
    return text if isinstance(report, str) and report not in {"NaN", "Infinity"} else report


texts = st.text(max_size=20) | st.sampled_from(HOSTILE)
counts = st.integers(0, 10**9)


def as_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


numbers = (
    st.floats() | st.sampled_from([0.0, -0.0, 1e-6, math.nan, math.inf]) | st.integers(-5, 10**9)
).map(as_json)


def lists(items: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(items, max_size=4)


def rows(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    return lists(st.fixed_dictionaries(fields))


texts_or_none = texts | st.none()
errors = {"accumulated": numbers, "local": numbers, "own": numbers}
names = texts | st.sampled_from(["embedding", *(f"layer {i}" for i in range(4))])
any_metrics = st.fixed_dictionaries(
    {
        key: counts
        if isinstance(value, int)
        else numbers
        if value is not None
        else st.none() | numbers
        for key, value in metrics(8).items()
    }
)
any_report = st.fixed_dictionaries(
    {
        key: texts
        if isinstance(value, str)
        else st.booleans()
        if isinstance(value, bool)
        else counts
        for key, value in passing().items()
        if isinstance(value, str | bool | int)
    }
    | {
        "judged_as": st.sampled_from(["package", "tensorrt-network", "engine"]),
        "reference_mode": st.sampled_from(["whole", "streamed"]),
        "own_rounding": numbers,
        "loosened": lists(texts),
        "scenarios": rows(
            name=texts,
            summary=texts,
            status=st.sampled_from(["passed", "failed", "not run"]),
            reason=texts_or_none,
            seconds=numbers,
            checks=rows(
                metric=texts | st.just("rel-L2"),
                value=numbers,
                relation=st.sampled_from(["<=", ">=", "=="]),
                bound=numbers,
                where=texts_or_none,
                passed=st.booleans(),
            ),
            metrics=st.none() | any_metrics,
            by_position=st.none()
            | st.fixed_dictionaries({"rel_l2": lists(numbers), "kl": lists(numbers)}),
        ),
        "layers_error": rows(name=names, **errors),
        "fault": st.none()
        | st.fixed_dictionaries(
            {
                "scenario": texts,
                "layer": st.none() | st.integers(0, 3),
                "operator": texts,
                **dict.fromkeys(
                    ("input_error", "output_error", "local_error", "own_error"), numbers
                ),
                "text": texts,
                "operators": rows(name=texts, **errors | {"accumulated": st.none() | numbers}),
            }
        ),
        "routing": rows(least=numbers, most=numbers, choices=counts, agreeing=counts),
        "environment": st.dictionaries(texts | st.just("date"), texts, max_size=3),
        "hashes": st.dictionaries(texts, texts, max_size=3),
    }
)


@given(any_report)
def test_any_report_is_a_well_formed_page_that_says_all_of_it(report: dict[str, Any]) -> None:
    page = opened(report)
    for each in report["scenarios"]:
        assert seen(each["name"]) in page.text
        assert seen(each["reason"] or "") in page.text
        assert each["status"] in page.text
        for check in each["checks"]:
            assert written(check["value"]) in page.text
            assert f"{check['relation']} {written(check['bound'])}" in page.text
    for line in report["loosened"]:
        assert seen(line) in page.text
    for key, value in (*report["environment"].items(), *report["hashes"].items()):
        assert seen(key) in page.text and seen(value) in page.text
    held = report["complete"] and report["passed"]
    held = held and all(each["status"] != "failed" for each in report["scenarios"])
    assert ("parity holds" in page.text.lower()) == held
    assert ("interrupted" in page.text.lower()) == (not report["complete"])


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_report_becomes_markup(text: str) -> None:
    def shape(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes, _ in opened(report).elements]

    assert shape(hostile(failing(), text)) == shape(hostile(failing(), "plain"))
    assert seen(text) in opened(hostile(failing(), text)).text


@pytest.mark.parametrize(("name", "report"), extremes().items(), ids=list(extremes()))
def test_extremes_are_drawn(name: str, report: dict[str, Any]) -> None:
    opened(report)


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
    headings = [tag for tag, _, _ in page.elements].count("h2")
    assert "Parity holds" in page.text and headings == 5
    assert "Routing" not in page.text and "Where the fault starts" not in page.text
    assert ["prefill", "NaN and infinite logits", "0", "== 0", "passed", ""] in page.rows
    assert ["rel-L2", "5e-07", "<= 5e-06", "passed", ""] in page.rows


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
    order = ["What was judged", "Scenarios", "Where the fault starts", "Plots", "Routing"]
    order += ["Environment", "Hashes"]
    places = [page.text.index(f"\n  {title}\n") for title in order]
    assert places == sorted(places)


def test_an_interrupted_report_gives_no_verdict() -> None:
    for passed in (True, False):
        page = opened(interrupted(passed=passed))
        assert "Interrupted: no verdict" in page.text
        assert not re.search("parity (holds|does not hold)", page.text, re.IGNORECASE)


def test_a_verdict_on_less_than_everything_says_so() -> None:
    page = opened(passing(layers_judged=4, loosened=["rel-L2 at most 0.05 instead of 1e-05"]))
    banner = page.text[: page.text.index("What was judged")]
    assert "Parity holds in the first 4 of 24 layers, by loosened bounds" in banner
    assert "rel-L2 at most 0.05 instead of 1e-05" in banner


def test_a_report_in_which_nothing_was_compared_shows_nothing() -> None:
    page = opened(passing(passed=False, scenarios=[not_run("decode", "why")]))
    assert "Parity is not shown" in page.text


# In a browser: what only layout and a network stack can tell.


@pytest.fixture(scope="session")
def browser() -> str:
    """A Chromium, where there is one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on PATH")


def dumped(browser: str, page: Path, *options: str) -> str:
    """The page's DOM when it has loaded. Names of hosts lead nowhere, the browser's own requests included."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,1000", *options]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


MEASURE = """
addEventListener("load", () => {
  document.getElementById("result").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(f => {
    const d = f.contentDocument, w = f.clientWidth;
    const wide = [...d.querySelectorAll("main *")].filter(
      e => e.getBoundingClientRect().right > w + 0.5 && !e.closest(".scroll"));
    const root = d.documentElement;
    return [f.title, root.clientWidth, root.scrollWidth, wide.map(e => e.outerHTML.slice(0, 80))];
  }));
});
"""


def measured(browser: str, folder: Path, pages: dict[str, str]) -> dict[str, list[Any]]:
    """Each page as it is, in a frame of 1280 and one of 390 pixels: its width, what it needs, what sticks out."""
    frames = "".join(
        f'<iframe title="{html.escape(name)} at {width}" style="width:{width}px;height:900px;border:0"'
        f' srcdoc="{html.escape(source)}"></iframe>'
        for name, source in pages.items()
        for width in (1280, 390)
    )
    wrapper = folder / "frames.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><script>{MEASURE}</script>{frames}<pre id="result"></pre>',
        encoding="utf-8",
    )
    result = re.search(r'<pre id="result">(.+?)</pre>', dumped(browser, wrapper), re.DOTALL)
    assert result
    return {each[0]: each[1:] for each in json.loads(html.unescape(result[1]))}


def test_in_a_browser_nothing_overflows(browser: str, tmp_path: Path) -> None:
    reports = {"passing": passing(), "failing": failing(), "interrupted": interrupted()}
    reports |= {"long words": hostile(failing(), "x" * 300), **extremes()}
    pages = {name: render(report) for name, report in reports.items()}
    wide = '<div style="width: 2000px">wide</div></main>'
    pages["control"] = pages["passing"].replace("</main>", wide)
    found = measured(browser, tmp_path, pages)
    for width in (1280, 390):
        (seen_as, needed, sticking_out) = found.pop(f"control at {width}")
        assert seen_as == width and needed > 2000 and sticking_out
    assert len(found) == 2 * len(reports)
    for name, (width, needed, sticking_out) in found.items():
        assert (name, needed, sticking_out) == (name, width, [])


def requests_of(browser: str, folder: Path, name: str, source: str) -> list[str]:
    """URLs that the page asked the network for, by the browser's own log."""
    page, log = folder / f"{name}.html", folder / f"{name}.json"
    page.write_text(source, encoding="utf-8")
    dumped(browser, page, f"--log-net-log={log}")
    events = [each.get("params", {}) for each in json.loads(log.read_text())["events"]]
    # What the browser asks for itself has no origin.
    return sorted(
        {
            each["url"]
            for each in events
            if each.get("initiator", "not an origin") != "not an origin"
            and not each["url"].startswith(("file:", "data:"))
        }
    )


def test_in_a_browser_nothing_is_requested(browser: str, tmp_path: Path) -> None:
    source = render(hostile(failing(), HOSTILE[1]))
    picture = "http://127.0.0.1:9/picture.png"
    tempted = source.replace("<main>", f'<main><img src="{picture}">')
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    assert requests_of(browser, tmp_path, "page", source) == []
    assert requests_of(browser, tmp_path, "tempted", tempted) == []  # the policy forbids it
    unguarded = tempted.replace(policy, "")
    assert requests_of(browser, tmp_path, "unguarded", unguarded) == [picture]  # and would be seen
