"""Compares every quantized weight of a package with the checkpoint's, value by value, by a second implementation.

What model.onnx points at is dequantized by ONNX's definition, the checkpoint's tensors by the oracle's code; every bit
must agree. Memory holds a few rows of one weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from qwenport.contract import BY_SAFETENSORS, FP8, Progress
from qwenport.exporter import (
    CODES,
    INPUT_SCALE,
    SCALES,
    WHOLE,
    ZEROS,
    Checkpoint,
    part_name,
    quantized_weights,
)
from qwenport.validate.errors import ValidationError
from qwenport.validate.model_file import is_inside, place_of
from qwenport.validate.reference.dequantization import Quantization, read_quantization

WEIGHT = ".weight"
ROWS = 1024
_BITS: dict[int, int] = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.UINT8: 8}
_FLOATS = {
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    **{int(dtype.ir): dtype.torch for dtype in BY_SAFETENSORS.values()},
}
_TORCH = {
    "I32": torch.int32,
    FP8: torch.float8_e4m3fn,
    **{name: dtype.torch for name, dtype in BY_SAFETENSORS.items()},
}

Rows = Callable[[int, int], torch.Tensor]
"""(start, stop) -> rows start..stop-1 of a weight."""


@dataclass(frozen=True)
class QuantizedWeights:
    """What was found.

    Attributes:
        wrong: tensor of the graph -> how it differs.
        tensors: tensor of the graph -> the checkpoint's tensors that it is part of.
    """

    wrong: dict[str, str]
    tensors: dict[str, tuple[str, ...]]


def compare_quantized(
    model: onnx.ModelProto, package: Path, checkpoint: Checkpoint, progress: Progress
) -> QuantizedWeights:
    """Compare every quantized weight of a package with the checkpoint.

    Args:
        model: the package's model.onnx.
        package: its directory. Locations outside it are not read: such weights count as differing.
        checkpoint: the checkpoint that the package claims as its source.
        progress: called with (what, weights done, weights in all).
    """
    weights = quantized_weights(checkpoint.config)
    found = QuantizedWeights({}, {})
    quantization = read_quantization(checkpoint.path) if weights else None
    if quantization is None:
        return found
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for done, (weight, (storage, shape)) in enumerate(weights.items(), 1):
        parts = {
            part: part_name(weight, part) for part in storage.part_names if part != INPUT_SCALE
        }
        scale = f"{weight.removesuffix(WEIGHT)}.{INPUT_SCALE}"
        held = quantization.tensors(weight, shape, checkpoint.tensors)
        stored = [name for name in held if name in checkpoint.tensors and name != scale]
        found.tensors.update(dict.fromkeys(parts.values(), tuple(stored)))
        if INPUT_SCALE in storage.part_names:
            for name in _equal_scales(initializers, package, checkpoint, weight, scale):
                found.tensors[name] = (*found.tensors.get(name, ()), scale)
        missing = [name for name in parts.values() if name not in initializers]
        if missing:
            continue  # its tensors count as unused
        first = next(iter(parts.values()))
        try:
            read = {part: _Part(initializers[name], package) for part, name in parts.items()}
            count = _differing(read, quantization, checkpoint, weight, shape)
            if count:
                found.wrong[first] = f"{count} of {shape[0] * shape[1]} values differ"
        except (ValueError, ValidationError) as error:
            found.wrong[first] = str(error)
        progress("comparing quantized weights", done, len(weights))
    return found


def _equal_scales(
    initializers: Mapping[str, onnx.TensorProto],
    package: Path,
    checkpoint: Checkpoint,
    weight: str,
    scale: str,
) -> list[str]:
    """Tensors of the graph that have the value of an input scale: its own, or another linear's of its module."""
    module = weight.removesuffix(WEIGHT).rpartition(".")[0]
    wanted = _Stored(checkpoint, weight, (1, 1)).rows(scale, 0, 1).reshape(1)
    found = []
    for name, tensor in initializers.items():
        if not name.startswith(f"{module}.") or not name.endswith(f"{WEIGHT}.{INPUT_SCALE}"):
            continue
        with contextlib.suppress(ValueError):  # no such tensor: the checkpoint's counts as unused
            made = _Part(tensor, package).values()
            if made.dtype == wanted.dtype and torch.equal(made, wanted):
                found.append(name)
    return found


