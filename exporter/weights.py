"""Weights in a package: referenced where they lie, copied whole, or converted one tensor at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir
import torch

from qwenport.exporter.checkpoint import (
    DOWN,
    DTYPE_BYTES,
    DTYPE_NAMES,
    GATE_UP,
    Checkpoint,
    TensorEntry,
    expert_parts,
)
from qwenport.exporter.errors import ExportError

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""

FOLDER = "weights"
PACKED = "experts-packed.safetensors"
CHUNK_BYTES = 1 << 24

_SAFETENSORS = {name: key for key, name in DTYPE_NAMES.items()}
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_IR = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
_FICLONE = 0x40049409  # linux/fs.h: share the extents of a file, copy on write


def place_weights(
    checkpoint: Checkpoint, package: Path, dtype: str, mode: str, progress: Progress
) -> dict[str, TensorEntry]:
    """Put the checkpoint's weights under `package`/weights and return where each tensor is.

    Args:
        checkpoint: the source; never written to.
        package: directory being written.
        dtype: dtype that the package's tensors are to have.
        mode: "link" (by reference, no bytes written), "copy", or "pack" (link, and write the stacks of single
            experts). A dtype change always writes everything, stacked.
        progress: told of bytes done.

    Raises:
        ExportError: links are not possible there, a value does not fit `dtype`, the disk is too small.
    """
    folder = package / FOLDER
    folder.mkdir()
    stacks = _stacks(checkpoint)
    if mode == "pack" and not stacks:
        raise ExportError(
            "--weights pack: the checkpoint has no experts one by one that could be stacked; "
            "use --weights link or copy"
        )
    if mode == "pack" and any(file.name == PACKED for file in checkpoint.files):
        raise ExportError(f"--weights pack would write {PACKED}, which is a file of the checkpoint")
    if dtype != checkpoint.dtype:
        return _write(checkpoint, folder / "model.safetensors", dtype, stacks, progress)
    if mode == "copy":
        _require_space(folder, sum(file.size for file in checkpoint.files))
    total = sum(file.size for file in checkpoint.files)
    done = 0
    for file in checkpoint.files:
        target = folder / file.name
        if mode == "copy":
            for count in _copy(file.path, target):
                done += count
                progress("copying weights", done, total)
        else:
            _link(file.path, target)
    if mode != "pack":
        return checkpoint.tensors
    packed = {part for parts in stacks.values() for part in parts}
    return {
        **{name: entry for name, entry in checkpoint.tensors.items() if name not in packed},
        **_write(checkpoint, folder / PACKED, dtype, stacks, progress, stacks_only=True),
    }


def _stacks(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Stacked tensor -> the checkpoint's tensors that it consists of, in order."""
    moe, stacks = checkpoint.config.moe, {}
    for layer in () if moe is None else moe.layers:
        for kind in (GATE_UP, DOWN):
            name = f"model.layers.{layer}.mlp.{kind}"
            if moe is not None and name not in checkpoint.tensors:
                stacks[name] = expert_parts(name, moe.num_experts)
    return stacks


def external_tensor(name: str, entry: TensorEntry) -> ir.ExternalTensor:
    """The ONNX tensor of a safetensors entry in a package: a location, an offset and a length."""
    return ir.ExternalTensor(
        f"{FOLDER}/{entry.file}",
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
    checkpoint: Checkpoint,
    target: Path,
    dtype: str,
    stacks: dict[str, list[str]],
    progress: Progress,
    stacks_only: bool = False,
) -> dict[str, TensorEntry]:
    """Write tensors in a dtype into one safetensors file, a chunk in memory at a time.

    Args:
        checkpoint: the source.
        target: the file to write.
        dtype: of what is written.
        stacks: tensors to write that consist of several of the source's, one after the other.
        progress: told of bytes done.
        stacks_only: leave out what is in no stack.
    """
    sources = {name: [checkpoint.tensors[part] for part in parts] for name, parts in stacks.items()}
    stacked = {part for parts in stacks.values() for part in parts}
    if not stacks_only:
        sources |= {n: [entry] for n, entry in checkpoint.tensors.items() if n not in stacked}
    entries = plan_safetensors(
        target.name,
        _SAFETENSORS[dtype],
        {name: _stacked_shape(checkpoint, name, parts) for name, parts in sources.items()},
    )
    _require_space(target.parent, sum(entry.length for entry in entries.values()))
    todo = [part for parts in sources.values() for part in parts]
    total, done = sum(part.length for part in todo), 0
    what = f"converting weights to {dtype}" if dtype != checkpoint.dtype else "stacking experts"
    with target.open("xb") as writer:  # x: never through a link into the checkpoint
        writer.write(safetensors_header(entries.values()))
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
    return entries


def _stacked_shape(checkpoint: Checkpoint, name: str, parts: list[TensorEntry]) -> tuple[int, ...]:
    if len(parts) == 1 and parts[0].name == name:
        return parts[0].shape
    moe = checkpoint.config.moe
    assert moe is not None, name
    rows, columns = parts[0].shape
    return (moe.num_experts, rows * len(parts) // moe.num_experts, columns)


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
