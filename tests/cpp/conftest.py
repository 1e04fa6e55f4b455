"""Builds of the runtime and its tests, below build/cpp: made by whoever asks first, then kept up to date."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenport import engines, exporter

from .runtime import Library

ROOT = Path(__file__).parents[2]
BUILDS = ROOT / "build" / "cpp"
SETTINGS = {
    "release": ["-DCMAKE_BUILD_TYPE=Release"],
    "static": ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF"],
    "address": ["-DSANITIZE=address,undefined", "-DCMAKE_CXX_FLAGS=-O1"],
    "thread": ["-DSANITIZE=thread", "-DCMAKE_CXX_FLAGS=-O1"],
}


def tool(name: str) -> str:
    """A program of the development environment."""
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    assert found, f"{name} is missing: pip install -e '.[dev]'"
    return found


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed; its output is the error."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done


def tensorrt_headers() -> Path:
    """NvInfer.h and its siblings, from the wheel of the development environment that carries them."""
    spec = importlib.util.find_spec("kernel_lens")
    assert spec is not None and spec.submodule_search_locations, "pip install -e '.[dev]'"
    return Path(spec.submodule_search_locations[0]) / "include" / "tensorrt"


def configure(source: Path, build: Path, *settings: object) -> list[str]:
    """The command that configures a build."""
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    return [tool("cmake"), "-S", str(source), "-B", str(build), *ninja, *map(str, settings)]


def built(setting: str) -> Path:
    """The folder of an up-to-date build in one of SETTINGS: of tests/cpp, or of the runtime alone ("static")."""
    folder = BUILDS / setting
    folder.mkdir(parents=True, exist_ok=True)
    with (BUILDS / f"{setting}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        headers = f"-DTENSORRT_INCLUDE_DIR={tensorrt_headers()}"
        source = ROOT / ("engines/cpp" if setting == "static" else "tests/cpp")
        run(*configure(source, folder, headers, *SETTINGS[setting]))
        run(tool("cmake"), "--build", folder)
    return folder


@pytest.fixture(scope="session")
def release() -> Path:
    """The release build."""
    return built("release")


@pytest.fixture(scope="session")
def library(release: Path) -> Library:
    """The runtime on the stand-in."""
    return Library(release / "libqwenport_stand_in.so")


@pytest.fixture(scope="session")
def package_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], exporter.Package]:
    """Name of a bundled checkpoint -> its fp32 package."""
    folder, made = tmp_path_factory.mktemp("packages"), {}

    def make(name: str) -> exporter.Package:
        if name not in made:
            made[name] = exporter.export(ROOT / "examples" / name, folder / name, dtype="fp32")
        return made[name]

    return make


@pytest.fixture(scope="session")
def engine_of(
    tmp_path_factory: pytest.TempPathFactory, package_of: Callable[[str], exporter.Package]
) -> Callable[[str], engines.Engine]:
    """Name of a bundled checkpoint -> a TensorRT-RTX engine of its fp32 package."""
    folder, made = tmp_path_factory.mktemp("engines"), {}

    def make(name: str) -> engines.Engine:
        if name not in made:
            made[name] = engines.build(
                package_of(name).path, folder / name, target="tensorrt-rtx", max_batch=3
            )
        return made[name]

    return make
