"""Weights in fp32 in one file of the engine's own. Only their places are decided here: nothing is read or written.

A safetensors file has no gaps, so tensors are ordered by the power of two that divides their size: each lies at a
multiple of that power, up to ALIGNMENT, and all but a few odd ones at a multiple of ALIGNMENT.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import FP32
from qwenport.exporter import TensorEntry, plan_safetensors

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector register."""


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of an engine's weight file.

    Attributes:
        entry: its place in the file, in fp32.
        source: the tensor of the package that it is converted from.
    """

    entry: TensorEntry
    source: ir.ExternalTensor


class StoreInFloat32(InPlacePass):
    """Every tensor that lies in a file of the package -> fp32 in `file`; unused ones disappear.

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
        sources: dict[str, ir.ExternalTensor] = {}
        for name, value in [*graph.initializers.items()]:
            if not isinstance(value.const_value, ir.ExternalTensor):
                continue
            if value.uses():
                sources[name] = value.const_value
            else:
                del graph.initializers[name]
        shapes = {name: tuple(source.shape.numpy()) for name, source in sources.items()}
        order = sorted(shapes, key=lambda name: -_divisor(4 * sources[name].size))
        entries = plan_safetensors(
            self.file,
            FP32.safetensors,
            {name: shapes[name] for name in order},
            alignment=ALIGNMENT,
        )
        for name, entry in entries.items():
            value = graph.initializers[name]
            value.type = ir.TensorType(FP32.ir)
            value.const_value = ir.ExternalTensor(
                self.file,
                entry.offset,
                entry.length,
                FP32.ir,
                shape=ir.Shape(entry.shape),
                name=name,
            )
        self.weights = tuple(StoredWeight(entry, sources[name]) for name, entry in entries.items())
        return PassResult(model, bool(entries))


def _divisor(size: int) -> int:
    """The largest power of two, up to ALIGNMENT, that divides `size`."""
    return min(ALIGNMENT, size & -size) or ALIGNMENT
