"""Weights in a package: referenced in place, copied whole, or converted one tensor at a time.

A tensor whose dtype is not the package's is converted. Unless the user named the dtype, that must be lossless. Weights
that an adapter changes are computed in fp64 and rounded once.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from qwenport.contract import BY_SAFETENSORS, COPY, DTYPES, FP8, PACK, Progress
from qwenport.exporter.checkpoint import Checkpoint, expert_stacks, stacked_shape
from qwenport.exporter.directory import require_space
from qwenport.exporter.errors import ExportError
from qwenport.exporter.expected import quantized_weights
from qwenport.exporter.finite import check_finite
from qwenport.exporter.quantization import (
    INPUT_SCALE,
    PERMUTATION,
    SCALES,
    WEIGHT,
    ByReference,
    Part,
    Repacked,
    Storage,
    part_name,
)
from qwenport.exporter.safetensors_file import (
    CHUNK_BYTES,
    TensorEntry,
    chunks,
    plan_safetensors,
    safetensors_header,
)
from qwenport.exporter.written_parts import FOLDER, WrittenParts, plan_written_parts, write_parts

CONVERTED = "model.safetensors"  # all tensors
CONVERTED_SOME = "converted.safetensors"  # those whose dtype differs from the rest
PACKED = "experts-packed.safetensors"

_CODES = {
    "U4": ir.DataType.UINT4,
    "U8": ir.DataType.UINT8,
    "I32": ir.DataType.INT32,
    "I64": ir.DataType.INT64,
    FP8: ir.DataType.FLOAT8E4M3FN,
}
_FICLONE = 0x40049409  # linux/fs.h: share the extents of a file, copy on write


@dataclass(frozen=True)
class WeightPlan:
    """Where a package's tensors go, and what they are made of.

    Attributes:
        mode: "link", "copy", "pack" or "convert", as in the manifest.
        entries: tensor -> its location in the package, with `file` below weights/, but for SYMMETRIC_ZEROS.
        written: the tensors among them that go into the package's own file -> the checkpoint's tensors that
            each consists of, concatenated. All others stay in the checkpoint's files.
        parts: those of quantized weights that the package writes into files of their own.
        same: input scale of a linear -> the equal one of another in its module, which stands for both.
    """

    mode: str
    entries: dict[str, TensorEntry]
    written: dict[str, list[TensorEntry]]
    parts: WrittenParts
    same: dict[str, str]

    def conversions(self) -> dict[str, int]:
        """ "fp32 to bf16" -> the number of the checkpoint's tensors converted so."""
        return dict(
            Counter(
                f"{BY_SAFETENSORS[part.dtype].name} to {BY_SAFETENSORS[self.entries[name].dtype].name}"
                for name, parts in self.written.items()
                for part in parts
                if part.dtype != self.entries[name].dtype
            )
        )


