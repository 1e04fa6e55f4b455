"""Fix the length of the KV cache, which TensorRT requires to be static."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class StaticCapacity(InPlacePass):
    """Replace the symbolic dimension "capacity" of every input and output by a number."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        modified = False
        for value in [*model.graph.inputs, *model.graph.outputs]:
            sizes = list(value.shape or ())
            if any(str(size) == "capacity" for size in sizes):
                value.shape = ir.Shape(
                    [self.capacity if str(size) == "capacity" else size for size in sizes]
                )
                modified = True
        return PassResult(model, modified)
