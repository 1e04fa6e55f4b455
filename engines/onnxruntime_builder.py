"""The onnxruntime part of `build`: the lowered graph and its weights, ready to load.

model.onnx            the graph, without functions, casts of weights or constants to compute
weights.safetensors   weights and rope tables in fp32, codes of quantized weights as bytes; model.onnx refers to them

Weights are always written, also those of an fp32 package: the engine has one file with other places and shorter rope
tables, and it must stay whole when the package is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwenport.contract import (
    AUTO,
    BF16,
    BY_ONNX,
    ENGINE_WEIGHTS,
    FP32,
    INT8,
    MASKED,
    MODEL,
    OLDEST_ONNXRUNTIME,
    ONNXRUNTIME,
    Dtype,
    Progress,
)
from qwenport.engines.attention import attention_of
from qwenport.engines.errors import BuildError
from qwenport.engines.onnxruntime_session import MAX_STEP_TOKENS
from qwenport.engines.request import Filled, Request, Steps
from qwenport.engines.session import Float32
from qwenport.exporter import (
    CHUNK_BYTES,
    Package,
    PackageError,
    TensorEntry,
    chunks,
    damaged,
    describe_graph,
    read_safetensors_header,
    require_space,
    safetensors_header,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from qwenport.engines.lowering import StoredWeight


def check_for_onnxruntime(request: Request) -> None:
    """Refuse options that mean nothing on a CPU.

    Raises:
        BuildError: GPUs, plugins or a form of attention are asked for.
    """
    for option, value in (
        ("--gpu", request.gpus),
        ("--plugins", request.plugins),
        ("--attention", None if request.attention == AUTO else request.attention),
    ):
        if value is not None:
            raise BuildError(f"{option} is for TensorRT; target {ONNXRUNTIME} runs on CPUs")


def fill_for_onnxruntime(request: Request, folder: Path, progress: Progress) -> Filled:
    """Write the graph and the weights into `folder`, one chunk of weights in memory at a time.

    Args:
        request: the package and the limits.
        folder: the engine's directory.
        progress: called with the bytes of the weight file.

    Raises:
        ExportError: the disk is too small.
        PackageError, LoweringError: the package's graph cannot be lowered.
    """
    from qwenport.engines.lowering import rounds_activations

    attention = attention_of(MASKED, request.capacity)
    model, weights = lower_for_onnxruntime(request.package, request.capacity, ENGINE_WEIGHTS)
    write_lowered(request.package, folder, model, weights, progress)
    file, entries = read_safetensors_header(folder / ENGINE_WEIGHTS)
    return Filled(
        runtime_version=OLDEST_ONNXRUNTIME,
        gpus=(),
        dtype=FP32.name,
        layers=len(model.graph),
        attention=attention,
        profiles=[
            request.profile(
                Steps(1, MAX_STEP_TOKENS, MAX_STEP_TOKENS), attention=attention, fixed_cache=False
            )
        ],
        bindings=describe_graph(model)["bindings"],
        activations=INT8 if rounds_activations(model) else None,
        weights={
            "bytes": sum(entry.length for entry in entries),
            "files": {
                ENGINE_WEIGHTS: {"bytes": file.size, "header_sha256": file.header_sha256},
            },
        },
    )


def lower_for_onnxruntime(
    package: Package, positions: int, file: str | None
) -> tuple[ir.Model, tuple[StoredWeight, ...]]:
    """Lower a package's graph; see `for_onnxruntime_engine`. No weight is read.

    Raises:
        PackageError, LoweringError: it cannot be lowered.
    """
    from qwenport.engines.lowering import for_onnxruntime_engine

    with damaged(package.model):
        return for_onnxruntime_engine(
            package.read_model(), rope_rows=package.config.rope_rows(positions), file=file
        )


def write_lowered(
    package: Package,
    folder: Path,
    model: ir.Model,
    weights: Sequence[StoredWeight],
    progress: Progress,
) -> None:
    """Write what `lower_for_onnxruntime` returned; without weights only the graph.

    Raises:
        ExportError: the disk is too small.
        PackageError: a file of the package is shorter than its graph says.
    """
    import onnx_ir as ir

    if weights:
        _write_weights(package.path, folder / ENGINE_WEIGHTS, weights, progress)
    ir.save(model, folder / MODEL)


def _write_weights(
    package: Path, file: Path, weights: Sequence[StoredWeight], progress: Progress
) -> None:
    """Write the file. Every chunk is converted on its own: bf16, fp16 and fp32 are all exact in fp32.

    Raises:
        ExportError: the disk is too small.
        PackageError: a file of the package is shorter than its graph says.
    """
    from qwenport.engines.lowering import ALIGNMENT

    total, done = sum(weight.entry.length for weight in weights), 0
    buffer: Float32 = np.empty(
        CHUNK_BYTES // 2, np.float32
    )  # new memory would take longer than the conversion
    require_space(file.parent, total)
    with file.open("xb") as writer:
        writer.write(safetensors_header([w.entry for w in weights], alignment=ALIGNMENT))
        for weight in weights:
            written = 0
            for chunk in _made(package, weight, buffer):
                written += writer.write(chunk)
                progress("writing weights", done + written, total)
            if written != weight.entry.length:
                raise PackageError(f"{package / weight.source.location}: shorter than {MODEL} says")
            done += written


def _made(package: Path, weight: StoredWeight, buffer: Float32) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor of the engine, in chunks; each is valid until the next."""
    from qwenport.engines.lowering import KEPT, repeated_zero_points

    source = weight.source
    stored = TensorEntry(
        weight.entry.name,
        str(source.location),
        source.dtype.name,
        weight.entry.shape,
        source.offset or 0,
        source.nbytes,
    )
    if weight.entry.dtype in KEPT and weight.repeats is not None:
        data = b"".join(chunks(package, stored))  # few: at most a byte for 16 values of the weight
        if len(data) == source.nbytes:
            rows, blocks = source.shape.numpy()
            shape, bits = (rows, blocks), source.dtype.bitwidth
            yield repeated_zero_points(data, bits, shape, weight.repeats).data.cast("B")
        return
    for chunk in chunks(package, stored):
        if weight.entry.dtype in KEPT:
            yield chunk
        elif weight.repeats is None:
            yield _in_float32(chunk, BY_ONNX[source.dtype.name], buffer)
        else:
            values = np.frombuffer(
                _in_float32(chunk, BY_ONNX[source.dtype.name], buffer), np.float32
            )
            yield np.repeat(values, weight.repeats).data.cast("B")


def _in_float32(chunk: bytes, dtype: Dtype, buffer: Float32) -> memoryview:
    """The values of a chunk in fp32, mostly in `buffer`, which must have room for them."""
    if dtype is FP32:
        return memoryview(chunk)
    count = len(chunk) // dtype.itemsize
    if dtype is BF16:  # the upper half of fp32
        bits = buffer[:count].view(np.uint32)
        np.left_shift(np.frombuffer(chunk, np.uint16), 16, out=bits, dtype=np.uint32)
    else:
        buffer[:count] = np.frombuffer(chunk, np.float16)
    return buffer[:count].data.cast("B")
