"""What TensorRT-RTX's builder makes of a shape, without a GPU: the kernels of its final layer list, and its workspace.

    python benchmarks/layers.py qwen2.5-7b-instruct --gpu sm89 --layers 2 --max-batch 8

The checkpoint has zeros for weights and takes no disk space. With few layers it has all kinds of kernels that the whole
has, and the workspace of the whole, which layers share. Prints one JSON object: the form of attention, kernels,
seconds, and activation_bytes, the workspace at the largest shapes that the engine takes.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
import polygraphy.backend.trt as loaders
import tensorrt_rtx as trt
from polygraphy.backend.trt import util
from shapes import SHAPES, make_checkpoint

from qwenport import engines, exporter

NOT_KERNELS = ("shape_call", "signal", "wait", "assertion")


class Everything(trt.ILogger):  # type: ignore[misc]
    """Keeps what the builder says."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Keep a message."""
        self.lines += message.split("\n")


def built(package: Path, folder: Path, gpu: str, max_batch: int) -> dict[str, Any]:
    """Build an engine into `folder`, and read the builder's messages."""
    log = Everything()
    util.get_trt_logger = lambda: log
    detailed = trt.ProfilingVerbosity.DETAILED
    loaders.CreateConfig = functools.partial(loaders.CreateConfig, profiling_verbosity=detailed)
    start = time.perf_counter()
    engine = engines.build(package, folder, target="tensorrt-rtx", gpus=gpu, max_batch=max_batch)
    layers = [line for line in log.lines if line.startswith("Name: ") and "LayerType: " in line]
    kinds = [re.search(r"LayerType: (\w+)", line) for line in layers]
    memory = [re.search(r"Total Activation Memory: (\d+)", line) for line in log.lines]
    return {
        "form": engine.manifest["attention"]["form"],
        "kernels": sum(1 for kind in kinds if kind and kind[1] not in NOT_KERNELS),
        "activation_bytes": max(int(found[1]) for found in memory if found),
        "seconds": round(time.perf_counter() - start, 1),
    }


@click.command(context_settings={"show_default": True})
@click.argument("shape", type=click.Choice(SHAPES))
@click.option("--gpu", default="sm89", help="The architecture to build for.")
@click.option("--layers", type=click.IntRange(min=1), default=2, help="Decoder layers.")
@click.option("--max-batch", type=click.IntRange(min=1), default=8, help="Rows.")
def main(shape: str, gpu: str, layers: int, max_batch: int) -> None:
    """Build an engine of a SHAPE with few layers for one GPU, and print what the builder says of it."""
    with TemporaryDirectory() as scratch:
        work = Path(scratch)
        checkpoint = make_checkpoint(shape, work / "checkpoint", sparse=True, layers=layers)
        package = exporter.export(checkpoint, work / "package")
        found = built(package.path, work / "engine", gpu, max_batch)
    asked = {"shape": shape, "gpu": gpu, "layers": layers, "max_batch": max_batch}
    click.echo(json.dumps({**asked, **found, "tensorrt_rtx": trt.__version__}))


if __name__ == "__main__":
    main()
