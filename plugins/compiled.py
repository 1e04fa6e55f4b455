"""The CUDA plugins as a shared library: compiled on the user's machine, later recognised by the library's own metadata.

The user provides nvcc and TensorRT's headers. A library is identified by its plugins' names and version; without one
the operators' function bodies are used.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qwenport import QwenportError, cmake, contract
from qwenport.contract import OLDEST_PLUGIN_GPU, PLUGIN_VERSION, Progress, no_progress

LIBRARY = "libqwenport_plugins.so"
GPUS = contract.GPUS["plugins"]
SOURCES = Path(__file__).parent
CUDA = Path("/usr/local/cuda/bin")
HEADER_FOLDERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
)


class PluginError(QwenportError):
    """The plugins cannot be compiled or used: nvcc or the headers are missing, or it is not such a library."""


@dataclass(frozen=True)
class PluginLibrary:
    """A compiled library.

    Attributes:
        path: the file.
        gpus: architectures that it has code for, "sm90".
        tensorrt: release of the headers it was compiled with, "10.14".
    """

    path: Path
    gpus: tuple[str, ...]
    tensorrt: str


def parse_architectures(text: str | None) -> tuple[str, ...]:
    """Read "sm80,sm90"; None is all of GPUS.

    Raises:
        PluginError: not a list of architectures, or a GPU older than SM80.
    """
    if text is None:
        return GPUS
    found = tuple(part.strip() for part in text.split(","))
    for gpu in found:
        if not re.fullmatch(r"sm\d+", gpu):
            raise PluginError(f"no such GPU architecture: {gpu!r}; write them as sm80,sm90")
        if int(gpu[2:]) < OLDEST_PLUGIN_GPU:
            raise PluginError(
                f"the plugins need a GPU of sm{OLDEST_PLUGIN_GPU} or newer, not {gpu}"
            )
    if len(set(found)) != len(found):
        raise PluginError(f"a GPU architecture is named twice: {text}")
    return found


def compile_library(
    path: Path,
    *,
    architectures: tuple[str, ...] = GPUS,
    tensorrt_include: Path | None = None,
    progress: Progress = no_progress,
) -> PluginLibrary:
    """Compile the plugins; an existing library is replaced once the new one is complete.

    Args:
        path: the library to write.
        architectures: as returned by `parse_architectures`.
        tensorrt_include: folder of NvInfer.h; by default where TensorRT's packages put it.
        progress: called with (what, done, total).

    Raises:
        PluginError: nvcc or the headers are missing.
        CompilationError: cmake is missing, or the compiler failed.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(CUDA))
    if nvcc is None:
        raise PluginError(
            "nvcc is missing, needed to compile the plugins: install a CUDA toolkit of version 12.8 or newer "
            "(https://developer.nvidia.com/cuda-downloads), or put its bin folder into PATH"
        )
    headers = _headers(tensorrt_include)
    if not path.parent.is_dir():
        raise PluginError(f"{path.parent}: no such folder")
    numbers = [gpu.removeprefix("sm") for gpu in architectures]
    with TemporaryDirectory() as scratch:
        build = Path(scratch)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_ARCHITECTURES": ";".join(numbers),
            "CMAKE_CUDA_COMPILER": nvcc,
            "TENSORRT_INCLUDE_DIR": str(headers),
        }
        cmake.build(SOURCES, build, settings, what="compiling the plugins", progress=progress)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            shutil.copyfile(build / LIBRARY, partial)
            open_library(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return open_library(path)


def open_library(path: Path) -> PluginLibrary:
    """Read a library's metadata; neither a GPU nor TensorRT is needed.

    Raises:
        PluginError: no such file, or not a library of these plugins.
    """
    if not path.is_file():
        raise PluginError(f"{path}: no such file; compile it with `qwenport plugins build {path}`")
    try:
        library = ctypes.CDLL(str(path.resolve()))
        description = library.qwenport_plugins_description
    except (OSError, AttributeError) as error:
        raise PluginError(f"{path}: not a library of these plugins ({error})") from error
    description.restype = ctypes.c_char_p
    version, gpus, tensorrt = description().decode().split(";")
    if version != PLUGIN_VERSION:
        raise PluginError(
            f"{path}: plugins of version {version}, this is for {PLUGIN_VERSION}; compile them again"
        )
    return PluginLibrary(path, tuple(f"sm{number}" for number in gpus.split(",")), tensorrt)


def _headers(given: Path | None) -> Path:
    folders = [given] if given is not None else [Path(folder) for folder in HEADER_FOLDERS]
    for folder in folders:
        if (folder / "NvInferRuntime.h").is_file():
            version = (folder / "NvInferVersion.h").read_text()
            if "TRT_MAJOR_RTX" in version:
                raise PluginError(f"{folder}: headers of TensorRT-RTX, which has no plugins")
            return folder
    if given is not None:
        raise PluginError(
            f"{given}: no NvInferRuntime.h there; give the folder of TensorRT's headers (of NvInfer.h)"
        )
    raise PluginError(
        "TensorRT's headers are missing: unpack NVIDIA's archive of the release that will load the plugins "
        "(https://developer.nvidia.com/tensorrt), and say where it is with --tensorrt-include FOLDER/include"
    )
