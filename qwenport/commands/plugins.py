"""`qwenport plugins`: the CUDA kernels of the custom operators, as a library that TensorRT loads."""

from __future__ import annotations

import time
from pathlib import Path

import click

from qwenport.commands._common import PATH, output_options, print_json
from qwenport.commands._progress import progress_bar
from qwenport.contract import GPUS, OLDEST_PLUGIN_GPU
from qwenport.wording import size


@click.group("plugins")
def command() -> None:
    """The CUDA kernels of the custom operators, as a library that TensorRT loads.

    They only add speed. Without them an engine computes the operators from their definitions in ONNX.

    \b
    Examples:
      qwenport plugins build
    """


@command.command("build")
@click.argument("library", type=PATH, default=Path("libqwenport_plugins.so"))
@click.option(
    "--arch",
    metavar="sm80,sm90",
    help=f"GPU architectures to compile for, comma-separated; sm{OLDEST_PLUGIN_GPU} or newer.",
    show_default=",".join(GPUS["plugins"]),
)
@click.option(
    "--tensorrt-include",
    type=PATH,
    metavar="FOLDER",
    help="Folder of NvInfer.h, of the TensorRT release that will load the library.",
    show_default="where packages of TensorRT put it",
)
@output_options
def build(
    library: Path, arch: str | None, tensorrt_include: Path | None, quiet: bool, as_json: bool
) -> None:
    """Compile the plugins into LIBRARY, for `qwenport build --target tensorrt --plugins LIBRARY`.

    Needs nvcc 12.8 or newer, a C++ compiler, cmake and TensorRT's headers, but no GPU. An existing LIBRARY
    is replaced.

    \b
    Examples:
      qwenport plugins build
      qwenport plugins build hopper.so --arch sm90
      qwenport plugins build --tensorrt-include TensorRT-10.16/include
    """
    from qwenport.plugins.compiled import compile_library, parse_architectures

    start = time.perf_counter()
    architectures = parse_architectures(arch)
    with progress_bar("compiling the plugins", quiet) as progress:
        built = compile_library(
            library,
            architectures=architectures,
            tensorrt_include=tensorrt_include,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "library": str(built.path),
                "gpus": list(built.gpus),
                "tensorrt": built.tensorrt,
                "bytes": built.path.stat().st_size,
                "seconds": round(seconds, 3),
            }
        )
        return
    click.echo(
        f"{built.path}: {size(built.path.stat().st_size)} for {', '.join(built.gpus)}, TensorRT {built.tensorrt}; "
        f"compiled in {seconds:.1f} s"
    )
