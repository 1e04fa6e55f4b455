"""The C++ library, compiled from the sources that this package carries and installed where a user wants it.

Nothing is written below the prefix before everything is compiled, and nothing stays there if a file cannot be written.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qwenport import QwenportError, cmake
from qwenport.contract import Progress, no_progress

SOURCES = Path(__file__).parent / "cpp"
LIBRARY = "libqwenport.so"


class InstallError(QwenportError):
    """The library cannot be installed there, or the headers are missing that it is to be compiled with."""


@dataclass(frozen=True)
class CppLibrary:
    """An installed library.

    Attributes:
        prefix: the folder that CMAKE_PREFIX_PATH needs.
        path: the shared library, below the prefix.
        targets: whose engines it runs, as `build` calls them.
    """

    prefix: Path
    path: Path
    targets: tuple[str, ...]


def install_cpp_library(
    prefix: str | Path,
    *,
    tensorrt_include: str | Path | None = None,
    progress: Progress = no_progress,
) -> CppLibrary:
    """Compile the C++ library and install it; files of an earlier installation are replaced.

    Args:
        prefix: folder to install into, like /usr/local; made if it is not there.
        tensorrt_include: folder of NvInfer.h, to run engines of that flavour of TensorRT too; by default they are
            run if CMake finds the headers and CUDA.
        progress: called with (what, done, total).

    Raises:
        InstallError: the prefix cannot be written, or `tensorrt_include` has no headers.
        CompilationError: a tool, nlohmann/json or CUDA is missing, or the compiler failed.
    """
    prefix = Path(os.path.abspath(prefix))
    _check_writable(prefix)
    settings: dict[str, object] = {
        "CMAKE_INSTALL_PREFIX": prefix,
        "Python3_EXECUTABLE": sys.executable,
    }
    if tensorrt_include is not None:
        headers = Path(os.path.abspath(tensorrt_include))
        if not (headers / "NvInferVersion.h").is_file():
            raise InstallError(
                f"{tensorrt_include}: no NvInferVersion.h there; give the folder of TensorRT's headers (of NvInfer.h)"
            )
        settings["TENSORRT_INCLUDE_DIR"] = headers
    if json := importlib.util.find_spec("nlohmann_json"):  # a package of headers
        settings["NLOHMANN_JSON_INCLUDE_DIR"] = Path(json.origin or "").parent / "include"
    with TemporaryDirectory(prefix="qwenport-") as scratch:
        build, staged = Path(scratch, "build"), Path(scratch, "staged")
        said = cmake.build(
            SOURCES, build, settings, what="compiling the C++ library", progress=progress
        )
        cmake.stage(build, staged, progress=progress)
        _copy(staged, prefix)
        (library,) = staged.rglob(LIBRARY)
    targets = re.findall(r"qwenport: (\S+) engines: yes", said)
    return CppLibrary(prefix, prefix / library.relative_to(staged), tuple(targets))


def _check_writable(prefix: Path) -> None:
    """Refuse early what would fail after a minute of compiling."""
    there = next(folder for folder in (prefix, *prefix.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise InstallError(f"{there}: not a folder to install in")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InstallError(f"{there}: no permission to write there; install into a folder of yours")


def _copy(staged: Path, prefix: Path) -> None:
    """Copy a tree into the prefix: each file beside its place first, and all renamed at the end."""
    files = [path for path in staged.rglob("*") if path.is_symlink() or path.is_file()]
    partials: dict[Path, Path] = {}
    made: list[Path] = []
    try:
        for file in files:
            target = prefix / file.relative_to(staged)
            for folder in (*reversed(target.parent.parents), target.parent):
                if not folder.is_dir():
                    folder.mkdir()
                    made.append(folder)
            if target.is_dir():
                raise InstallError(f"{target}: a folder is in the way")
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            partials[partial] = target
            shutil.copy2(file, partial, follow_symlinks=False)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for partial, target in partials.items():
                partial.replace(target)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except BaseException as error:
        for partial in partials:
            partial.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):  # another process's files lie there now, or ours do already
                folder.rmdir()
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename2 or error.filename
            raise InstallError(f"{where}: cannot be installed there ({error.strerror})") from error
        raise
