"""Mistakes with pack-quantized weights, made in the exporter: published checkpoints, and what `export` quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized import write_pack_quantized

from qwenport.exporter import export, make_recipe, written_parts
from qwenport.exporter.quantization.pack_quantized import PackQuantized
from qwenport.exporter.quantization.storage import CODES, SCALES, ByReference, Repacked, Shape

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Change = Callable[[Bytes], Bytes]
"""Of a part's bytes, [N, bytes of a row]."""


def _own(source: Path, target: Path) -> Path:
    """What `export --quantize int4` writes."""
    package = export(source, target.with_name("package"), quantize=make_recipe("int4")).path
    return (package / "checkpoint").rename(target)


CHECKPOINTS: dict[str, Callable[[Path, Path], Path]] = {
    "packed": write_pack_quantized,
    "packed, asymmetric": lambda source, target: write_pack_quantized(
        source, target, symmetric=False
    ),
    "own": _own,
}


def _changed(part: str, change: Change, linears: Iterable[str] = ()) -> Any:
    """A part that refers to the checkpoint's bytes is written instead, with the bytes changed.

    Args:
        part: its name.
        change: of the bytes.
        linears: only those of these; none for all.
    """
    right = PackQuantized.parts

    def wrong(self: PackQuantized, linear: str, shape: Shape, *others: Any) -> dict[str, Any]:
        parts = right(self, linear, shape, *others)
        if linears and linear not in linears:
            return parts
        referred = parts[part]
        assert isinstance(referred, ByReference)
        entry = referred.entry
        source = replace(entry, dtype="U8", shape=(entry.length,))

        def repack(read: Any) -> bytes:
            rows = np.frombuffer(read[0], np.uint8).reshape(entry.shape[0], -1)
            return change(rows).tobytes()

        return parts | {part: Repacked(entry.dtype, entry.shape, (source,), repack)}

    return lambda patch: patch.setattr(PackQuantized, "parts", wrong)


def _halves_swapped(rows: Bytes) -> Bytes:
    return rows >> 4 | rows << 4


def _bytes_from_the_top(rows: Bytes) -> Bytes:
    """Words are read as big-endian."""
    return rows.reshape(len(rows), -1, 4)[:, :, ::-1]


def _words_along_rows(rows: Bytes) -> Bytes:
    """Words [N, K / 8] are taken for [K / 8, N], as GPTQ has them."""
    words = np.ascontiguousarray(rows).view(np.uint32)
    return np.ascontiguousarray(words.reshape(-1, len(rows)).T).view(np.uint8)


def _next_row(rows: Bytes) -> Bytes:
    return np.roll(rows, 1, 0)


def _next_group(rows: Bytes) -> Bytes:
    return np.roll(rows, 2, 1)


def _groups_transposed(rows: Bytes) -> Bytes:
    """Scales [N, groups] are taken for [groups, N]."""
    scales = np.ascontiguousarray(rows).view(np.uint16)
    return np.ascontiguousarray(scales.reshape(-1, len(rows)).T).view(np.uint8)


def _ones(rows: Bytes) -> Bytes:
    """Scales of 1, in fp16."""
    return np.ones((len(rows), rows.shape[1] // 2), np.float16).view(np.uint8)


def _zero_points(change: Callable[[Bytes], Bytes]) -> Any:
    """Zero points as they are written, each byte changed."""
    right = PackQuantized.zero_points

    def wrong(self: PackQuantized, data: bytes, shape: Shape) -> bytes:
        return change(np.frombuffer(right(self, data, shape), np.uint8)).tobytes()

    return lambda patch: patch.setattr(PackQuantized, "zero_points", wrong)


def _each_less_one(octets: Bytes) -> Bytes:
    return (octets & 15) - 1 & 15 | (octets >> 4) - 1 << 4


def _words_of_zero_points_not_transposed(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: PackQuantized, data: bytes, shape: Shape) -> bytes:
        return data[: shape[0] * shape[1] * self.bits // 8]

    patch.setattr(PackQuantized, "zero_points", wrong)


DEFECTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], Any]]] = {
    "packed: one code of a byte for the other": ("packed", _changed(CODES, _halves_swapped)),
    "packed: bytes of a word from the top": ("packed", _changed(CODES, _bytes_from_the_top)),
    "packed: words along the other axis": ("packed", _changed(CODES, _words_along_rows)),
    "packed: the next row's scales": ("packed", _changed(SCALES, _next_row)),
    "packed: the next group's scales": ("packed", _changed(SCALES, _next_group)),
    "packed: groups transposed": ("packed", _changed(SCALES, _groups_transposed)),
    "packed: zero points less one": ("packed, asymmetric", _zero_points(_each_less_one)),
    "packed: zero points not transposed": (
        "packed, asymmetric",
        _words_of_zero_points_not_transposed,
    ),
    "own: the head's codes of the next row": ("own", _changed(CODES, _next_row, [HEAD])),
    "own: the head's scales of the next row": ("own", _changed(SCALES, _next_row, [HEAD])),
    "own: the embedding's codes of the next row": ("own", _changed(CODES, _next_row, [EMBEDDING])),
    "own: the embedding's scales left out": ("own", _changed(SCALES, _ones, [EMBEDDING])),
    "own: the middle of 8 bits is 127": (
        "own",
        lambda patch: patch.setitem(written_parts._MIDDLES, "U8", 0x7F),
    ),
}
