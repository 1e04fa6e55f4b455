"""Compiling on the user's machine with CMake: progress from what it prints, and its complaint as one line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path

from qwenport import QwenportError
from qwenport.contract import Progress

TOOLS = "pip install 'qwenport[cpp]'"
COMPLAINTS = {
    r"CMake [\d.]+ or higher is required": f"cmake is older than 3.22: {TOOLS}",
    r"unable to find a build program": f"ninja or make is missing, needed to compile: {TOOLS}",
    r"No CMAKE_CXX_COMPILER": "a C++17 compiler is missing; on Debian and Ubuntu: apt-get install g++",
    r"nlohmann/json was not found": (
        "nlohmann/json is missing, needed to compile the C++ library: "
        f"{TOOLS}, or on Debian and Ubuntu: apt-get install nlohmann-json3-dev"
    ),
    r"No CUDA toolkit": (
        "no CUDA toolkit of version 12.5 or newer was found: install one "
        "(https://developer.nvidia.com/cuda-downloads), or put its bin folder into PATH"
    ),
}
"""What CMake says of something that is missing -> what to do about it."""


class CompilationError(QwenportError):
    """A tool that compiles is missing, or the compiler failed."""


def build(
    source: Path, folder: Path, settings: Mapping[str, object], *, what: str, progress: Progress
) -> str:
    """Configure `source` in `folder` and compile it there; returns what CMake said when it configured.

    Args:
        source: the folder of CMakeLists.txt.
        folder: the build folder.
        settings: cache variables.
        what: names the work in `progress`.
        progress: called with (what, done, total).

    Raises:
        CompilationError: a tool is missing, or the compiler failed.
    """
    cmake, ninja = _cmake(), tool("ninja")
    options = [f"-D{name}={value}" for name, value in settings.items()]
    if ninja:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    said = _run([cmake, "-S", str(source), "-B", str(folder), *options], "configuring", progress)
    jobs = str(os.cpu_count() or 1)
    _run([cmake, "--build", str(folder), "--parallel", jobs], what, progress)
    return said


def stage(folder: Path, staged: Path, *, progress: Progress) -> None:
    """Install what was built in `folder` into the new folder `staged`."""
    _run([_cmake(), "--install", str(folder), "--prefix", str(staged)], "installing", progress)


def tool(name: str) -> str | None:
    """A program of this Python's environment, or of PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _cmake() -> str:
    cmake = tool("cmake")
    if cmake is None:
        raise CompilationError(f"cmake is missing, needed to compile: {TOOLS}")
    return cmake


def _run(command: list[str], what: str, progress: Progress) -> str:
    """Run a step and return what it printed; its errors become the exception's message."""
    lines: list[str] = []
    progress(what, 0, 100)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={name: value for name, value in os.environ.items() if name != "DESTDIR"},
        process_group=0,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                for done, total in _steps(line):
                    progress(what, done, total)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.stdout.read()  # ends with the last of the compilers, so that their folder can be removed
            raise
    if process.returncode:
        raise CompilationError(_complaint(lines, what))
    progress(what, 100, 100)
    return "\n".join(lines)


def _steps(line: str) -> Iterator[tuple[int, int]]:
    """The progress in a line of a build's output: "[3/8] ..." or "[ 37%] ..."."""
    if match := re.match(r"\[(\d+)/(\d+)\]", line):
        yield int(match[1]), int(match[2])
    elif match := re.match(r"\[ *(\d+)%\]", line):
        yield int(match[1]), 100


def _complaint(lines: list[str], what: str) -> str:
    """What a failed step complains of: the compiler's first errors, else CMake's first, else its last line."""
    errors = [line for line in lines if re.search(r"\bfatal\b|error:", line)]
    text = " ".join(errors[:3]) or _cmake_error(lines) or " ".join(lines[-1:])
    text = " ".join(text.split())
    for words, remedy in COMPLAINTS.items():
        if re.search(words, text):
            return remedy
    return f"{what} failed: {text}"


def _cmake_error(lines: list[str]) -> str:
    """CMake's first error, without the place in its sources; "" if it has none."""
    for number, line in enumerate(lines):
        if match := re.match(r"CMake Error[^:]*(?::\d+ \(.*\))?:(.*)", line):
            rest = takewhile(lambda text: not text or text[0] == " ", lines[number + 1 :])
            return " ".join([match[1], *rest])
    return ""
