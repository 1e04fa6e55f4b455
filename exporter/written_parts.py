"""The parts of quantized weights that a package writes itself, into files of its own.

Repacked ones, where a checkpoint has no bytes that ONNX could read; and the zero points of symmetric weights, which
all are one number: all of these weights refer to the same bytes. Lowering goes by the name of that file and does not
read it, so it lies beside the manifest, which has its hash, and not among the weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from qwenport.contract import BY_SAFETENSORS, SYMMETRIC_ZEROS, Progress
from qwenport.exporter.checkpoint import Checkpoint
from qwenport.exporter.finite import check_finite
from qwenport.exporter.quantization import PERMUTATION, Middle, Part, Repacked
from qwenport.exporter.safetensors_file import (
    CHUNK_BYTES,
    TensorEntry,
    chunks,
    plan_safetensors,
    safetensors_header,
)

FOLDER = "weights"
FILE = "repacked.safetensors"
# Of the zero points: the byte that two codes of 4 bits make, or one of 8.
_MIDDLES = {"U4": 0x88, "U8": 0x80}


@dataclass(frozen=True)
class WrittenParts:
    """The plan of the files.

    Attributes:
        places: part of the graph -> its place, packed as ONNX does. Equal permutations have one place, and its name.
        repacked: tensor of FILE -> its place there, as bytes if it is packed; in the file's order.
        parts: the same -> how it is made.
        symmetric: tensor of SYMMETRIC_ZEROS, named after the codes' type -> its place there.
    """

    places: dict[str, TensorEntry]
    repacked: dict[str, TensorEntry]
    parts: dict[str, Repacked]
    symmetric: dict[str, TensorEntry]

    @property
    def length(self) -> int:
        """Bytes of all tensors."""
        return sum(e.length for e in (*self.repacked.values(), *self.symmetric.values()))


def plan_written_parts(parts: Mapping[str, Part]) -> WrittenParts:
    """Lay out the files.

    Args:
        parts: part of the graph -> what it is made of.
    """
    same = _same_permutations(parts)
    repacked = {
        name: part
        for name, part in parts.items()
        if isinstance(part, Repacked) and name not in same
    }
    file = plan_safetensors(
        FILE,
        {name: "U8" if part.dtype == "U4" else part.dtype for name, part in repacked.items()},
        {
            name: (_packed_bytes(part.shape),) if part.dtype == "U4" else part.shape
            for name, part in repacked.items()
        },
    )
    places = {
        name: TensorEntry(name, FILE, part.dtype, part.shape, file[name].offset, file[name].length)
        for name, part in repacked.items()
    }
    places |= {name: places[first] for name, first in same.items()}
    middles = {name: part for name, part in parts.items() if isinstance(part, Middle)}
    sizes: dict[str, int] = {}
    for middle in middles.values():
        sizes[middle.dtype] = max(_bytes(middle), sizes.get(middle.dtype, 0))
    symmetric = plan_safetensors(SYMMETRIC_ZEROS, "U8", {n: (size,) for n, size in sizes.items()})
    for name, middle in middles.items():
        offset = symmetric[middle.dtype].offset
        places[name] = TensorEntry(
            name, SYMMETRIC_ZEROS, middle.dtype, middle.shape, offset, _bytes(middle)
        )
    return WrittenParts(places, file, repacked, symmetric)


def write_parts(
    checkpoint: Checkpoint, package: Path, plan: WrittenParts, progress: Progress
) -> None:
    """Write the files into a package; in memory are one part and what it is made of.

    Raises:
        ExportError: a value is NaN or infinite, or a scale makes such values.
    """
    if plan.symmetric:
        with _begun(package / SYMMETRIC_ZEROS, plan.symmetric.values()) as writer:
            for dtype, entry in plan.symmetric.items():
                for start in range(0, entry.length, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, entry.length - start)
                    writer.write(bytes([_MIDDLES[dtype]]) * size)
    if not plan.repacked:
        return
    total, done = sum(entry.length for entry in plan.repacked.values()), 0
    with _begun(package / FOLDER / FILE, plan.repacked.values()) as writer:
        for name, entry in plan.repacked.items():
            part = plan.parts[name]
            read = [b"".join(chunks(checkpoint.path, source)) for source in part.sources]
            data = part.repack(read)
            assert len(data) == entry.length, name
            if entry.dtype in BY_SAFETENSORS:
                stored = BY_SAFETENSORS[entry.dtype].torch
                check_finite(name, torch.frombuffer(bytearray(data), dtype=stored), plan.places)
            writer.write(data)
            done += entry.length
            progress("repacking quantized weights", done, total)


def location_of(entry: TensorEntry) -> str:
    """A tensor's file as the graph names it, of an entry whose file lies in FOLDER unless it is SYMMETRIC_ZEROS."""
    return entry.file if entry.file == SYMMETRIC_ZEROS else f"{FOLDER}/{entry.file}"


def _same_permutations(parts: Mapping[str, Part]) -> dict[str, str]:
    """Permutation -> the first that is equal to it, of all but the first ones.

    Weights of one input mostly have the same: it is gathered once for all of them.
    """
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for name, part in parts.items():
        if name.endswith(f".{PERMUTATION}") and isinstance(part, Repacked):
            known = first.setdefault(hashlib.sha256(part.repack(())).digest(), name)
            if known != name:
                same[name] = known
    return same


def _begun(file: Path, entries: Iterable[TensorEntry]) -> BinaryIO:
    stream = file.open("xb")  # x: never through a link into the source
    stream.write(safetensors_header(entries))
    return stream


def _bytes(part: Middle) -> int:
    return _packed_bytes(part.shape) if part.dtype == "U4" else math.prod(part.shape)


def _packed_bytes(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // 2)
