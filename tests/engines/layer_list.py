"""The final layers of a TensorRT-RTX engine, as its builder logs them at the verbosity DETAILED; no GPU is needed.

TensorRT keeps the first logger of a process, so the lists are made in a process of their own.

It reads a line per engine, in JSON: package, GPUs, form of attention, rows. It writes the builder's log of each.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import traceback
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
MADE, FAILED = "# made\n", "# failed\n"  # after a log
_PROFILE = re.compile(r" \[profile \d+\]")
_GRAPH = re.compile(r"_myl(\d+)_\d+, LayerType")  # a number per profile
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
class DecodeStep:
    """A step of one token per row over caches of `span` used slots, in an engine of chunks of `chunk` keys.

    `sliced` are the keys in the slices of caches that are copied for fused attention.
    """

    rows: int
    span: int
    sliced: int
    chunk: int

    def bytes_of(self, layer: Layer) -> int:
        """Bytes that a layer reads and writes, without its constants."""
        if layer.updates_cache:  # one token of each cache that it writes, and no more
            caches = [t for t in layer.outputs if t.is_cache]
            token = sum(self._bytes(t, keys=1) for t in caches)
            others = [t for t in (*layer.inputs, *layer.outputs) if not t.is_cache]
            read = [t for t in layer.inputs if t.is_cache and t not in caches]
            return (
                token
                + sum(map(self._bytes, others))
                + sum(self._bytes(t, keys=self.span) for t in read)
            )
        if layer.copies_cache:
            return 2 * sum(self._bytes(t, keys=self.sliced) for t in layer.inputs)
        kv_heads = {t.dims[1] for t in layer.inputs if t.is_cache}
        total = 0
        for tensor in (*layer.inputs, *layer.outputs):
            if tensor.is_cache:
                total += self._bytes(tensor, keys=self.span)
            elif layer.name.startswith("_gemm_mha") and not kv_heads and _is_slice(tensor):
                total += self._bytes(tensor, keys=self.sliced)
            else:
                total += self._bytes(tensor)
        return total

    def _bytes(self, tensor: Tensor, keys: int = 1) -> int:
        dims = list(tensor.dims)
        if tensor.is_cache:
            dims[2] = keys
        elif len(dims) >= 5:  # [batch, kv_heads, chunks, ...]
            dims = [
                -(-self.span // self.chunk) if i == 2 and d < 0 else d for i, d in enumerate(dims)
            ]
        elif len(dims) == 4 and dims[3] < 0:  # a mask
            dims[3] = self.sliced
        elif keys > 1:
            dims[2] = keys
        if tensor.name == "key_positions":
            dims = [self.span]
        sizes = [self.rows if i == 0 and d < 0 else 1 if d < 0 else d for i, d in enumerate(dims)]
        return math.prod(sizes) * SIZES[tensor.dtype]


def _is_slice(tensor: Tensor) -> bool:
    """Whether an input of fused attention is K or V: [batch, kv_heads, keys, head_dim]."""
    return len(tensor.dims) == 4 and tensor.dims[2] < 0 < tensor.dims[3] and tensor.dims[1] > 1


@dataclass(frozen=True)
class LayerList:
    """The kernels of an engine's profile in order, and what TensorRT says of its memory, in bytes.

    The weights are the engine's: profiles share them.
    """

    layers: tuple[Layer, ...]
    activation_bytes: int
    weights_bytes: int


@functools.cache
def _maker() -> subprocess.Popen[str]:
    """The other process, which ends when this one does."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def layer_list(package: Path, gpus: str, form: str, max_batch: int) -> tuple[LayerList, ...]:
    """Build an engine of a package in another process and read the builder's log: a list per profile."""
    maker = _maker()
    assert maker.stdin is not None and maker.stdout is not None
    print(json.dumps([str(package), gpus, form, max_batch]), file=maker.stdin, flush=True)
    log = []
    for line in maker.stdout:
        if line in (MADE, FAILED):
            break
        log.append(line)
    assert line == MADE, "".join(log)[-2000:]
    return parse("".join(log))


def parse(log: str) -> tuple[LayerList, ...]:
    """The layer lists of a builder's log, one per profile."""
    layers: dict[str, list[Layer]] = {}
    for line in log.splitlines():
        graph, match = _GRAPH.search(line), _LAYER.match(_PROFILE.sub("", line))
        if graph and match and match[2] not in NOT_KERNELS:
            parts = [tuple(map(_tensor, _TENSOR.findall(part))) for part in match.groups()[2:]]
            layers.setdefault(graph[1], []).append(Layer(_name(match[1]), match[2], *parts))
    activations = re.findall(r"^Total Activation Memory: (\d+)", log, re.M)
    (weights,) = re.findall(r"^Total Weights Memory: (\d+)", log, re.M)
    return tuple(
        LayerList(tuple(made), int(size), int(weights))
        for made, size in zip(layers.values(), activations, strict=True)
    )


def _tensor(found: tuple[str, str, str]) -> Tensor:
    name, dims, dtype = found
    return Tensor(name, tuple(int(size) for size in dims.split(",") if size), dtype)


def _name(name: str) -> str:
    """Without the numbers that change from build to build."""
    return re.sub(r"^_*myl_|_U\d+(?=\+|_|$)|_myl\d+_\d+$|_*mye\d+", "", name)


def main() -> None:
    """Build engines with a verbose logger of our own, and print its messages."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    import polygraphy.backend.trt as loaders
    import tensorrt_rtx as trt
    from polygraphy.backend.trt import util

    theirs = util.get_trt_logger()  # a build of quantized weights reads the list too

    class Printing(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            print(message)
            theirs.log(severity, message)

    logger = Printing()
    util.get_trt_logger = lambda: logger
    detailed = trt.ProfilingVerbosity.DETAILED
    loaders.CreateConfig = functools.partial(loaders.CreateConfig, profiling_verbosity=detailed)
    from qwenport import engines

    for line in sys.stdin:
        package, gpus, form, max_batch = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            try:
                engines.build(
                    package,
                    Path(folder) / "engine",
                    target="tensorrt-rtx",
                    gpus=gpus,
                    attention=form,
                    max_batch=max_batch,
                )
                print(MADE, end="", flush=True)
            except Exception:
                print(traceback.format_exc() + FAILED, end="", flush=True)


if __name__ == "__main__":
    main()
