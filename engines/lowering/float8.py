"""Weights in FP8; and on onnxruntime's CPU, which multiplies by none, they become fp32 when the model is loaded.

The file keeps the codes. Inputs that the graph rounds to FP8 stay as they are: onnxruntime's own QuantizeLinear, Cast
and DequantizeLinear do that in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import FP32, HALF, is_past
from qwenport.engines.errors import LoweringError
from qwenport.plugins.nodes import append_node, initializer

FLOAT8 = ir.DataType.FLOAT8E4M3FN


class DequantizeFloat8AtLoad(InPlacePass):
    """DequantizeLinear of FP8 weights -> code * scale in fp32 and its rounding, which onnxruntime folds at load.

    For a graph that computes in fp32 already.
    """

    def __init__(self, model: ir.Model) -> None:
        """Note the dtype to round to; the passes before this one may change the graph's.

        Args:
            model: the package's graph.
        """
        super().__init__()
        caches = [value.dtype for value in model.graph.inputs if is_past(str(value.name))]
        self._rounded = next((dtype for dtype in caches if dtype is not None), FP32.ir)

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place.

        Raises:
            LoweringError: the scales are neither one nor one for each row.
        """
        found = [node for node in model.graph if is_float8_weight(node)]
        for node in found:
            self._dequantize(model.graph, node)
        return PassResult(model, bool(found))

    def _dequantize(self, graph: ir.Graph, node: ir.Node) -> None:
        (old,) = node.outputs
        nodes: list[ir.Node] = []
        codes, scales = node.inputs[0], node.inputs[1]
        assert codes is not None and scales is not None

        def op(op_type: str, *inputs: ir.Value, dtype: ir.DataType, **attributes: Any) -> ir.Value:
            name = f"{old.name}.{op_type}_{len(nodes)}"
            (made,) = append_node(
                nodes, op_type, inputs, name, [(dtype, None)], attributes=attributes
            )
            return made

        def cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
            return op("Cast", value, dtype=dtype, to=int(dtype))

        if has_row_scales(node):
            column = ir.tensor(np.array([-1, 1], dtype=np.int64), name="float8.column")
            shape = initializer(graph.initializers, column)
            scales = op("Reshape", scales, shape, dtype=FP32.ir)
        made = op("Mul", cast(codes, FP32.ir), scales, dtype=FP32.ir)
        if self._rounded in [dtype.ir for dtype in HALF]:
            made = cast(cast(made, self._rounded), FP32.ir)
        made.shape = old.shape
        graph.insert_before(node, nodes)
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)


@dataclass(frozen=True)
class Float8Weight:
    """A weight in FP8.

    Attributes:
        codes, scales: initializers, [N, K] and [N] or [].
        rounded: the dtype of its dequantized values, which is the scales'.
        n, k: its rows and columns.
    """

    codes: ir.Value
    scales: ir.Value
    rounded: ir.DataType
    n: int
    k: int


def float8_weight(node: ir.Node) -> Float8Weight:
    """What a DequantizeLinear of FP8 is given.

    Raises:
        LoweringError: it is not a matrix with one scale, or one for each row.
    """
    has_row_scales(node)
    codes, scales = node.inputs[0], node.inputs[1]
    assert codes is not None and scales is not None and scales.dtype is not None
    if not scales.is_initializer() or codes.shape is None or len(codes.shape) != 2:
        raise LoweringError(f"{node.name}: its codes and scales are not those of a matrix")
    n, k = codes.shape.numpy()
    return Float8Weight(codes, scales, scales.dtype, n, k)


def has_row_scales(node: ir.Node) -> bool:
    """Whether a weight in FP8 has a scale for each row, and not one for all.

    Raises:
        LoweringError: it has neither.
    """
    scales = node.inputs[1]
    assert scales is not None
    axis, rank = node.attributes.get("axis"), _rank(scales)
    if rank > 1 or len(node.inputs) > 2:
        raise LoweringError(f"{node.name}: FP8 weights have one scale, or one for each row")
    if rank == 1 and (axis is None or axis.as_int() != 0):
        raise LoweringError(f"{node.name}: its scales are not those of its rows")
    return rank == 1


def _rank(scales: ir.Value) -> int:
    """The number of axes of an initializer, or of what is cast from one."""
    producer = scales.producer()
    stored = scales if producer is None else producer.inputs[0]
    assert stored is not None and stored.shape is not None
    return len(stored.shape)


def dequantizes_float8(node: ir.Node) -> bool:
    """Whether a node is DequantizeLinear of FP8: a weight, or an input that the graph has rounded."""
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" and node.domain == "" else None
    return codes is not None and codes.dtype == FLOAT8


def is_float8_weight(node: ir.Node) -> bool:
    """Whether a node is DequantizeLinear of a weight in FP8."""
    return (
        dequantizes_float8(node) and node.inputs[0] is not None and node.inputs[0].is_initializer()
    )
