"""Compares every quantized weight of a package with the checkpoint's, value by value, by a second implementation.

What model.onnx points at is dequantized by ONNX's definition, the checkpoint's tensors by the oracle's code; every bit
must agree, with the columns in the order in which the graph gives the activations. Memory holds a few rows of one
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from qwenport.contract import BY_SAFETENSORS, Progress
from qwenport.exporter import CODES, PERMUTATION, SCALES, ZEROS, Checkpoint, quantized_weights
from qwenport.validate.errors import ValidationError
from qwenport.validate.model_file import is_inside, place_of
from qwenport.validate.reference.dequantization import Quantization, read_quantization

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
    orders = _Orders(model, package)
    stored = _Stored(checkpoint)
    for done, (weight, (_, shape)) in enumerate(weights.items(), 1):
        parts = {part: f"{weight}.{part}" for part in (CODES, SCALES, ZEROS)}
        held = quantization.tensors(weight, shape, checkpoint.tensors)
        used = tuple(name for name in held if name in checkpoint.tensors)
        own = (*parts.values(), f"{weight}.{PERMUTATION}")
        found.tensors.update(dict.fromkeys(own, used))
        missing = [name for name in parts.values() if name not in initializers]
        if missing:
            continue  # its tensors count as unused
        try:
            read = {part: _Part(initializers[name], package) for part, name in parts.items()}
            order = orders.of(parts[CODES], shape[1])
            stored.weight_shape = shape
            count = _differing(read, order, quantization, stored, weight, shape)
            if count:
                found.wrong[parts[CODES]] = f"{count} of {shape[0] * shape[1]} values differ"
        except (ValueError, ValidationError) as error:
            found.wrong[parts[CODES]] = str(error)
        progress("comparing quantized weights", done, len(weights))
    return found


class _Orders:
    """The order of the columns of each quantized weight, as the products of a graph have it."""

    def __init__(self, model: onnx.ModelProto, package: Path) -> None:
        self._package = package
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._made_by = {name: node for node in model.graph.node for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def of(self, codes: str, columns: int) -> torch.Tensor | None:
        """The weight's column that each column of its codes is, [columns]; None if the inputs are not gathered.

        Raises:
            ValueError: its products have their inputs in several orders, or in none that is a permutation.
        """
        found = {
            self._gathered_by(product)
            for dequantized in self._users.get(codes, ())
            for transpose in self._users.get(dequantized.output[0], ())
            for product in self._users.get(transpose.output[0], ())
            if product.op_type == "MatMul"
        }
        if len(found) > 1:
            raise ValueError("its products have inputs in several orders")
        name = found.pop() if found else None
        if name is None:
            return None
        order = self._read(name)
        if not torch.equal(order.sort().values, torch.arange(columns)):
            raise ValueError(f"{name} is no permutation of {columns} columns")
        return order

    def _gathered_by(self, product: onnx.NodeProto) -> str | None:
        node = self._made_by.get(product.input[0])
        if node is None or node.op_type != "Gather" or node.input[1] not in self._tensors:
            return None
        axes = [a.i for a in node.attribute if a.name == "axis"]
        if axes != [-1]:
            return None
        return str(node.input[1])

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        place = place_of(tensor)
        if tensor.data_type != onnx.TensorProto.INT64 or len(tensor.dims) != 1 or place is None:
            raise ValueError(f"{name} is no list of columns in a file")
        if not is_inside(self._package, place.location):
            raise ValueError(f"{name} lies outside the package, in {place.location}")
        with (self._package / place.location).open("rb") as stream:
            stream.seek(place.offset)
            data = stream.read(8 * tensor.dims[0])
        if len(data) != 8 * tensor.dims[0]:
            raise ValueError(f"{name} reaches past the end of {place.location}")
        return torch.from_numpy(np.frombuffer(data, "<i8").astype(np.int64))


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
    order: torch.Tensor | None,
    quantization: Quantization,
    stored: _Stored,
    weight: str,
    shape: tuple[int, int],
) -> int:
    """How many values of a weight differ in any bit.

    Args:
        order: the weight's column that each column of the codes is; None for its own order.

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
    count = 0
    for start in range(0, shape[0], ROWS):
        stop = min(start + ROWS, shape[0])
        wanted = quantization.rows(weight, shape, start, stop, stored)
        wanted = wanted if order is None else wanted[:, order]
        steps = codes.rows(start, stop).view(stop - start, blocks, -1)
        steps = steps - zeros.rows(start, stop)[:, :, None]
        scale = scales.rows(start, stop)
        made = (steps.to(scale.dtype) * scale[:, :, None]).flatten(1)
        if made.dtype != wanted.dtype:
            raise ValueError(f"is {made.dtype}, the checkpoint's is {wanted.dtype}")
        bits = {2: torch.int16, 4: torch.int32}[made.element_size()]
        count += int((made.view(bits) != wanted.contiguous().view(bits)).sum())
    return count


class _Stored:
    """What a format reads of a checkpoint.

    Attributes:
        shapes: of its tensors.
        weight_shape: what is read of a tensor that only states a weight's shape: the exporter has compared it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
        self.weight_shape = (0, 0)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self.shapes:
            return torch.tensor(self.weight_shape)
        return self._copied(name, np.s_[start:stop])

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._copied(name, np.s_[:, start:stop])

    def _copied(self, name: str, where: Any) -> torch.Tensor:
        entry = self._checkpoint.tensors[name]
        dtype = _TORCH[entry.dtype]
        integers = np.dtype(f"<i{dtype.itemsize}")
        mapped = np.memmap(
            self._checkpoint.path / entry.file, integers, "r", entry.offset, entry.shape
        )
        return torch.from_numpy(np.array(mapped[where])).view(dtype)