def plan_weights(checkpoint: Checkpoint, dtype: str, mode: str) -> WeightPlan:
    """Lay out a package's weights. Nothing is written, and only orders of columns and input scales are read.

    Args:
        checkpoint: the source.
        dtype: dtype of the package's tensors; tensors of another dtype are converted.
        mode: "link" (by reference, no bytes written), "copy", or "pack" (link, and write the stacks of single
            experts). Weights that an adapter changes are always written.

    Raises:
        ExportError: there is nothing to pack.
    """
    quantized = _quantized_parts(checkpoint, DTYPES[dtype].safetensors)
    _check_dtype(checkpoint, dtype, quantized)
    same = _equal_input_scales(checkpoint, quantized)
    for name in same:
        del quantized[name]
    tensors, parts = _as_computed_with(checkpoint, quantized), plan_written_parts(quantized)
    experts = expert_stacks(checkpoint)
    stacks = {
        name: [tensors[part] for part in experts[name]]
        for name in experts
        if not checkpoint.config.is_quantized(experts[name][0])
    }
    if mode == PACK and experts and not stacks:
        raise ExportError(
            "--weights pack: the experts are quantized, and are not stacked; use --weights link or copy"
        )
    if mode == PACK and not stacks:
        raise ExportError(
            "--weights pack: the checkpoint has no experts one by one that could be stacked; "
            "use --weights link or copy"
        )
    stored = DTYPES[dtype].safetensors
    stacked = {part.name for parts in stacks.values() for part in parts}
    single = {name: entry for name, entry in tensors.items() if name not in stacked}
    adapted = checkpoint.adapter.matrices if checkpoint.adapter else {}
    if all(entry.dtype != stored and entry.dtype in BY_SAFETENSORS for entry in tensors.values()):
        written = {**stacks, **{name: [entry] for name, entry in single.items()}}
        entries = _laid_out(checkpoint, CONVERTED, dtype, written)
        return WeightPlan("convert", entries | parts.places, written, parts, same)
    kept = single if mode == PACK else tensors
    written = {
        name: [entry]
        for name, entry in kept.items()
        if entry.dtype in BY_SAFETENSORS and (entry.dtype != stored or name in adapted)
    }
    if mode == PACK:
        written |= stacks
    file = PACKED if mode == PACK else CONVERTED_SOME
    if written and any(known.name == file for known in checkpoint.files):
        raise ExportError(
            f"the package would write {file}, which is a file of the checkpoint; rename it there (and in its index)"
        )
    entries = kept | _laid_out(checkpoint, file, dtype, written) | parts.places
    return WeightPlan(mode, entries, written, parts, same)


def _quantized_parts(checkpoint: Checkpoint, dtype: str) -> dict[str, Part]:
    """Part of a quantized weight, as the graph names it -> what it is made of."""
    found: dict[str, Part] = {}
    for weight, (storage, shape) in quantized_weights(checkpoint.config).items():
        linear = weight.removesuffix(WEIGHT)
        parts = storage.parts(linear, shape, checkpoint.tensors, dtype)
        found |= {part_name(weight, name): part for name, part in parts.items()}
        permutation = _permutation(checkpoint, storage, linear, shape)
        if permutation is not None:
            found[part_name(weight, PERMUTATION)] = permutation
    return found


def _permutation(
    checkpoint: Checkpoint, storage: Storage, linear: str, shape: tuple[int, int]
) -> Repacked | None:
    """The order of a weight's columns, if it is not their own."""
    order = storage.order(linear, shape, checkpoint.path, checkpoint.tensors)
    if order is None:
        return None
    data = order.astype("<i8").tobytes()
    return Repacked("I64", order.shape, (), lambda read: data)


def _check_dtype(checkpoint: Checkpoint, dtype: str, parts: Mapping[str, Part]) -> None:
    """Refuse another dtype than the scales', or for weights dequantized by the export than the checkpoint's.

    Values are rounded to that dtype.

    Raises:
        ExportError: names a weight.
    """
    for weight, (storage, _) in quantized_weights(checkpoint.config).items():
        linear = weight.removesuffix(WEIGHT)
        if storage.is_whole and dtype != checkpoint.dtype:
            raise ExportError(
                f"{linear} is dequantized to the checkpoint's dtype: --dtype {checkpoint.dtype}"
            )
        for name in (SCALES, INPUT_SCALE):
            part = parts.get(part_name(weight, name))
            if not isinstance(part, ByReference | Repacked):
                continue
            stored = part.entry.dtype if isinstance(part, ByReference) else part.dtype
            if stored != DTYPES[dtype].safetensors:
                own = BY_SAFETENSORS[stored].name
                raise ExportError(
                    f"the scales of {linear} are {own}; a quantized checkpoint is exported in their "
                    f"dtype: --dtype {own}"
                )


