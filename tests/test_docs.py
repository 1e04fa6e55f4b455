"""Every command and every Python example of the documentation runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qwenport.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LONG = ("validate.md", "moe.md")  # several validations
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def examples(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


def test_there_is_something_to_run():
    kinds = {kind for page in PAGES for kind, _ in examples(page)}
    assert kinds == {"console", "python"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.relative_to(ROOT).as_posix(),
            marks=[pytest.mark.slow] if page.name in LONG else [],
        )
        for page in PAGES
        if examples(page)
    ],
)
def test_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for kind, text in examples(page):
        if kind == "python":
            exec(compile(text, f"{page.name}, an example", "exec"), {})
            continue
        for line in text.splitlines():
            if line.startswith("$ qwenport "):
                code = main(shlex.split(line.removeprefix("$ qwenport ")))
                assert code == 0, f"{line}\n{capsys.readouterr().err}"
            elif line.startswith("$ "):
                assert line.startswith(("$ make ", "$ git ", "$ pip ", "$ cd ")), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
