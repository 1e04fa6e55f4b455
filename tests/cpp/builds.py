"""Builds of the C++ library, the plugins and their tests, below build/cpp: made when asked for, then kept up to date.

As a program it makes the release build, so that what a machine lacks is said before any test runs.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILDS = ROOT / "build" / "cpp"
MANY_TOKENS_ONLY = "-DQWENPORT_MANY_TOKENS_ONLY=ON"
ONNXRUNTIME_ONLY = "-DQWENPORT_TENSORRT=OFF"
OLDEST_CMAKE = "3.22.6"
"""The last release of the minor version that every CMakeLists.txt asks for; all other builds use the newest."""
PREBUILT = False  # benchmarks/gpu/prebuilt.py takes this module's place where nothing can be built
OPTIMISED, CHECKED = "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS=-O1"
PLAIN = "-DCMAKE_BUILD_TYPE=None"  # not optimised: compiles in less time
# name -> what is built, and how
SETTINGS = {
    "release": ("tests/cpp", OPTIMISED),
    "onnxruntime": ("engines/cpp", OPTIMISED, ONNXRUNTIME_ONLY),
    "onnxruntime-static": ("engines/cpp", PLAIN, ONNXRUNTIME_ONLY, "-DBUILD_SHARED_LIBS=OFF"),
    "static": ("engines/cpp", PLAIN, "-DBUILD_SHARED_LIBS=OFF"),
    "address": ("tests/cpp", "-DSANITIZE=address,undefined", CHECKED),
    "thread": ("tests/cpp", "-DSANITIZE=thread", CHECKED),
    "plugins": ("tests/plugins/native", OPTIMISED),
    "plugins-address": ("tests/plugins/native", "-DSANITIZE=address,undefined", CHECKED),
    "plugins-many": ("tests/plugins/native", PLAIN, MANY_TOKENS_ONLY),
    "plugins-cuda": ("plugins", OPTIMISED),
    "plugins-cuda-many": ("plugins", OPTIMISED, MANY_TOKENS_ONLY),
    # what the driver translates for a newer GPU
    "plugins-cuda-80": ("plugins", OPTIMISED, "-DCMAKE_CUDA_ARCHITECTURES=80"),
}


class BuildError(Exception):
    """What a command that had to succeed said."""


def tool(name: str) -> str:
    """A program of the development environment."""
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    if not found:
        raise BuildError(f"{name} is missing: run `make cpp`, or pip install -e '.[native]'")
    return found


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed; its output is the error."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise BuildError(f"{command[0]} failed\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return done


def tensorrt_headers() -> Path:
    """NvInfer.h and its siblings, from the wheel of the development environment that carries them."""
    spec = importlib.util.find_spec("kernel_lens")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "TensorRT's headers are missing: run `make cpp`, or pip install --no-deps kernel-lens"
        )
    return Path(spec.submodule_search_locations[0]) / "include" / "tensorrt"


def configure(source: Path, build: Path, *settings: object) -> list[str]:
    """The command that configures a build."""
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    return [tool("cmake"), "-S", str(source), "-B", str(build), *ninja, *map(str, settings)]


def oldest_cmake() -> Path:
    """CMake of release OLDEST_CMAKE, installed below BUILDS."""
    name = f"cmake-{OLDEST_CMAKE}"
    folder = BUILDS / name
    program = folder / "cmake" / "data" / "bin" / "cmake"
    with _locked(name):
        if not program.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            run(*pip, "--target", folder, f"cmake=={OLDEST_CMAKE}")
    return program


def built(setting: str, *, gpu: str | None = None, targets: Sequence[str] = ("all",)) -> Path:
    """The folder of an up-to-date build in one of SETTINGS.

    Args:
        gpu: compile for this architecture alone, "sm90", in a folder of its own.
        targets: what of the build is needed.
    """
    folder = BUILDS / (setting if gpu is None else f"{setting}-{gpu}")
    with _locked(folder.name):
        source, *settings = SETTINGS[setting]
        settings.append(f"-DTENSORRT_INCLUDE_DIR={tensorrt_headers()}")
        if gpu is not None:
            settings.append(f"-DCMAKE_CUDA_ARCHITECTURES={gpu.removeprefix('sm')}")
        run(*configure(ROOT / source, folder, *settings))
        run(tool("cmake"), "--build", folder, "--target", *targets)
    return folder


def installed() -> Path:
    """The prefix of an installed library that runs onnxruntime's engines only."""
    library, prefix = built("onnxruntime"), BUILDS / "installed"
    with _locked("installed"):
        run(tool("cmake"), "--install", library, "--prefix", prefix)
    return prefix


def built_example(name: str) -> Path:
    """The program of an example, compiled against the installed library."""
    prefix, folder = installed(), BUILDS / f"example-{name}"
    with _locked("installed"):
        found = f"-DCMAKE_PREFIX_PATH={prefix}"
        run(*configure(ROOT / "examples" / "cpp" / name, folder, found, OPTIMISED))
        run(tool("cmake"), "--build", folder)
    return folder / name


@contextmanager
def _locked(name: str) -> Iterator[None]:
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        built("release")
    except BuildError as error:
        sys.exit(str(error))
