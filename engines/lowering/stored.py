"""Weights in one file of the engine's own. Only their places are decided here: nothing is read or written.

All are in fp32 but codes in FP8, the codes and zero points of the other quantized weights, which `UseMatMulNBits` has
made UINT8, and the order of their columns.

A safetensors file has no gaps, so tensors are ordered by the power of two that divides their size: each lies at a
multiple of that power, up to ALIGNMENT, and all but a few odd ones at a multiple of ALIGNMENT.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import FP8, FP32
from qwenport.engines.lowering.few_bits import RepeatedBlocks
from qwenport.engines.lowering.float8 import FLOAT8
from qwenport.exporter import TensorEntry, plan_safetensors

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector register."""

BYTES = "U8"
"""In a safetensors header: the dtype of codes that are integers."""
KEPT = (BYTES, FP8, "I64")
"""The dtypes of what keeps its bytes."""


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of an engine's weight file.

    Attributes:
        entry: its place in the file, in fp32 ("F32"), or with the source's bytes ("U8", "F8_E4M3", "I64").
        source: the tensor of the package that it is made from.
        repeats: how often each value along the last axis is written, see `RepeatedBlocks`; None if the source is
            converted as it is.
    """

    entry: TensorEntry
    source: ir.ExternalTensor
    repeats: int | None = None


class StoreWeights(InPlacePass):
    """Every tensor that lies in a file of the package -> fp32, or the same bytes, in `file`; unused ones disappear.

    Attributes:
        weights: the tensors in the order in which the file must hold them, after `call`.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        self.weights: tuple[StoredWeight, ...] = ()

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        graph = model.graph
        tensors: dict[str, ir.ExternalTensor | RepeatedBlocks] = {}
        for name, value in [*graph.initializers.items()]:
            if not isinstance(value.const_value, ir.ExternalTensor | RepeatedBlocks):
                continue
            if value.uses():
                tensors[name] = value.const_value
            else:
                del graph.initializers[name]
        dtypes = {name: _stored_as(tensor) for name, tensor in tensors.items()}
        sizes = {name: tensor.size * dtypes[name].bitwidth // 8 for name, tensor in tensors.items()}
        order = sorted(tensors, key=lambda name: -_divisor(sizes[name]))
        headers = {
            ir.DataType.UINT8: BYTES,
            FLOAT8: FP8,
            ir.DataType.INT64: "I64",
            FP32.ir: FP32.safetensors,
        }
        entries = plan_safetensors(
            self.file,
            {name: headers[dtypes[name]] for name in order},
            {name: tuple(tensors[name].shape.numpy()) for name in order},
            alignment=ALIGNMENT,
        )
        for name, entry in entries.items():
            value = graph.initializers[name]
            value.type = ir.TensorType(dtypes[name])
            value.const_value = ir.ExternalTensor(
                self.file,
                entry.offset,
                entry.length,
                dtypes[name],
                shape=ir.Shape(entry.shape),
                name=name,
            )
        self.weights = tuple(_weight(entry, tensors[name]) for name, entry in entries.items())
        return PassResult(model, bool(entries))


def _stored_as(tensor: ir.ExternalTensor | RepeatedBlocks) -> ir.DataType:
    kept = (ir.DataType.UINT8, ir.DataType.INT64, FLOAT8)
    return tensor.dtype if tensor.dtype in kept else FP32.ir


def _weight(entry: TensorEntry, tensor: ir.ExternalTensor | RepeatedBlocks) -> StoredWeight:
    if isinstance(tensor, RepeatedBlocks):
        return StoredWeight(entry, tensor.source, tensor.repeats)
    return StoredWeight(entry, tensor)


def _divisor(size: int) -> int:
    """The largest power of two, up to ALIGNMENT, that divides `size`."""
    return min(ALIGNMENT, size & -size) or ALIGNMENT
