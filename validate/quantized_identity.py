"""Compares every quantized weight of a package with the checkpoint's, value by value, by a second implementation.

What model.onnx points at is dequantized by ONNX's definition, the checkpoint's tensors by the oracle's code; every bit
must agree. Memory holds a few rows of one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from qwenport.contract import BY_SAFETENSORS, Progress
from qwenport.exporter import CODES, SCALES, ZEROS, Checkpoint, TensorEntry, quantized_weights
from qwenport.validate.errors import ValidationError
from qwenport.validate.model_file import is_inside, place_of
from qwenport.validate.reference.quantized import Quantization, read_quantization

WEIGHT = ".weight"
ROWS = 1024
_BITS: dict[int, int] = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.UINT8: 8}
_FLOATS = {int(dtype.ir): dtype for dtype in BY_SAFETENSORS.values()}
_TORCH = {"I32": torch.int32, **{name: dtype.torch for name, dtype in BY_SAFETENSORS.items()}}


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
    for done, (weight, (_, shape)) in enumerate(weights.items(), 1):
        parts = {part: f"{weight}.{part}" for part in (CODES, SCALES, ZEROS)}
        stored = [n for n in quantization.tensors(weight, shape) if n in checkpoint.tensors]
        found.tensors.update(dict.fromkeys(parts.values(), tuple(stored)))
        missing = [name for name in parts.values() if name not in initializers]
        if missing:
            continue  # its tensors count as unused
        try:
            read = {part: _Part(initializers[name], package) for part, name in parts.items()}
            count = _differing(read, quantization, checkpoint, weight, shape)
            if count:
                found.wrong[parts[CODES]] = f"{count} of {shape[0] * shape[1]} values differ"
        except (ValueError, ValidationError) as error:
            found.wrong[parts[CODES]] = str(error)
        progress("comparing quantized weights", done, len(weights))
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
        if len(self.shape) != 2 or (self.bits is None and self.dtype is None) or place is None:
            raise ValueError(f"{tensor.name} is no matrix of codes or scales in a file")
        if not is_inside(package, place.location):
            raise ValueError(f"{tensor.name} lies outside the package, in {place.location}")
        self._file, self._offset = package / place.location, place.offset
        values = self.shape[0] * self.shape[1]
        size = -(-values * self.bits // 8) if self.bits else values * self._itemsize
        if not self._file.is_file() or self._offset + size > self._file.stat().st_size:
            raise ValueError(f"{tensor.name} reaches past the end of {place.location}")

    @property
    def _itemsize(self) -> int:
        return 1 if self.dtype is None else self.dtype.itemsize

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1: codes as int16, scales in their dtype."""
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        if self.bits != 4:
            data = self._read(first * self._itemsize, last * self._itemsize)
            values = torch.from_numpy(data)
            if self.dtype is not None:
                values = values.view(self.dtype.torch)
            return (values.to(torch.int16) if self.dtype is None else values).view(-1, columns)
        data = self._read(first // 2, -(-last // 2))
        halves = np.stack([data & 15, data >> 4], axis=1).reshape(-1)[first % 2 :]
        return torch.from_numpy(halves[: last - first].astype(np.int16)).view(-1, columns)

    def _read(self, begin: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        with self._file.open("rb") as stream:
            stream.seek(self._offset + begin)
            return np.frombuffer(bytearray(stream.read(end - begin)), np.uint8)


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
    codes, scales, zeros = parts[CODES], parts[SCALES], parts[ZEROS]
    blocks = scales.shape[1]
    if (
        codes.shape != shape
        or scales.shape[0] != shape[0]
        or zeros.shape != scales.shape
        or zeros.bits != codes.bits
        or blocks == 0
        or shape[1] % blocks
    ):
        raise ValueError(f"its parts make no weight of shape {list(shape)}")
    read, count = reader_of(checkpoint, weight, shape), 0
    for start in range(0, shape[0], ROWS):
        stop = min(start + ROWS, shape[0])
        wanted = quantization.rows(weight, shape, start, stop, read)
        steps = codes.rows(start, stop).view(stop - start, blocks, -1)
        steps = steps - zeros.rows(start, stop)[:, :, None]
        scale = scales.rows(start, stop)
        made = (steps.to(scale.dtype) * scale[:, :, None]).flatten(1)
        if made.dtype != wanted.dtype:
            raise ValueError(f"is {made.dtype}, the checkpoint's is {wanted.dtype}")
        bits = {2: torch.int16, 4: torch.int32}[made.element_size()]
        count += int((made.view(bits) != wanted.contiguous().view(bits)).sum())
    return count


def reader_of(
    checkpoint: Checkpoint, weight: str, shape: tuple[int, int]
) -> Callable[[str, int, int], torch.Tensor]:
    """Reads rows of the checkpoint's tensors; those of a weight's shape, which the exporter compared, are given."""

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        if name not in checkpoint.tensors:
            return torch.tensor(shape)
        entry = checkpoint.tensors[name]
        return rows_of(checkpoint.path, entry, start, stop)

    return read


def rows_of(path: Path, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop-1 of a tensor of the directory `path`, as stored."""
    size = entry.length // max(entry.shape[0], 1)
    stop = min(stop, entry.shape[0])
    with (path / entry.file).open("rb") as stream:
        stream.seek(entry.offset + start * size)
        data = bytearray(stream.read((stop - start) * size))
    return torch.frombuffer(data, dtype=_TORCH[entry.dtype]).view(stop - start, *entry.shape[1:])