class _Part:
    """Codes, scales or zero points of a package: their shape, and their values a few rows at a time."""

    def __init__(self, tensor: onnx.TensorProto, package: Path) -> None:
        """Look at the place, without reading it.

        Raises:
            ValueError: it has no place in the package, or is no such tensor; says why.
        """
        self.shape = tuple(tensor.dims)
        self.bits = _BITS.get(tensor.data_type)
        self.dtype = _FLOATS.get(tensor.data_type)
        place = place_of(tensor)
        if len(self.shape) > 2 or (self.bits is None and self.dtype is None) or place is None:
            raise ValueError(f"{tensor.name} is no matrix of codes or scales in a file")
        if not is_inside(package, place.location):
            raise ValueError(f"{tensor.name} lies outside the package, in {place.location}")
        self._file, self._offset = package / place.location, place.offset
        values = math.prod(self.shape)
        size = -(-values * self.bits // 8) if self.bits else values * self._itemsize
        if not self._file.is_file() or self._offset + size > self._file.stat().st_size:
            raise ValueError(f"{tensor.name} reaches past the end of {place.location}")

    @property
    def _itemsize(self) -> int:
        return 1 if self.dtype is None else self.dtype.itemsize

    def values(self) -> torch.Tensor:
        """All values of floats, in their dtype, [count]."""
        assert self.dtype is not None
        data = self._read(0, math.prod(self.shape) * self._itemsize)
        return torch.from_numpy(data).view(self.dtype)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1 of a matrix: integer codes as int16, floats in their dtype."""
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        if self.bits != 4:
            data = self._read(first * self._itemsize, last * self._itemsize)
            values = torch.from_numpy(data)
            if self.dtype is not None:
                values = values.view(self.dtype)
            return (values.to(torch.int16) if self.dtype is None else values).view(-1, columns)
        data = self._read(first // 2, -(-last // 2))
        halves = np.stack([data & 15, data >> 4], axis=1).reshape(-1)[first % 2 :]
        return torch.from_numpy(halves[: last - first].astype(np.int16)).view(-1, columns)

    def _read(self, begin: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        with self._file.open("rb") as stream:
            stream.seek(self._offset + begin)
            return np.frombuffer(bytearray(stream.read(end - begin)), np.uint8)


def _of_integers(parts: Mapping[str, _Part], shape: tuple[int, int]) -> Rows:
    codes, scales, zeros = parts[CODES], parts[SCALES], parts[ZEROS]
    blocks = scales.shape[1] if len(scales.shape) == 2 else 0
    if (
        codes.shape != shape
        or scales.shape[0] != shape[0]
        or zeros.shape != scales.shape
        or zeros.bits != codes.bits
        or blocks == 0
        or shape[1] % blocks
    ):
        raise ValueError(f"its parts make no weight of shape {list(shape)}")

    def made(start: int, stop: int) -> torch.Tensor:
        steps = codes.rows(start, stop).view(stop - start, blocks, -1)
        steps = steps - zeros.rows(start, stop)[:, :, None]
        scale = scales.rows(start, stop)
        return (steps.to(scale.dtype) * scale[:, :, None]).flatten(1)

    return made


def _of_float8(parts: Mapping[str, _Part], shape: tuple[int, int]) -> Rows:
    codes, scales = parts[CODES], parts[SCALES]
    if codes.shape != shape or codes.dtype != torch.float8_e4m3fn or scales.dtype is None:
        raise ValueError(f"its parts make no weight of shape {list(shape)}")
    if scales.shape not in ((), (shape[0],)):
        raise ValueError(f"its scales have shape {list(scales.shape)}")
    values = scales.values().expand(shape[0])[:, None]
    return lambda start, stop: codes.rows(start, stop).to(values.dtype) * values[start:stop]


def _rows_of(parts: Mapping[str, _Part], shape: tuple[int, int]) -> Rows:
    """A function (start, stop) -> those rows of the weight that the parts make.

    Raises:
        ValueError: they do not make a weight of that shape.
    """
    if WHOLE in parts:
        whole = parts[WHOLE]
        if whole.shape != shape or whole.dtype is None:
            raise ValueError(f"is no weight of shape {list(shape)}")
        return whole.rows
    return _of_integers(parts, shape) if ZEROS in parts else _of_float8(parts, shape)


def _differing(
    parts: Mapping[str, _Part],
    quantization: Quantization,
    checkpoint: Checkpoint,
    weight: str,
    shape: tuple[int, int],
) -> int:
    """How many values of a weight differ in any bit.

    Raises:
        ValueError: the parts do not make a weight of that shape.
    """
    rows = _rows_of(parts, shape)
    stored, count = _Stored(checkpoint, weight, shape), 0
    for start in range(0, shape[0], ROWS):
        stop = min(start + ROWS, shape[0])
        wanted = quantization.rows(weight, shape, start, stop, stored)
        made = rows(start, stop)
        if made.dtype != wanted.dtype:
            raise ValueError(f"is {made.dtype}, the checkpoint's is {wanted.dtype}")
        bits = {2: torch.int16, 4: torch.int32}[made.element_size()]
        count += int((made.view(bits) != wanted.contiguous().view(bits)).sum())
    return count


class _Stored:
    """What a format reads of a checkpoint; tensors of a weight's shape, which the exporter compared, are given."""

    def __init__(self, checkpoint: Checkpoint, weight: str, shape: tuple[int, int]) -> None:
        self._checkpoint, self._shape = checkpoint, shape
        self.shapes = {
            name: entry.shape
            for name, entry in checkpoint.tensors.items()
            if name.startswith(weight.removesuffix("weight"))
        }

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self.shapes:
            return torch.tensor(self._shape)
        return self._copied(name, np.s_[start:stop])

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._copied(name, np.s_[:, start:stop])

    def _copied(self, name: str, where: Any) -> torch.Tensor:
        entry = self._checkpoint.tensors[name]
        dtype = _TORCH[entry.dtype]
        integers = np.dtype(f"<i{dtype.itemsize}")
        mapped = np.memmap(
            self._checkpoint.path / entry.file, integers, "r", entry.offset, entry.shape or (1,)
        )
        return torch.from_numpy(np.array(mapped[where])).view(dtype)
