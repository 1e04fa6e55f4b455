"""Weights in a package: referenced where they lie, copied whole, or converted one tensor at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from qwenport.exporter.checkpoint import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    DTYPE_NAMES,
    Checkpoint,
    TensorEntry,
    expert_stacks,
    stacked_shape,
)
from qwenport.exporter.errors import ExportError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""

FOLDER = "weights"
CONVERTED = "model.safetensors"
PACKED = "experts-packed.safetensors"

_SAFETENSORS = {name: key for key, name in DTYPE_NAMES.items()}
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_IR = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
_FICLONE = 0x40049409  # linux/fs.h: share the extents of a file, copy on write


@dataclass(frozen=True)
class WeightPlan:
    """Where a package's tensors will be, and what they consist of.

    Attributes:
        mode: "link", "copy", "pack" or "convert", as the manifest says it.
        entries: tensor -> its place in the package, `file` below weights/.
        written: of those, the tensors in the file of the package's own -> the checkpoint's tensors that each
            consists of, one after the other. All others lie in the checkpoint's files.
    """

    mode: str
    entries: dict[str, TensorEntry]
    written: dict[str, list[TensorEntry]]


def plan_weights(checkpoint: Checkpoint, dtype: str, mode: str) -> WeightPlan:
    """Lay out a package's weights; nothing is read or written.

    Args:
        checkpoint: the source.
        dtype: dtype that the package's tensors are to have. Another than the checkpoint's converts them all.
        mode: "link" (by reference, no bytes written), "copy", or "pack" (link, and write the stacks of single
            experts).

    Raises:
        ExportError: there is nothing to pack.
    """
    parts = expert_stacks(checkpoint)
    stacks = {name: [checkpoint.tensors[part] for part in parts[name]] for name in parts}
    if mode == "pack" and not stacks:
        raise ExportError(
            "--weights pack: the checkpoint has no experts one by one that could be stacked; "
            "use --weights link or copy"
        )
    if mode == "pack" and any(file.name == PACKED for file in checkpoint.files):
        raise ExportError(f"--weights pack would write {PACKED}, which is a file of the checkpoint")
    stacked = {part.name for parts in stacks.values() for part in parts}
    single = {name: entry for name, entry in checkpoint.tensors.items() if name not in stacked}
    if dtype != checkpoint.dtype:
        written = {**stacks, **{name: [entry] for name, entry in single.items()}}
        return WeightPlan("convert", _laid_out(checkpoint, CONVERTED, dtype, written), written)
    if mode == "pack":
        entries = single | _laid_out(checkpoint, PACKED, dtype, stacks)
        return WeightPlan(mode, entries, stacks)
    return WeightPlan(mode, checkpoint.tensors, {})


def place_weights(
    checkpoint: Checkpoint, package: Path, dtype: str, mode: str, progress: Progress
) -> WeightPlan:
    """Put the checkpoint's weights under `package`/weights as `plan_weights` has it, and return the plan.

    Args:
        checkpoint: the source; never written to.
        package: directory being written.
        dtype, mode: see `plan_weights`.
        progress: told of bytes done.

    Raises:
        ExportError: links are not possible there, a value does not fit `dtype`, the disk is too small.
    """
    folder = package / FOLDER
    folder.mkdir()
    plan = plan_weights(checkpoint, dtype, mode)
    if plan.mode != "convert":
        _place_files(checkpoint, folder, plan.mode, progress)
    if plan.written:
        _write(checkpoint, folder, dtype, plan, progress)
    return plan


def _place_files(checkpoint: Checkpoint, folder: Path, mode: str, progress: Progress) -> None:
    total = sum(file.size for file in checkpoint.files)
    if mode == "copy":
        _require_space(folder, total)
    done = 0
    for file in checkpoint.files:
        target = folder / file.name
        if mode == "copy":
            for count in _copy(file.path, target):
                done += count
                progress("copying weights", done, total)
        else:
            _link(file.path, target)


def _laid_out(
    checkpoint: Checkpoint, file: str, dtype: str, written: dict[str, list[TensorEntry]]
) -> dict[str, TensorEntry]:
    shapes = {name: stacked_shape(checkpoint, name, parts) for name, parts in written.items()}
    return plan_safetensors(file, _SAFETENSORS[dtype], shapes)


def external_tensor(name: str, location: str, entry: TensorEntry) -> ir.ExternalTensor:
    """The ONNX tensor of a safetensors entry: a location in the package, an offset and a length."""
    return ir.ExternalTensor(
        location,
        entry.offset,
        entry.length,
        _IR[DTYPE_NAMES[entry.dtype]],
        shape=ir.Shape(entry.shape),
        name=name,
    )


def _link(source: Path, target: Path) -> None:
    """Reflink where the file system can, else hard link: onnxruntime refuses symbolic links."""
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
    except ImportError:  # not a Unix: no reflinks
        return False
    with source.open("rb") as original, target.open("wb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
            return True
        except OSError:  # the file system has none: the caller hard-links
            pass
    target.unlink()
    return False


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"not enough disk space for the weights: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
        )


def _copy(source: Path, target: Path) -> Iterable[int]:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            writer.write(chunk)
            yield len(chunk)


def _write(
    checkpoint: Checkpoint, folder: Path, dtype: str, plan: WeightPlan, progress: Progress
) -> None:
    """Write `plan.written` in a dtype into one safetensors file, a chunk in memory at a time."""
    entries = [plan.entries[name] for name in plan.written]
    _require_space(folder, sum(entry.length for entry in entries))
    todo = [part for parts in plan.written.values() for part in parts]
    total, done = sum(part.length for part in todo), 0
    what = f"converting weights to {dtype}" if plan.mode == "convert" else "stacking experts"
    with (folder / entries[0].file).open("xb") as writer:  # x: never through a link into the source
        writer.write(safetensors_header(entries))
        for source in todo:
            with (checkpoint.path / source.file).open("rb") as reader:
                reader.seek(source.offset)
                for start in range(0, source.length, CHUNK_BYTES):
                    chunk = bytearray(reader.read(min(CHUNK_BYTES, source.length - start)))
                    values = torch.frombuffer(chunk, dtype=_TORCH[DTYPE_NAMES[source.dtype]])
                    converted = values.to(_TORCH[dtype])
                    if not torch.equal(values.isfinite(), converted.isfinite()):
                        raise ExportError(
                            f"tensor {source.name} has values beyond {dtype}'s largest number "
                            f"({torch.finfo(_TORCH[dtype]).max:g}); choose another --dtype"
                        )
                    writer.write(converted.view(torch.uint8).numpy().data)
                    done += len(chunk)
                    progress(what, done, total)


def plan_safetensors(
    file: str, dtype: str, shapes: dict[str, tuple[int, ...]]
) -> dict[str, TensorEntry]:
    """Lay tensors of one dtype out in a safetensors file of that name."""
    sizes = dict.fromkeys(shapes, DTYPE_BYTES[dtype])
    for name, shape in shapes.items():
        for size in shape:
            sizes[name] *= size
    header = safetensors_header(
        [TensorEntry(name, file, dtype, shape, 0, sizes[name]) for name, shape in shapes.items()]
    )
    offset, entries = len(header), {}
    for name, shape in shapes.items():
        entries[name] = TensorEntry(name, file, dtype, shape, offset, sizes[name])
        offset += sizes[name]
    return entries


def safetensors_header(entries: Iterable[TensorEntry]) -> bytes:
    """The 8-byte length and JSON header of a file that holds these tensors in this order."""
    header, begin = {}, 0
    for entry in entries:
        end = begin + entry.length
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned
    return len(text).to_bytes(8, "little") + text
