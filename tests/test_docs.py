"""Every command and every Python example of the documentation runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def examples(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


def test_there_is_something_to_run():
    kinds = {kind for page in PAGES for kind, _ in examples(page)}
    assert kinds == {"console", "python"}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if examples(p)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for kind, text in examples(page):
        if kind == "python":
            run([sys.executable, "-c", text], tmp_path)
            continue
        for line in text.splitlines():
            if line.startswith("$ qwenport "):
                command = shlex.split(line.removeprefix("$ qwenport "))
                run([sys.executable, "-m", "qwenport", *command], tmp_path)
            elif line.startswith("$ "):
                assert line.startswith(("$ make ", "$ git ", "$ pip ", "$ cd ")), line


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
