"""Codes in 32-bit words, as several formats pack them, and in bytes, as ONNX does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenport.exporter.quantization.storage import (
    SCALES,
    ZEROS,
    Middle,
    Part,
    Repacked,
    Shape,
    Storage,
)
from qwenport.exporter.safetensors_file import TensorEntry

WORD = 32  # bits
TILE = 128

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]


def words_of(data: bytes, columns: int) -> Words:
    """A tensor of 32-bit integers as words, [rows, columns]."""
    return np.frombuffer(data, np.dtype("<u4")).reshape(-1, columns)


def unpacked(words: Words, bits: int) -> Codes:
    """The codes of words [rows, columns], [rows, columns * 32 / bits]; a word has its first code in its lowest bits."""
    codes = words.astype("<u4", copy=False).view(np.uint8)
    return codes if bits == 8 else halves(codes)


def halves(octets: Codes) -> Codes:
    """The codes of 4 bits in bytes [rows, columns], [rows, 2 * columns]; the first is the low half."""
    codes = np.empty((*octets.shape, 2), np.uint8)
    np.bitwise_and(octets, 15, out=codes[..., 0])
    np.right_shift(octets, 4, out=codes[..., 1])
    return codes.reshape(len(octets), -1)


def packed(codes: Codes, bits: int) -> bytes:
    """Codes as ONNX stores them: in row-major order, those of 4 bits in pairs, the first in the low half."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.tobytes()
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | flat[1::2] << 4).tobytes()


def transposed(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous transpose, in tiles that the processor's cache holds: several times faster than in one go."""
    rows, columns = matrix.shape
    made = np.empty((columns, rows), matrix.dtype)
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            tile = np.s_[top : top + TILE, left : left + TILE]
            made[tile[::-1]] = matrix[tile].T
    return made


def transposed_scales(data: bytes, shape: tuple[int, ...]) -> bytes:
    """Scales [N, blocks], of `shape`, from the bytes of a tensor [blocks, N] of any type."""
    rows, blocks = shape
    size = len(data) // (rows * blocks)
    stored = np.frombuffer(data, np.dtype(f"<u{size}")).reshape(blocks, rows)
    return transposed(stored).tobytes()


def scales_and_zeros(
    storage: Storage,
    scales: TensorEntry,
    zeros: TensorEntry,
    rows: int,
    zero_points: Callable[[bytes, Shape], bytes],
) -> dict[str, Part]:
    """SCALES and ZEROS of a weight whose scales are [blocks, N] and whose zero points are packed in words.

    Args:
        storage: how the weight is stored.
        scales, zeros: the checkpoint's tensors.
        rows: N.
        zero_points: the zero points' bytes, and [N, blocks] -> those of ONNX.
    """
    shape = rows, scales.shape[0]
    return {
        SCALES: Repacked(
            scales.dtype, shape, (scales,), lambda read: transposed_scales(read[0], shape)
        ),
        ZEROS: Middle(storage.code_dtype, shape)
        if storage.symmetric
        else Repacked(
            storage.code_dtype, shape, (zeros,), lambda read: zero_points(read[0], shape)
        ),
    }
