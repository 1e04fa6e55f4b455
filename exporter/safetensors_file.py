"""safetensors files, by their HEADERS only: read, checked against the file, and laid out for writing.

A safetensors file is 8 bytes of header length, a JSON header, then raw row-major bytes, so every tensor's location is
known without reading a weight. Whatever the safetensors library refuses is refused here too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwenport.contract import BY_SAFETENSORS, CODE_BYTES
from qwenport.exporter.errors import CheckpointError
from qwenport.exporter.keys import short
from qwenport.wording import cut

CHUNK_BYTES = 1 << 24
"""Bytes of weights in memory at a time."""
MOST_HEADER_BYTES = 1 << 23  # a published shard has at most a few thousand tensors
MOST_TENSORS = 1 << 16
_BYTES = {**{name: dtype.itemsize for name, dtype in BY_SAFETENSORS.items()}, **CODE_BYTES}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's location.

    Attributes:
        name: the tensor's.
        file: name of the file that holds it.
        dtype, shape: as in the header; the dtype is "BF16", for example.
        offset: from the start of the file, in bytes.
        length: bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: its name in the checkpoint, its real path, its size and its header's hash."""

    name: str
    path: Path
    size: int
    header_sha256: str


def read_safetensors_header(file: Path) -> tuple[WeightFile, list[TensorEntry]]:
    """Read one safetensors header and check that it accounts for the whole file.

    Raises:
        CheckpointError: the file is truncated or corrupt, or holds a dtype that no supported model has.
    """
    real = Path(os.path.realpath(file))  # a Hugging Face cache holds symbolic links
    try:
        size = real.stat().st_size
        with real.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file}: not a safetensors file, or truncated inside its header"
                )
            if length > MOST_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: a header of {length} bytes; no checkpoint needs more than {MOST_HEADER_BYTES}"
                )
            header_bytes = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    header = _parse(file, header_bytes)
    if len(header) > MOST_TENSORS:
        raise CheckpointError(
            f"{file}: {len(header)} tensors; no checkpoint has more than {MOST_TENSORS} in a file"
        )
    entries = [_entry(file, name, fields, 8 + length) for name, fields in header.items()]
    end = 8 + length
    for entry in sorted(entries, key=lambda e: (e.offset, e.length)):
        if entry.offset != end:
            raise CheckpointError(
                f"{file}: corrupt safetensors header (a gap or overlap at {entry.name})"
            )
        end += entry.length
    if end != size:
        raise CheckpointError(
            f"{file}: truncated or corrupt: the header describes {end} bytes, the file has {size}"
        )
    _ask_library(file, real)
    digest = hashlib.sha256(prefix + header_bytes).hexdigest()
    return WeightFile(file.name, real, size, digest), entries


def _ask_library(file: Path, real: Path) -> None:
    """Refuse what the library refuses for reasons of its own; it reads no weight."""
    try:
        with safe_open(real, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: corrupt safetensors header ({error})") from error


def _parse(file: Path, header_bytes: bytes) -> dict[str, Any]:
    """The header's tensors: name -> fields. Accepts the JSON that the safetensors library accepts, and no more."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is given twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        if not header_bytes.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        header = json.loads(
            header_bytes.decode("utf-8"),
            object_pairs_hook=without_duplicates,
            parse_constant=refuse,
        )
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ is not a map of strings")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: corrupt safetensors header ({error})") from error
    found: dict[str, Any] = header
    return found


def _entry(file: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict):
        fields = {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise CheckpointError(
            f"{file}: corrupt safetensors header (no dtype, shape or offsets of {cut(name)})"
        )
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        raise CheckpointError(
            f"{file}: corrupt safetensors header (the shape or offsets of {cut(name)} are not natural numbers)"
        )
    begin, end = offsets
    if dtype not in _BYTES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {short(dtype)}; supported: {', '.join(BY_SAFETENSORS)}; "
            "convert it first, by loading and saving the model with transformers"
        )
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise CheckpointError(
            f"{file}: corrupt safetensors header: {name} does not fill its byte range"
        )
    return TensorEntry(name, file.name, dtype, tuple(shape), data_start + begin, end - begin)


def plan_safetensors(
    file: str,
    dtype: str | Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    alignment: int = 8,
) -> dict[str, TensorEntry]:
    """Lay out tensors in a safetensors file of that name, in the order of `shapes`.

    Args:
        file: its name.
        dtype: the dtype of all tensors as in the header, or tensor -> dtype.
        shapes: tensor -> shape.
        alignment: the first tensor lies at a multiple of it.
    """
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else dtype
    sizes = {name: math.prod(shape) * _BYTES[dtypes[name]] for name, shape in shapes.items()}
    places = [TensorEntry(n, file, dtypes[n], shape, 0, sizes[n]) for n, shape in shapes.items()]
    offset, entries = len(safetensors_header(places, alignment=alignment)), {}
    for place in places:
        entries[place.name] = replace(place, offset=offset)
        offset += place.length
    return entries


def safetensors_header(entries: Iterable[TensorEntry], *, alignment: int = 8) -> bytes:
    """The 8-byte length and JSON header of a file with these tensors in this order.

    Args:
        entries: the tensors.
        alignment: bytes to which the header, and so the first tensor, is aligned; a multiple of 8.
    """
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
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def chunks(path: Path, entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of a tensor of the directory `path`, CHUNK_BYTES at a time."""
    with (path / entry.file).open("rb") as stream:
        stream.seek(entry.offset)
        for start in range(0, entry.length, CHUNK_BYTES):
            yield stream.read(min(CHUNK_BYTES, entry.length - start))
