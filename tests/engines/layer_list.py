"""The final layers of a TensorRT-RTX engine, as its builder logs them at the verbosity DETAILED; no GPU is needed.

TensorRT keeps the first logger of a process, so a list is made in a process of its own:

    python tests/engines/layer_list.py PACKAGE GPUS FORM MAX_BATCH > log
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qwenport.contract import is_past, is_present, is_query

BINDINGS = (
    "input_ids",
    "position_ids",
    "write_indices",
    "key_positions",
    "logits_indices",
    "logits",
)
SIZES = {"Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1}
NOT_KERNELS = ("shape_call", "signal", "wait", "assertion")
_TENSOR = re.compile(r"Name: ([^,]+), Dimensions: \[([^\]]*)\], .*?Datatype: (\w+)")
_LAYER = re.compile(
    r"Name: (.*?), LayerType: (\w+), Inputs: \[(.*)\], Constants: \[(.*)\], Outputs: \[(.*)\], TacticName"
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a layer; a size of -1 is dynamic."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def is_cache(self) -> bool:
        """Whether it is a whole cache."""
        return is_past(self.name) or is_present(self.name)

    def __str__(self) -> str:
        named = self.is_cache or is_query(self.name) or self.name in BINDINGS
        return f"{self.name if named else ''}{list(self.dims)}{self.dtype}"


@dataclass(frozen=True)
class Layer:
    """A kernel of the engine."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def updates_cache(self) -> bool:
        """Whether it writes tokens into a cache."""
        return any(tensor.is_cache for tensor in self.outputs)

    @property
    def copies_cache(self) -> bool:
        """Whether it reads caches and only moves their values."""
        moved = re.fullmatch(r"(Tran|Slic|Resh|Move|Repl|Cast)+", self.name)
        return bool(moved) and any(tensor.is_cache for tensor in self.inputs)

    def __str__(self) -> str:
        read, made = (" ".join(map(str, part)) for part in (self.inputs, self.outputs))
        constants = " ".join(str(list(c.dims)) for c in self.constants if math.prod(c.dims) > 1)
        return f"{self.name} {self.kind} | {read} | {constants} | {made}"


@dataclass(frozen=True)
class LayerList:
    """The kernels of an engine in order, and what TensorRT says of its memory, in bytes."""

    layers: tuple[Layer, ...]
    activation_bytes: int
    weights_bytes: int


def layer_list(package: Path, gpus: str, form: str, max_batch: int) -> LayerList:
    """Build an engine of a package in another process and read the builder's log."""
    command = [sys.executable, __file__, str(package), gpus, form, str(max_batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return parse(done.stdout)


def parse(log: str) -> LayerList:
    """The layer list of a builder's log."""
    layers = []
    for line in log.splitlines():
        match = _LAYER.match(line)
        if match and match[2] not in NOT_KERNELS:
            parts = [tuple(map(_tensor, _TENSOR.findall(part))) for part in match.groups()[2:]]
            layers.append(Layer(_name(match[1]), match[2], *parts))
    sizes = [
        int(re.findall(rf"^Total {what} Memory: (\d+)", log, re.M)[-1])
        for what in ("Activation", "Weights")
    ]
    return LayerList(tuple(layers), *sizes)


def _tensor(found: tuple[str, str, str]) -> Tensor:
    name, dims, dtype = found
    return Tensor(name, tuple(int(size) for size in dims.split(",") if size), dtype)


def _name(name: str) -> str:
    """Without the numbers that change from build to build."""
    return re.sub(r"^_*myl_|_U\d+(?=\+|_|$)|_myl\d+_\d+$", "", name)


def main(package: str, gpus: str, form: str, max_batch: str) -> None:
    """Build, with a verbose logger of our own, and print its messages."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    import tensorrt_rtx as trt

    class Printing(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            print(message)

    logger = Printing()
    import polygraphy.backend.trt as loaders
    from polygraphy.backend.trt import util

    util.get_trt_logger = lambda: logger
    detailed = trt.ProfilingVerbosity.DETAILED
    loaders.CreateConfig = functools.partial(loaders.CreateConfig, profiling_verbosity=detailed)
    from qwenport import engines

    with tempfile.TemporaryDirectory() as folder:
        engines.build(
            package,
            Path(folder) / "engine",
            target="tensorrt-rtx",
            gpus=gpus,
            attention=form,
            max_batch=int(max_batch),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