def _equal_input_scales(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> dict[str, str]:
    """Input scale -> an equal one of its module: linears with one input then share its rounding."""
    first: dict[tuple[str, bytes], str] = {}
    same: dict[str, str] = {}
    for name, part in parts.items():
        if not name.endswith(f".{INPUT_SCALE}") or not isinstance(part, ByReference):
            continue
        module = name.removesuffix(f"{WEIGHT}.{INPUT_SCALE}").rpartition(".")[0]
        value = b"".join(chunks(checkpoint.path, part.entry))
        if (known := first.setdefault((module, value), name)) != name:
            same[name] = known
    return same


def _as_computed_with(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> dict[str, TensorEntry]:
    """The checkpoint's tensors as the graph refers to them: of a quantized weight, the parts that are its own bytes."""
    quantized = {
        f"{weight.removesuffix(WEIGHT)}.{suffix}"
        for weight, (storage, shape) in quantized_weights(checkpoint.config).items()
        for suffix in (*storage.stored(shape), *storage.optional(shape))
    }
    found = {name: entry for name, entry in checkpoint.tensors.items() if name not in quantized}
    return found | {
        name: part.entry for name, part in parts.items() if isinstance(part, ByReference)
    }


def place_weights(
    checkpoint: Checkpoint,
    package: Path,
    dtype: str,
    mode: str,
    progress: Progress,
    *,
    lossless: bool,
    check_values: bool = False,
) -> WeightPlan:
    """Place the checkpoint's weights under `package`/weights according to `plan_weights`, and return the plan.

    Args:
        checkpoint: the source; never written to.
        package: directory being written.
        dtype, mode: see `plan_weights`.
        progress: called with the bytes done.
        lossless: refuse to convert a tensor that would lose precision.
        check_values: also read the referenced tensors, and refuse NaN and infinity in any.

    Raises:
        ExportError: links are not possible there, a value is not finite or does not fit `dtype`, or the disk is too
            small.
    """
    folder = package / FOLDER
    folder.mkdir()
    plan = plan_weights(checkpoint, dtype, mode)
    copied = sum(file.size for file in checkpoint.files) if plan.mode == COPY else 0
    written = sum(plan.entries[name].length for name in plan.written) + plan.parts.length
    require_space(folder, copied + written)
    if plan.mode != "convert":
        _place_files(checkpoint, folder, plan.mode, progress)
    if plan.written:
        _write(checkpoint, folder, dtype, plan, progress, lossless)
    write_parts(checkpoint, package, plan.parts, progress)
    if check_values:
        left = [
            entry
            for name, entry in plan.entries.items()
            if name not in plan.written
            and name not in plan.parts.places
            and (entry.dtype in BY_SAFETENSORS or entry.dtype == FP8)
        ]
        _check_values(checkpoint, left, plan.entries, progress)
    return plan


def _place_files(checkpoint: Checkpoint, folder: Path, mode: str, progress: Progress) -> None:
    total, done = sum(file.size for file in checkpoint.files), 0
    for file in checkpoint.files:
        target = folder / file.name
        if mode == COPY:
            for count in _copy(file.path, target):
                done += count
                progress("copying weights", done, total)
        else:
            _link(file.path, target)


def _laid_out(
    checkpoint: Checkpoint, file: str, dtype: str, written: dict[str, list[TensorEntry]]
) -> dict[str, TensorEntry]:
    shapes = {name: stacked_shape(checkpoint, name, parts) for name, parts in written.items()}
    return plan_safetensors(file, DTYPES[dtype].safetensors, shapes)


def external_tensor(name: str, location: str, entry: TensorEntry) -> ir.ExternalTensor:
    """The ONNX tensor of a safetensors entry: a location in the package, an offset and a length."""
    return ir.ExternalTensor(
        location,
        entry.offset,
        entry.length,
        _CODES[entry.dtype] if entry.dtype in _CODES else BY_SAFETENSORS[entry.dtype].ir,
        shape=ir.Shape(entry.shape),
        name=name,
    )


def _link(source: Path, target: Path) -> None:
    """Reflink if the file system can, else hard-link: onnxruntime refuses symbolic links."""
    if _reflink(source, target):
        return
    try:
        os.link(source, target)
    except OSError as error:
        reason = (
            "it is on another file system"
            if error.errno == errno.EXDEV
            else (error.strerror or str(error)).lower()
        )
        raise ExportError(
            f"cannot reference {source} from the package: {reason}; "
            "use --weights copy, or write the package beside the checkpoint"
        ) from error


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not Unix: no reflinks
        return False
    with source.open("rb") as original, target.open("wb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
            return True
        except OSError:  # the file system has no reflinks: the caller hard-links
            pass
    target.unlink()
    return False


def _copy(source: Path, target: Path) -> Iterable[int]:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            writer.write(chunk)
            yield len(chunk)


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: str,
    plan: WeightPlan,
    progress: Progress,
    lossless: bool,
) -> None:
    """Write `plan.written` in a dtype into one safetensors file, with one chunk in memory at a time."""
    entries = [plan.entries[name] for name in plan.written]
    todo = [part for parts in plan.written.values() for part in parts]
    total, done = sum(part.length for part in todo), 0
    what = "stacking experts"
    if checkpoint.adapter:
        what = "merging the adapter"
    elif plan.conversions():
        what = f"converting weights to {dtype}"
    with (folder / entries[0].file).open("xb") as writer:  # x: never through a link into the source
        writer.write(safetensors_header(entries))
        for source in todo:
            adapter, element = checkpoint.adapter, 0
            if adapter is not None and source.name not in adapter.matrices:
                adapter = None
            for values in _values(checkpoint, source):
                check_finite(source.name, values, {})
                exact = values
                if adapter is not None:
                    exact = values.double() + adapter.added(source, element, len(values))
                    element += len(values)
                converted = exact.to(DTYPES[dtype].torch)
                if not torch.isfinite(converted).all():
                    raise ExportError(
                        f"tensor {source.name} has values beyond {dtype}'s largest number "
                        f"({torch.finfo(DTYPES[dtype].torch).max:g}); choose another --dtype"
                    )
                if (
                    lossless
                    and adapter is None
                    and not torch.equal(converted.to(values.dtype), values)
                ):
                    raise ExportError(_would_lose(checkpoint, source, dtype))
                writer.write(converted.view(torch.uint8).numpy().data)
                done += values.nbytes
                progress(what, done, total)


def _would_lose(checkpoint: Checkpoint, source: TensorEntry, dtype: str) -> str:
    """What to do about a tensor that a dtype would round, which the user did not name."""
    wide = BY_SAFETENSORS[source.dtype].name
    lost = f"tensor {source.name} is {wide} and would lose precision in {dtype}"
    if checkpoint.config.quantization is not None:
        return f"{lost}, the dtype of the quantized weights' scales: --dtype {dtype} rounds it"
    alike = all(entry.dtype == source.dtype for entry in checkpoint.tensors.values())
    return (
        f"{lost}, which config.json says: --dtype {dtype} rounds it, --dtype {wide if alike else 'fp32'} keeps every "
        "value"
    )


def _check_values(
    checkpoint: Checkpoint,
    some: Sequence[TensorEntry],
    entries: Mapping[str, TensorEntry],
    progress: Progress,
) -> None:
    """Raises ExportError: a value of `some` is NaN or infinite, or a scale makes such values."""
    total, done = sum(entry.length for entry in some), 0
    for entry in some:
        for values in _values(checkpoint, entry):
            check_finite(entry.name, values, entries)
            done += values.nbytes
            progress("checking values", done, total)


def _values(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[torch.Tensor]:
    """A tensor's values in file order, one chunk at a time."""
    dtype = torch.float8_e4m3fn if entry.dtype == FP8 else BY_SAFETENSORS[entry.dtype].torch
    for chunk in chunks(checkpoint.path, entry):
        yield torch.frombuffer(bytearray(chunk), dtype=dtype)
