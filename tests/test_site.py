"""The site: it builds, and a dead link or a public name that is not documented fails the build."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "docs",
    "qwenport",
    "exporter",
    "plugins",
    "engines",
    "validate",
    "examples",
    "benchmarks",
    "tests",  # pages link to some
)
FILES = ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the site is made of, in which a test may break something."""
    left_out = shutil.ignore_patterns("__pycache__", "work", "*.safetensors")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=left_out)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(copy: Path) -> subprocess.CompletedProcess[str]:
    """Run what `make docs` runs."""
    return subprocess.run(
        [sys.executable, "-m", *documented_command()],
        cwd=copy,
        env={**os.environ, "COLUMNS": "80", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def documented_command() -> list[str]:
    """The command of `make docs`, without the path of the virtual environment."""
    line = re.search(
        r"^docs:.*\n\t.*\$\(VENV\)/bin/(mkdocs .*)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert line
    return line[1].split()


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_site_builds_and_shows_the_help_that_the_commands_print(copy: Path) -> None:
    done = build(copy)
    assert done.returncode == 0, done.stderr
    page = html.unescape((copy / "build/site/reference/cli.html").read_text())
    text = re.sub(r"<[^<>]*?/?(?:span|a)\b[^>]*>", "", page)
    for command in ([], ["export"], ["plugins", "build"], ["cpp", "install"]):
        printed = subprocess.run(
            [sys.executable, "-m", "qwenport", *command, "--help"],
            env={**os.environ, "COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=True,
        )
        for line in printed.stdout.strip().splitlines():
            assert line in text


BROKEN = {
    "a dead link": ("docs/engines.md", "(plugins.md)", "(no_such_page.md)", "no_such_page.md"),
    "a dead link on the home page": ("README.md", "(docs/moe.md)", "(docs/no.md)", "no.md"),
    "a dead anchor": ("docs/moe.md", "(validate.md#bounds)", "(validate.md#bound)", "#bound"),
    "a function": (
        "engines/open.py",
        '    """Open a session on a package or an engine directory.',
        '    _ = """Open a session on a package or an engine directory.',
        "qwenport.engines.open_session",
    ),
    "a method": (
        "engines/generate_options.py",
        '        """End the generation before its next step."""',
        "        _ = None",
        "qwenport.engines.Cancellation.request",
    ),
    "a property": (
        "exporter/package.py",
        '        """The ONNX file."""',
        "        _ = None",
        "qwenport.exporter.Package.model",
    ),
    "a field": (
        "engines/generate_options.py",
        "        append: continue after",
        "        Continue after",
        "qwenport.engines.GenerateOptions.append",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_build_fails_for(what: str, copy: Path) -> None:
    file, old, new, named = BROKEN[what]
    change(copy / file, old, new)
    done = build(copy)
    assert done.returncode != 0
    assert named in done.stderr
