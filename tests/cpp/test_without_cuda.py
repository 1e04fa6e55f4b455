"""The library as a machine without CUDA builds it: installed, found by CMake, and run by a program of its user's."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenport import engines, exporter
from qwenport.contract import ONNXRUNTIME
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession

from .builds import ROOT, built, configure, run, tool

PROMPT = [40, 41, 42]
NO_CUDA = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"
SETTINGS = {"shared": "onnxruntime", "static": "onnxruntime-static"}


@pytest.fixture(scope="module", params=SETTINGS)
def minimal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp/minimal, built against an installed library; its prefix is beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    run(tool("cmake"), "--install", built(SETTINGS[request.param]), "--prefix", folder / "usr")
    shutil.copytree(ROOT / "examples" / "cpp" / "minimal", folder / "source")
    prefix = f"-DCMAKE_PREFIX_PATH={folder / 'usr'}"
    run(*configure(folder / "source", folder / "build", prefix, NO_CUDA))
    run(tool("cmake"), "--build", folder / "build")
    return folder / "build" / "minimal"


@pytest.fixture(scope="module")
def engine(
    package_of: Callable[[str], exporter.Package], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("engine") / "engine"
    return engines.build(package_of("tiny-qwen2.5").path, path, target=ONNXRUNTIME).path


def environment(**variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    kept.pop("QWENPORT_ONNXRUNTIME", None)
    return kept | variables


@pytest.fixture(scope="module")
def expected(package_of: Callable[[str], exporter.Package]) -> list[int]:
    """What Python writes."""
    session = OnnxRuntimeSession(package_of("tiny-qwen2.5"))
    (result,) = engines.generate(session, [PROMPT], engines.GenerateOptions(max_new_tokens=40))
    return result.tokens


def written(minimal: Path, engine: Path, **variables: str) -> list[int]:
    """What the program writes, and nothing on stderr."""
    done = run(minimal, engine, *PROMPT, env=environment(**variables))
    assert done.stderr == ""
    return list(map(int, done.stdout.split()))


def test_the_minimal_example_writes_what_python_writes(
    minimal: Path, engine: Path, expected: list[int], onnxruntime_library: Path
) -> None:
    assert written(minimal, engine, QWENPORT_ONNXRUNTIME=str(onnxruntime_library)) == expected


def test_without_onnxruntime_one_line_says_what_to_do(minimal: Path, engine: Path) -> None:
    done = subprocess.run([minimal, engine, "1"], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith("error: onnxruntime cannot be loaded: libonnxruntime.so.1: ")
    assert "QWENPORT_ONNXRUNTIME" in done.stderr
    assert done.stderr.count("\n") == 1


def test_onnxruntime_may_lie_where_the_loader_looks(
    minimal: Path,
    engine: Path,
    expected: list[int],
    onnxruntime_library: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "libonnxruntime.so.1").symlink_to(onnxruntime_library)
    assert written(minimal, engine, LD_LIBRARY_PATH=str(tmp_path)) == expected


def test_onnxruntime_may_lie_beside_the_library_or_the_program(
    minimal: Path, engine: Path, expected: list[int], onnxruntime_library: Path
) -> None:
    shared = list((minimal.parents[1] / "usr").rglob("libqwenport.so"))
    for place in (*shared, minimal):
        beside = place.parent / "libonnxruntime.so.1"
        beside.symlink_to(onnxruntime_library)
        try:
            assert written(minimal, engine) == expected
        finally:
            beside.unlink()


def test_an_engine_of_a_backend_that_is_not_there(
    minimal: Path, engine_of: Callable[[str], engines.Engine]
) -> None:
    path = engine_of("tiny-qwen2.5").path
    done = subprocess.run([minimal, path, "1"], capture_output=True, text=True, env=environment())
    assert done.stderr == (
        f"error: {path}: built for tensorrt-rtx, and this library was configured for onnxruntime; "
        "build the engine with --target onnxruntime, or this library with -DQWENPORT_TENSORRT=RTX\n"
    )
