"""Takes the place of tests/cpp/builds.py on the GPU machine: what prepare.py compiled, where the tests look for it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class BuildError(Exception):
    """Something was not compiled beforehand."""


def built(setting: str) -> Path:
    """The folder of a build that prepare.py brought along."""
    folder = ROOT / "build" / "cpp" / setting
    if not folder.is_dir():
        raise BuildError(f"{setting} was not compiled beforehand")
    return folder
