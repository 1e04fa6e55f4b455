"""A package's graph on onnxruntime's CPU as a half-precision program computes it: every result is rounded.

For measuring what rounding alone does to a model's logits, without a GPU. Inside an operator everything is in fp32, as
in kernels that accumulate in fp32.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport import contract

MOVES = {
    "Concat",
    "DequantizeLinear",
    "Gather",
    "Reshape",
    "Slice",
    "TensorScatter",
    "Transpose",
    "Unsqueeze",
}
"""Operators whose results stay: they compute nothing, or a weight."""


class RoundResults(InPlacePass):
    """Round the results named at construction to a half-precision type and back, in a graph that computes in fp32."""

    def __init__(self, model: ir.Model, dtype: contract.Dtype) -> None:
        """Note the results to round; the passes after this may change their types.

        Args:
            model: the package's graph. Of an fp32 package every fp32 result is rounded.
            dtype: bf16 or fp16.
        """
        half = [d.ir for d in contract.HALF]
        graph, outputs = model.graph, set(model.graph.outputs)
        results = [
            value
            for node in graph
            if node.op_type not in MOVES
            for value in node.outputs
            if value not in outputs
        ]
        inexact = half if any(value.dtype in half for value in results) else [contract.FP32.ir]
        self._names = {str(value.name) for value in results if value.dtype in inexact}
        self._dtype = dtype

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        for node in list(model.graph):
            for value in node.outputs:
                if value.name in self._names:
                    self._round(model.graph, node, value)
        return PassResult(model, bool(self._names))

    def _round(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
        narrow = ir.node("Cast", [value], attributes={"to": int(self._dtype.ir)})
        wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": int(contract.FP32.ir)})
        for cast, dtype in ((narrow, self._dtype), (wide, contract.FP32)):
            cast.outputs[0].name = cast.name = f"{value.name}.{dtype.name}"
            cast.outputs[0].type = ir.TensorType(dtype.ir)
        value.replace_all_uses_with(wide.outputs[0])
        narrow.replace_input_with(0, value)
        graph.insert_after(node, [narrow, wide])
