"""Compares every weight of a package or an onnxruntime engine with the checkpoint's, at the speed of the disk.

What model.onnx points at is compared, whatever the manifest says: location, offset, length, dtype and shape. Files that
share an inode are read once, for their hash. Memory holds two chunks of CHUNK_BYTES per thread.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qwenport.contract import BY_SAFETENSORS, DTYPES, Dtype, Progress
from qwenport.exporter import (
    CHUNK_BYTES,
    Adapter,
    Checkpoint,
    TensorEntry,
    expert_stacks,
    stacked_shape,
)
from qwenport.validate.model_file import (
    MAX_INTEGERS,
    inner_tensors,
    is_floating,
    is_inside,
    place_of,
    used_values,
)
from qwenport.validate.quantized_identity import (
    QuantizedWeights,
    compare_quantized,
    compare_quantized_engine,
)
from qwenport.validate.report import Check
from qwenport.validate.rope_check import TABLES

WEIGHTS = "weights"
THREADS = min(8, 2 * (os.cpu_count() or 1))  # twice the cores: half of them wait for the disk
_NAMES = {int(dtype.ir): dtype.safetensors for dtype in DTYPES.values()}
_UNSIGNED = {2: np.uint16, 4: np.uint32}

Bytes = NDArray[np.uint8]
Read = Callable[[int, int], Bytes]
"""(offset, count) -> bytes of one tensor of the package."""
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Comparison:
    """The result of comparing the weights.

    Attributes:
        checks: numbers that must be 0, and how many of the checkpoint's tensors are in use.
        sha256: file -> hex SHA-256, the checkpoint's by name, the package's own as "weights/NAME".
    """

    checks: tuple[Check, ...]
    sha256: dict[str, str]


@dataclass(frozen=True)
class _Chunk:
    """Elements from `start` of one of an initializer's source tensors; `before` elements precede that tensor.

    They have the dtype `dtype` and were rounded to the dtype `rounded` on the way.
    """

    name: str
    read: Read
    dtype: str
    part: TensorEntry
    before: int
    start: int
    count: int
    rounded: str


def compare_weights(
    model: onnx.ModelProto, package: Path, checkpoint: Checkpoint, progress: Progress
) -> Comparison:
    """Compare every weight of a package with the checkpoint, byte for byte.

    Args:
        model: the package's model.onnx.
        package: its directory. Locations outside it are not read: such tensors count as differing.
        checkpoint: the checkpoint that the package claims as its source.
        progress: called with (what, bytes done, bytes in all), from any thread but one at a time.
    """
    sources = _sources(checkpoint)
    quantized = compare_quantized(model, package, checkpoint, progress)
    found, hashes = _compare(model, package, checkpoint, sources, quantized, None, progress)
    known = {*sources, *quantized.tensors, *TABLES}
    others = [tensor for tensor in model.graph.initializer if tensor.name not in known]
    foreign = [tensor for tensor in (*others, *inner_tensors(model)) if _is_large(tensor)]
    return Comparison((*found, _foreign(model, foreign)), hashes)


def compare_engine_weights(
    model: onnx.ModelProto, engine: Path, checkpoint: Checkpoint, dtype: Dtype, progress: Progress
) -> Comparison:
    """Compare every weight of an onnxruntime engine with the checkpoint: the package's values, widened to fp32.

    Args:
        model: the engine's model.onnx.
        engine: its directory. Locations outside it are not read: such tensors count as differing.
        checkpoint: the checkpoint that the engine claims as its source.
        dtype: the dtype of the package between the two, which values were rounded to.
        progress: as for `compare_weights`.
    """
    sources = _sources(checkpoint)
    sources |= _single_experts(model, sources)
    quantized = compare_quantized_engine(model, engine, checkpoint, progress)
    found, hashes = _compare(model, engine, checkpoint, sources, quantized, dtype, progress)
    known = {*sources, *quantized.tensors, *TABLES}
    foreign = [
        tensor
        for tensor in (*model.graph.initializer, *inner_tensors(model))
        if tensor.name not in known and is_floating(tensor.data_type) and _is_large(tensor)
    ]
    return Comparison((*found, _foreign(model, foreign)), hashes)


def _single_experts(
    model: onnx.ModelProto, sources: dict[str, list[TensorEntry]]
) -> dict[str, list[TensorEntry]]:
    """The matrices that the lowering cuts a stack of experts into, "STACK.0", "STACK.1": what each must equal."""
    cut: dict[str, list[onnx.TensorProto]] = {}
    for tensor in model.graph.initializer:
        stack, _, index = tensor.name.rpartition(".")
        if tensor.name not in sources and stack in sources and index.isdigit():
            cut.setdefault(stack, []).append(tensor)
    singles: dict[str, list[TensorEntry]] = {}
    for stack, tensors in cut.items():
        parts = sources[stack]
        if len(parts) == 1:
            (whole,) = parts
            length = whole.length // len(tensors)
            shape = tuple(tensors[0].dims)
            parts = [
                replace(whole, shape=shape, offset=whole.offset + n * length, length=length)
                for n in range(len(tensors))
            ]
        if len(parts) == len(tensors):
            singles |= {f"{stack}.{n}": [part] for n, part in enumerate(parts)}
    return singles


def _compare(
    model: onnx.ModelProto,
    package: Path,
    checkpoint: Checkpoint,
    sources: dict[str, list[TensorEntry]],
    quantized: QuantizedWeights,
    through: Dtype | None,
    progress: Progress,
) -> tuple[tuple[Check, ...], dict[str, str]]:
    """(the checks, the hashes); `through` is a dtype that values were rounded to on their way, if there is one."""
    hashes, same = _hash_files(package, checkpoint, progress)
    paths = {file.name: file.path for file in checkpoint.files}
    wrong = dict(quantized.wrong)
    chunks: list[_Chunk] = []
    sizes = {name: sum(math.prod(part.shape) for part in parts) for name, parts in sources.items()}
    for tensor in model.graph.initializer:
        if tensor.name not in sources:
            continue
        parts = sources[tensor.name]
        try:
            read = _open(tensor, package, _shape_of(checkpoint, tensor.name, parts))
        except ValueError as error:
            wrong.setdefault(tensor.name, str(error))
            continue
        adapted = checkpoint.adapter is not None and tensor.name in checkpoint.adapter.matrices
        if adapted or not _is_same_place(tensor, parts, same):
            chunks += _chunks(tensor, read, parts, through)

    meter = _Meter("comparing weights", sum(_source_bytes(chunk) for chunk in chunks), progress)

    def differing(chunk: _Chunk) -> tuple[str, int]:
        count = _differing(chunk, paths[chunk.part.file], checkpoint.adapter)
        meter.add(_source_bytes(chunk))
        return chunk.name, count

    counts: Counter[str] = Counter()
    for name, count in _in_parallel(differing, chunks):
        counts[name] += count
    for name, count in counts.items():
        if count:
            wrong.setdefault(name, f"{count} of {sizes[name]} values differ")
    made_of = {name: [part.name for part in found] for name, found in sources.items()}
    made_of |= {name: list(held) for name, held in quantized.tensors.items()}
    return (_differ(model, wrong), _usage(model, checkpoint, made_of)), hashes


def _shape_of(checkpoint: Checkpoint, name: str, parts: list[TensorEntry]) -> tuple[int, ...]:
    is_cut = len(parts) == 1 and name.rpartition(".")[2].isdigit()  # see _single_experts
    return parts[0].shape if is_cut else stacked_shape(checkpoint, name, parts)


def _sources(checkpoint: Checkpoint) -> dict[str, list[TensorEntry]]:
    """Initializer name -> the checkpoint's tensors that it must equal, concatenated."""
    tensors = checkpoint.tensors
    single = {name: [entry] for name, entry in tensors.items() if entry.dtype in BY_SAFETENSORS}
    stacks = expert_stacks(checkpoint)
    return single | {
        name: [tensors[part] for part in parts]
        for name, parts in stacks.items()
        if not checkpoint.config.is_quantized(parts[0])
    }


