"""The parts of quantized weights as a graph has them, read a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import torch

from qwenport.contract import BY_SAFETENSORS
from qwenport.validate.model_file import is_inside, place_of

_BITS: dict[int, int] = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.UINT8: 8}
_FLOATS = {
    int(onnx.TensorProto.FLOAT8E4M3FN): torch.float8_e4m3fn,
    **{int(dtype.ir): dtype.torch for dtype in BY_SAFETENSORS.values()},
}


class Part(Protocol):
    """Codes, scales or zero points of a weight: their shape, and their values a few rows at a time.

    Attributes:
        shape: rows and columns.
        bits: of a code; None for scales.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def bits(self) -> int | None: ...
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1: codes as int16, scales in their dtype."""


class StoredPart:
    """A part that is stored in a file."""

    def __init__(
        self,
        tensor: onnx.TensorProto,
        package: Path,
        *,
        shape: tuple[int, int] | None = None,
        bits: int | None = None,
    ) -> None:
        """Look at the place, without reading it.

        Args:
            tensor: the initializer.
            package: the directory.
            shape, bits: of codes that the graph has as bytes.

        Raises:
            ValueError: it has no place in the package, or is no such tensor; says why.
        """
        self.shape = shape or tuple(tensor.dims)
        self.bits = bits or _BITS.get(tensor.data_type)
        self.dtype = _FLOATS.get(tensor.data_type)
        place = place_of(tensor)
        stated = math.prod(tensor.dims) * 8 if bits else None
        if stated is not None and stated != math.prod(self.shape) * (self.bits or 0):
            raise ValueError(f"{tensor.name} has shape {list(tensor.dims)}, not that of its codes")
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


class Cut:
    """The first columns of a part."""

    def __init__(self, part: Part, columns: int) -> None:
        self._part, self.shape, self.bits = part, (part.shape[0], columns), part.bits

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._part.rows(start, stop)[:, : self.shape[1]]


class Middle:
    """Zero points that all are the middle code."""

    def __init__(self, shape: tuple[int, int], bits: int) -> None:
        self.shape, self.bits = shape, bits

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start, self.shape[1]), 1 << (self.bits - 1), dtype=torch.int16)


class Orders:
    """The order of the columns of each quantized weight, as a graph's products or stacks of experts have it."""

    def __init__(self, model: onnx.ModelProto, package: Path) -> None:
        self._package = package
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._made_by = {name: node for node in model.graph.node for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def of(self, codes: str, columns: int) -> torch.Tensor | None:
        """The weight's column that each column of its codes is, [columns]; None if nothing is gathered.

        Raises:
            ValueError: it is used in several orders, or in none that is a permutation.
        """
        users = self._users.get(codes, ())
        found = {
            *(self._gathered_by(product) for user in users for product in self._products(user)),
            *(order for user in users for order in self._restored_by(user)),
        }
        if len(found) > 1:
            raise ValueError("it is used in several orders of its columns")
        name, inverse = found.pop() if found else (None, False)
        if name is None:
            return None
        order = self._read(name)
        if not torch.equal(order.sort().values, torch.arange(columns)):
            raise ValueError(f"{name} is no permutation of {columns} columns")
        return order.argsort() if inverse else order

    def _restored_by(self, user: onnx.NodeProto) -> Iterator[tuple[str | None, bool]]:
        """The orders in which an expert's columns are put back before experts are stacked, as `_gathered_by`.

        A Gather of the columns by an order is a product's input in the inverse of it. TopK of a permutation, the least
        first, has its inverse.

        Raises:
            ValueError: they are put into an order that is not understood.
        """
        if user.op_type != "DequantizeLinear":
            return
        for node in self._users.get(user.output[0], ()):
            if node.op_type == "Concat":
                yield None, False
            if node.op_type != "Gather" or node.input[0] != user.output[0]:
                continue
            if _attribute(node, "axis") != 1:
                continue  # of rows: an embedding
            index = node.input[1]
            sort = self._made_by.get(index)
            if index in self._tensors:
                yield index, True
            elif (
                sort is not None
                and sort.op_type == "TopK"
                and sort.output[1] == index
                and sort.input[0] in self._tensors
                and _attribute(sort, "largest") == 0
                and _attribute(sort, "sorted") != 0
            ):
                yield sort.input[0], False
            else:
                raise ValueError(f"{node.name} puts its columns into an order that is not stored")

    def _products(self, user: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The products by codes, of one of the nodes that use them."""
        if user.op_type == "MatMulNBits":
            yield user
            return
        for transpose in self._users.get(user.output[0], ()):
            for product in self._users.get(transpose.output[0], ()):
                if product.op_type == "MatMul":
                    yield product

    def _gathered_by(self, product: onnx.NodeProto) -> tuple[str | None, bool]:
        """The order that a product's input is gathered in, None if it is not; and whether the inverse is meant."""
        node = self._made_by.get(product.input[0])
        if node is None or node.op_type != "Gather" or node.input[1] not in self._tensors:
            return None, False
        if _attribute(node, "axis") != -1:
            return None, False
        return str(node.input[1]), False

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


def _attribute(node: onnx.NodeProto, name: str) -> int | None:
    """An attribute of a node that is an integer; None if it has none."""
    return next((int(a.i) for a in node.attribute if a.name == name), None)
