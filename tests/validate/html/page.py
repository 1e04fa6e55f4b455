"""A page taken apart: well formed, harmless, accessible and drawn inside its plots, or an error."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from typing import Any

from qwenport.validate.html import render

VOID = {"meta"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TAGS = set(
    "html head meta title style body main header section div p h1 h2 h3 h4 span strong code a ul li dl dt dd "
    "table thead tbody tr th td figure figcaption details summary svg text line path rect pre".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv content name class id href role tabindex scope rowspan aria-label aria-labelledby "
    "aria-describedby aria-hidden width height viewbox preserveaspectratio overflow x y x1 x2 y1 y2 dy d "
    "text-anchor colspan open".split()
)


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