def _differ(model: onnx.ModelProto, wrong: dict[str, str]) -> Check:
    first = next((t.name for t in model.graph.initializer if t.name in wrong), None)
    where = None if first is None else f"first: {first}: {wrong[first]}"
    return Check("tensors that differ", len(wrong), "==", 0, where)


def _usage(model: onnx.ModelProto, checkpoint: Checkpoint, parts: dict[str, list[str]]) -> Check:
    used = used_values(model.graph)
    counts = Counter(tensor.name for tensor in model.graph.initializer)
    in_use = {part for name in counts if name in used for part in parts.get(name, ())}
    unused = [name for name in checkpoint.tensors if name not in in_use]
    where = f"first without use: {unused[0]}" if unused else None
    total = len(checkpoint.tensors)
    return Check("tensors of the checkpoint in use", total - len(unused), "==", total, where)


def _foreign(model: onnx.ModelProto, foreign: list[onnx.TensorProto]) -> Check:
    counts = Counter(tensor.name for tensor in model.graph.initializer)
    twice = [name for name in counts if counts[name] > 1]
    names = [tensor.name or "without a name" for tensor in foreign] + twice
    where = f"first: {names[0]}" if names else None
    return Check("tensors that the checkpoint does not have", len(names), "==", 0, where)


def _is_large(tensor: onnx.TensorProto) -> bool:
    """Whether it is more than a constant of the graph (one real number, or a few integers)."""
    return math.prod(tensor.dims) > (1 if is_floating(tensor.data_type) else MAX_INTEGERS)


