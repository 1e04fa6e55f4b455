"""The zero points of quantized weights, in a file of the package's own: no format stores them as ONNX wants them.

Those of symmetric weights are one number, so all of these weights refer to the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwenport.contract import SYMMETRIC_ZEROS, Progress
from qwenport.exporter.checkpoint import Checkpoint, quantized_linears
from qwenport.exporter.quantization import WEIGHT, ZEROS
from qwenport.exporter.safetensors_file import (
    CHUNK_BYTES,
    TensorEntry,
    chunks,
    plan_safetensors,
    safetensors_header,
)

FILE, SYMMETRIC_FILE = "zero-points.safetensors", Path(SYMMETRIC_ZEROS).name
SYMMETRIC = "symmetric"


@dataclass(frozen=True)
class ZeroPoints:
    """The plan of the file.

    Attributes:
        places: tensor of the graph -> its place, packed as ONNX does.
        file: the file's own tensors, of bytes, in order.
        sources: tensor of the file -> the checkpoint's tensor, and the shape [N, K] of the weight. Others are filled
            with the middle code.
    """

    places: dict[str, TensorEntry]
    file: dict[str, TensorEntry]
    sources: dict[str, tuple[TensorEntry, tuple[int, ...]]]


def plan_zero_points(checkpoint: Checkpoint) -> ZeroPoints:
    """Lay out the file; empty without quantized weights."""
    quantization = checkpoint.config.quantization
    linears = quantized_linears(checkpoint.config)
    if quantization is None or not linears:
        return ZeroPoints({}, {}, {})
    shapes: dict[str, tuple[int, int]] = {}
    sizes: dict[str, int] = {}
    sources: dict[str, tuple[TensorEntry, tuple[int, ...]]] = {}
    for linear, (n, k) in linears.items():
        name, blocks = f"{linear}{WEIGHT}.{ZEROS}", k // quantization.block(k)
        shapes[name] = (n, blocks)
        size = -(-n * blocks * quantization.bits // 8)
        source = quantization.zero_point_source(linear)
        held = SYMMETRIC if source is None else name
        sizes[held] = max(size, sizes.get(held, 0))
        if source is not None:
            sources[name] = checkpoint.tensors[source], (n, k)
    where = FILE if sources else SYMMETRIC_FILE
    file = plan_safetensors(where, "U8", {name: (size,) for name, size in sizes.items()})
    places = {}
    for name, shape in shapes.items():
        held = name if name in sources else SYMMETRIC
        size = -(-shape[0] * shape[1] * quantization.bits // 8)
        places[name] = TensorEntry(
            name, where, quantization.code_dtype, shape, file[held].offset, size
        )
    return ZeroPoints(places, file, sources)


def write_zero_points(
    checkpoint: Checkpoint, folder: Path, plan: ZeroPoints, progress: Progress
) -> None:
    """Write the file into `folder`, one tensor in memory at a time."""
    quantization = checkpoint.config.quantization
    assert quantization is not None
    middle = quantization.middle | (quantization.middle << 4 if quantization.bits == 4 else 0)
    with (folder / next(iter(plan.file.values())).file).open("xb") as writer:
        writer.write(safetensors_header(plan.file.values()))
        for done, (name, entry) in enumerate(plan.file.items(), 1):
            if name in plan.sources:
                source, shape = plan.sources[name]
                data = b"".join(chunks(checkpoint.path, source))
                writer.write(quantization.zero_points(data, shape))
            else:
                for start in range(0, entry.length, CHUNK_BYTES):
                    writer.write(bytes([middle]) * min(CHUNK_BYTES, entry.length - start))
            progress("writing zero points", done, len(plan.file))
