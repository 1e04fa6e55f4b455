"""Build an engine for one GPU without one, and count its kernels in the final layer list of TensorRT-RTX's builder.

    python layer_list.py '{"package": ..., "engine": ..., "gpu": "sm89", "max_batch": 1}'

Prints one JSON object: the form of attention, kernels, seconds, and activation_bytes, the workspace at the largest
shapes that the engine takes.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
import polygraphy.backend.trt as loaders
import tensorrt_rtx as trt
from polygraphy.backend.trt import util

from qwenport import engines

NOT_KERNELS = ("shape_call", "signal", "wait", "assertion")


class Everything(trt.ILogger):  # type: ignore[misc]
    """Keeps what the builder says."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines += message.split("\n")


def main() -> None:
    """Build and count."""
    request = json.loads(sys.argv[1])
    log = Everything()
    util.get_trt_logger = lambda: log
    detailed = trt.ProfilingVerbosity.DETAILED
    loaders.CreateConfig = functools.partial(loaders.CreateConfig, profiling_verbosity=detailed)
    start = time.perf_counter()
    engine = engines.build(
        Path(request["package"]),
        Path(request["engine"]),
        target="tensorrt-rtx",
        gpus=request["gpu"],
        max_batch=request["max_batch"],
    )
    layers = [line for line in log.lines if line.startswith("Name: ") and "LayerType: " in line]
    kinds = [re.search(r"LayerType: (\w+)", line) for line in layers]
    memory = [re.search(r"Total Activation Memory: (\d+)", line) for line in log.lines]
    result = {
        "form": engine.manifest["attention"]["form"],
        "kernels": sum(1 for kind in kinds if kind and kind[1] not in NOT_KERNELS),
        "activation_bytes": max(int(found[1]) for found in memory if found),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
