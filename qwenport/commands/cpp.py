"""`qwenport cpp`: the C++ library that runs engines inside other programs."""

from __future__ import annotations

import time
from pathlib import Path

import click

from qwenport.commands._common import PATH, output_options, print_json
from qwenport.commands._progress import progress_bar
from qwenport.wording import size


@click.group("cpp")
def command() -> None:
    """The C++ library, which runs engines inside a C++ or C program.

    A program that uses it contains no Python. Its sources come with this package and are compiled where they
    are used.

    \b
    Examples:
      qwenport cpp install ~/.local
    """


@command.command("install")
@click.argument("prefix", type=PATH)
@click.option(
    "--tensorrt-include",
    type=PATH,
    metavar="FOLDER",
    help="Folder of NvInfer.h, of the TensorRT or TensorRT-RTX release that will run engines.",
    show_default="where CMake finds it",
)
@output_options
def install(prefix: Path, tensorrt_include: Path | None, quiet: bool, as_json: bool) -> None:
    """Compile the C++ library and install it into PREFIX, where CMake's find_package finds it.

    Needs cmake and nlohmann/json, which `pip install 'qwenport[cpp]'` installs, and a C++17 compiler ($CXX, if
    that is set). The library runs engines for onnxruntime; with the headers of TensorRT or of TensorRT-RTX and a
    CUDA toolkit of version 12.5 or newer also those for tensorrt or for tensorrt-rtx. The headers are in NVIDIA's
    archives; the Python packages have none. Files of an earlier installation are replaced, and nothing is installed
    if compiling fails.

    \b
    Examples:
      qwenport cpp install ~/.local
      qwenport cpp install build/usr --tensorrt-include TensorRT-RTX-1.4/include
    """
    from qwenport.commands.doctor import CPU, onnxruntime_library
    from qwenport.engines import install_cpp_library

    start = time.perf_counter()
    with progress_bar("configuring", quiet) as progress:
        installed = install_cpp_library(
            prefix, tensorrt_include=tensorrt_include, progress=progress
        )
    seconds = time.perf_counter() - start
    bytes_, onnxruntime = installed.path.stat().st_size, onnxruntime_library()
    if as_json:
        print_json(
            {
                "prefix": str(installed.prefix),
                "library": str(installed.path),
                "targets": list(installed.targets),
                "bytes": bytes_,
                "onnxruntime_library": onnxruntime,
                "seconds": round(seconds, 3),
            }
        )
        return
    click.echo(
        f"{installed.path}: {size(bytes_)}, runs engines for {' and '.join(installed.targets)}; "
        f"compiled in {seconds:.1f} s\n"
        f"find_package(qwenport CONFIG REQUIRED) finds it with cmake -DCMAKE_PREFIX_PATH={installed.prefix}"
    )
    if onnxruntime:
        click.echo(f"programs find onnxruntime with export QWENPORT_ONNXRUNTIME={onnxruntime}")
    else:
        click.echo(
            f"programs need onnxruntime's library: {CPU}, and `qwenport doctor` says where it is"
        )