def _open(tensor: onnx.TensorProto, package: Path, shape: tuple[int, ...]) -> Read:
    """A reader of the tensor's bytes.

    Raises:
        ValueError: another shape, a dtype that no weight has, or missing bytes; says which.
    """
    if tuple(tensor.dims) != shape:
        raise ValueError(f"has shape {list(tensor.dims)}, the checkpoint's has {list(shape)}")
    if tensor.data_type not in _NAMES:
        raise ValueError(f"has ONNX element type {tensor.data_type}, which no weight has")
    size = math.prod(shape) * BY_SAFETENSORS[_NAMES[tensor.data_type]].itemsize
    place = place_of(tensor)
    if place is None:
        try:
            data = np.frombuffer(ir.serde.deserialize_tensor(tensor).tobytes(), dtype=np.uint8)
        except (ValueError, TypeError) as error:
            raise ValueError(f"its values in model.onnx cannot be read ({error})") from error
        if data.nbytes != size:
            raise ValueError(f"has {data.nbytes} bytes in model.onnx, its shape takes {size}")
        return lambda offset, count: data[offset : offset + count]
    file, start = package / place.location, place.offset
    if not is_inside(package, place.location):
        raise ValueError(f"lies outside the package, in {place.location}")
    if not file.is_file():
        raise ValueError(f"lies in {place.location}, which does not exist")
    if place.length not in (None, size):
        raise ValueError(f"has length {place.length}, its shape takes {size}")
    if start + size > file.stat().st_size:
        raise ValueError(f"reaches past the end of {place.location}")
    return lambda offset, count: _read(file, start + offset, count)


def _is_same_place(
    tensor: onnx.TensorProto, parts: list[TensorEntry], same: dict[str, str]
) -> bool:
    """Whether a tensor is the checkpoint's own bytes: the same place in the same file."""
    place, part = place_of(tensor), parts[0]
    return (
        place is not None
        and len(parts) == 1
        and same.get(place.location) == part.file
        and place.offset == part.offset
        and _NAMES[tensor.data_type] == part.dtype
    )


def _chunks(
    tensor: onnx.TensorProto, read: Read, parts: list[TensorEntry], through: Dtype | None
) -> Iterator[_Chunk]:
    before, dtype = 0, _NAMES[tensor.data_type]
    rounded = dtype if through is None else through.safetensors
    for part in parts:
        elements = math.prod(part.shape)
        step = CHUNK_BYTES // BY_SAFETENSORS[part.dtype].itemsize
        for start in range(0, elements, step):
            count = min(step, elements - start)
            yield _Chunk(tensor.name, read, dtype, part, before, start, count, rounded)
        before += elements


def _source_bytes(chunk: _Chunk) -> int:
    return chunk.count * BY_SAFETENSORS[chunk.part.dtype].itemsize


