"""The oldest CMake that our projects ask for configures them; all other tests use the newest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from .builds import OLDEST_CMAKE, ROOT, installed, oldest_cmake, run, tensorrt_headers, tool

PROJECTS = sorted(
    path.parent.relative_to(ROOT).as_posix()
    for folder in ("engines", "examples", "plugins", "tests")
    for path in (ROOT / folder).rglob("CMakeLists.txt")
)
MINIMUM = OLDEST_CMAKE.rpartition(".")[0]


def test_one_minimum_is_asked_for() -> None:
    assert len(PROJECTS) == 8
    asked = {re.search(r"cmake_minimum_required\(VERSION ([\d.]+)\)", text)[1] for text in texts()}
    assert asked == {MINIMUM}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"cmake>={MINIMUM}" in extras["optional-dependencies"]["cpp"]


def texts() -> list[str]:
    return [(ROOT / project / "CMakeLists.txt").read_text() for project in PROJECTS]


@pytest.mark.parametrize("project", PROJECTS)
def test_the_oldest_cmake_configures(project: str, tmp_path: Path) -> None:
    settings = [f"-DTENSORRT_INCLUDE_DIR={tensorrt_headers()}"]
    if project.startswith("examples"):
        settings = [f"-DCMAKE_PREFIX_PATH={installed()}"]
    if project == "plugins":
        settings.append("-DCMAKE_CUDA_ARCHITECTURES=80;90;90-real;90a-virtual")
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(oldest_cmake(), "-S", ROOT / project, "-B", tmp_path, *ninja, *settings)
    if project == "plugins":  # Hopper's instructions are in 90a, however it is written
        found = re.findall(r"arch=(\w+),code=(\S+)", (tmp_path / "build.ninja").read_text())
        codes = ["[compute_80,sm_80]", "[compute_90a,sm_90a]", "[sm_90a]", "[compute_90a]"]
        assert list(dict.fromkeys(code.strip('"') for _, code in found)) == codes
