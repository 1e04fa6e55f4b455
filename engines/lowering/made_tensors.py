"""The tensors that lowering for TensorRT makes of a package's: signed codes, repeated scales, corrections.

Nothing is read before a part of a tensor is asked for, and a part is at most one weight of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenport.contract import Progress
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.few_bits import QuantizedWeight
from qwenport.engines.lowering.float8 import Float8Weight
from qwenport.plugins.nodes import initializer

FILE = "codes.bin"
"""Holds the new tensors, next to the lowered model."""
ALIGNMENT = 64

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Part = Callable[[], bytes]

HIGH_DIGIT = 16
"""An 8-bit code is 16 times its high digit plus its low one, both of 4 bits."""


@dataclass(frozen=True)
class MadeTensor:
    """A tensor of the new file.

    Attributes:
        offset: of its first byte.
        parts: each returns the bytes that follow.
    """

    offset: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Correction:
    """What is subtracted from a weight of signed codes, per block: scale * (zero point - middle code).

    Attributes:
        name: of the initializer, in the scales' dtype: [rows, N], or of experts [N, rows, 1].
        weights: side by side along N; their blocks have one size.
        middle: the unsigned code that became zero.
        rows: blocks with those that only pad, whose values are zero.
        digits: of a code, side by side along K in the signed weight.
        of_experts: whether the dequantized weight is corrected itself, since it is gathered before it is multiplied by.
    """

    name: str
    weights: tuple[QuantizedWeight, ...]
    middle: int
    rows: int
    digits: int
    of_experts: bool = False

    @property
    def blocks(self) -> int:
        """Rows without padding."""
        return self.weights[0].k // self.weights[0].block

    def values(self) -> Float32:
        """The corrections [rows, N] in fp32, where they are exact."""
        made = np.zeros((self.rows, sum(weight.n for weight in self.weights)), np.float32)
        made[: self.blocks] = np.concatenate([self._of(weight) for weight in self.weights]).T
        return made

    def stored(self) -> bytes:
        """The initializer: rounded to the scales' dtype."""
        values = self.values().astype(self.weights[0].rounded.numpy())
        return (values.T if self.of_experts else values).tobytes()

    def _of(self, weight: QuantizedWeight) -> Float32:
        shape = weight.n, weight.k // weight.block
        zeros = read(weight.zeros)
        if weight.bits == 4:
            halves = np.stack([zeros & np.uint8(15), zeros >> np.uint8(4)], axis=1).reshape(-1)
            zeros = halves[: shape[0] * shape[1]]  # without the half that fills the last byte
        scales = _numbers(weight.scales).astype(np.float32)
        made: Float32 = scales * (zeros.astype(np.float32) - self.middle)
        return made.reshape(shape)


@dataclass(frozen=True)
class SignedWeight:
    """What one DequantizeLinear of the lowered graph dequantizes.

    Attributes:
        node: its name, and its output's.
        weights: the package's weights in it.
        elements: of its codes.
        dtype: of its codes.
        correction: what is subtracted; None of symmetric weights.
        columns: the initializer int32 [experts, K] that has, for each column of an expert's codes, the column of its
            input; None if they are the input's own, and of what is no stack of experts.
    """

    node: str
    weights: tuple[str, ...]
    elements: int
    dtype: ir.DataType
    correction: Correction | None
    columns: str | None = None


class MadeFile:
    """What lowering leaves beside a graph.

    Attributes:
        tensors: what FILE must hold, ordered, and `bytes` its size.
        weights: the quantized ones.
    """

    def __init__(self) -> None:
        self.tensors: list[MadeTensor] = []
        self.bytes = 0
        self.weights: list[SignedWeight] = []

    def add(
        self,
        graph: ir.Graph,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        parts: Iterable[Part],
    ) -> ir.Value:
        """A new initializer of `graph`, whose bytes are those of `parts`."""
        length = -(-math.prod(shape) * dtype.bitwidth // 8)
        self.tensors.append(MadeTensor(self.bytes, tuple(parts)))
        tensor = ir.ExternalTensor(
            FILE, self.bytes, length, dtype, shape=ir.Shape(shape), name=name
        )
        self.bytes += length + -length % ALIGNMENT
        return initializer(graph.initializers, tensor)


def write_tensors(file: Path, tensors: Iterable[MadeTensor], progress: Progress) -> None:
    """Write the new file, one part of a tensor in memory at a time.

    Args:
        file: to create.
        tensors: what it holds, ordered.
        progress: called with the number of tensors.

    Raises:
        LoweringError: a file of the package is shorter than its graph says.
    """
    made = tuple(tensors)
    with file.open("xb") as stream:
        for done, tensor in enumerate(made, 1):
            stream.seek(tensor.offset)
            for part in tensor.parts:
                stream.write(part())
            progress("writing signed codes", done, len(made))


def signed(weight: QuantizedWeight) -> bytes:
    """The codes minus the middle code, in two's complement: its highest bit is the other one."""
    return (read(weight.codes) ^ np.uint8(0x88 if weight.bits == 4 else 0x80)).tobytes()


def digits(weight: QuantizedWeight) -> bytes:
    """The high digits of 8-bit codes, minus 8, and to the right of them the low ones, minus 8: INT4 [N, 2 K]."""
    codes = read(weight.codes).reshape(weight.n, weight.k)
    both = np.concatenate([codes >> np.uint8(4), codes & np.uint8(15)], axis=1)
    packed: Bytes = (both[:, 0::2] | (both[:, 1::2] << np.uint8(4))) ^ np.uint8(0x88)
    return packed.tobytes()


def repeated(weight: QuantizedWeight, repeats: int) -> bytes:
    """The scales [N, blocks], each `repeats` times."""
    return np.repeat(_numbers(weight.scales), repeats).tobytes()


def digit_scales(weight: QuantizedWeight, repeats: int) -> bytes:
    """The scales of high digits, and to the right of them those of the low ones; 16 s is exact.

    Raises:
        LoweringError: 16 s is infinite in fp16.
    """
    scales = _numbers(weight.scales).reshape(weight.n, -1)
    high = scales.astype(np.float32) * HIGH_DIGIT
    with np.errstate(over="ignore"):
        made = np.concatenate([high.astype(scales.dtype), scales], axis=1)
    if not np.isfinite(made.astype(np.float32)).all():
        raise LoweringError(f"{weight.scales.name}: too large for {HIGH_DIGIT} times itself")
    return np.repeat(made, repeats).tobytes()


def row_scales(weight: Float8Weight, dtype: ir.DataType) -> bytes:
    """The scales [N] in `dtype`, which holds their values exactly; one for the whole weight is repeated."""
    scales = _numbers(weight.scales).astype(dtype.numpy())
    return np.broadcast_to(scales.reshape(-1), weight.n).tobytes()


def read(value: ir.Value) -> Bytes:
    """The bytes of an initializer of the package.

    Raises:
        LoweringError: it lies in no file, or the file is shorter.
    """
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        raise LoweringError(f"{value.name} is not stored in a file")
    with open(tensor.path, "rb") as stream:  # onnx_ir reads no file that has several links
        stream.seek(tensor.offset or 0)
        data = stream.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise LoweringError(f"{tensor.path}: shorter than the graph says")
    return np.frombuffer(data, np.uint8)


def _numbers(value: ir.Value) -> npt.NDArray[Any]:
    assert value.dtype is not None
    return read(value).view(value.dtype.numpy())