def _differing(chunk: _Chunk, file: Path, adapter: Adapter | None) -> int:
    """How many elements differ in any bit: a NaN equals the same NaN, and -0 is not 0."""
    size = BY_SAFETENSORS[chunk.part.dtype].itemsize
    wanted = _read(file, chunk.part.offset + chunk.start * size, chunk.count * size)
    adapted = adapter is not None and chunk.part.name in adapter.matrices
    if {chunk.dtype, chunk.rounded} != {chunk.part.dtype} or adapted:
        values = torch.from_numpy(wanted).view(BY_SAFETENSORS[chunk.part.dtype].torch)
        if adapter is not None and adapted:
            values = values.double() + adapter.added(chunk.part, chunk.start, chunk.count)
        values = values.to(BY_SAFETENSORS[chunk.rounded].torch)
        wanted = values.to(BY_SAFETENSORS[chunk.dtype].torch).view(torch.uint8).numpy()
    size = BY_SAFETENSORS[chunk.dtype].itemsize
    found = chunk.read((chunk.before + chunk.start) * size, chunk.count * size)
    element = _UNSIGNED[size]
    return int(np.count_nonzero(found.view(element) != wanted.view(element)))


def _read(file: Path, offset: int, count: int) -> Bytes:
    data = np.empty(count, dtype=np.uint8)
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        done = 0
        while done < count:
            got = stream.readinto(data[done:].data)
            if not got:
                raise OSError(f"{file} became shorter while it was read")
            done += got
    return data


@dataclass(frozen=True)
class _Job:
    """A file to hash; `twin` is a file of the package, of the same name and size, to compare it with."""

    name: str
    path: Path
    twin: Path | None = None


def hash_checkpoint(checkpoint: Checkpoint, progress: Progress) -> dict[str, str]:
    """The SHA-256 of each weight file of a checkpoint, as `sha256sum` and the Hub print it."""
    hashes, _ = _hash_all([_Job(file.name, file.path) for file in checkpoint.files], progress)
    return hashes


def _hash_files(
    package: Path, checkpoint: Checkpoint, progress: Progress
) -> tuple[dict[str, str], dict[str, str]]:
    """(hashes, location in the package -> the checkpoint file that it equals byte for byte)."""
    own = {
        f"{WEIGHTS}/{path.name}": path
        for path in sorted((package / WEIGHTS).glob("*"))
        if path.is_file() and is_inside(package, f"{WEIGHTS}/{path.name}")
    }
    jobs, linked = [], {}
    for file in checkpoint.files:
        location = f"{WEIGHTS}/{file.name}"
        twin = own.get(location)
        if twin is not None and twin.samefile(file.path):
            linked[location] = file.name
            twin = None
        elif twin is not None and twin.stat().st_size != file.size:
            twin = None
            jobs.append(_Job(location, own[location]))
        own.pop(location, None)
        jobs.append(_Job(file.name, file.path, twin))
    jobs += [_Job(location, path) for location, path in own.items()]
    hashes, equal = _hash_all(jobs, progress)
    return hashes, linked | {f"{WEIGHTS}/{name}": name for name in equal}


def _hash_all(jobs: list[_Job], progress: Progress) -> tuple[dict[str, str], list[str]]:
    """(hashes, names of files that their twin equals)."""
    total = sum(job.path.stat().st_size for job in jobs)
    meter = _Meter("hashing weights", total, progress)
    hashes, equal = {}, []
    for job, (own, twin) in zip(jobs, _in_parallel(lambda j: _hash(j, meter), jobs), strict=True):
        hashes[job.name] = own
        if twin is not None:
            hashes[f"{WEIGHTS}/{job.name}"] = twin
        elif job.twin is not None:
            equal.append(job.name)
    return hashes, equal


def _hash(job: _Job, meter: _Meter) -> tuple[str, str | None]:
    """The SHA-256 of a file, and its twin's if that differs."""
    digest, differs = hashlib.sha256(), None
    size = job.path.stat().st_size
    for start in range(0, size, CHUNK_BYTES):
        count = min(CHUNK_BYTES, size - start)
        chunk = _read(job.path, start, count)
        if job.twin is not None:
            theirs = _read(job.twin, start, count)
            if differs is None and not np.array_equal(chunk, theirs):
                differs = digest.copy()  # everything before is the same
            if differs is not None:
                differs.update(theirs.data)
        digest.update(chunk.data)
        meter.add(count)
    return digest.hexdigest(), None if differs is None else differs.hexdigest()


class _Meter:
    """Counts bytes across threads. An exception from `progress` ends the thread it is raised in."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._done, self._lock = 0, Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._what, self._done, self._total)


def _in_parallel(work: Callable[[Task], Result], tasks: list[Task]) -> Iterator[Result]:
    """Results in order. After an exception no new task is started."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from pool.map(work, tasks)
    finally:
        pool.shutdown(cancel_futures=True)
