"""The nodes around weights of signed codes: sums for corrections, corrected weights of experts, merged products cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.signed_forms import Form
from qwenport.plugins.nodes import append_node, initializer


class SignedNodes:
    """New nodes that will stand in front of an old one.

    Attributes:
        made: the nodes in order.
    """

    def __init__(self, graph: ir.Graph, name: str, dtype: ir.DataType) -> None:
        self.made: list[ir.Node] = []
        self._graph, self._name, self._dtype = graph, name, dtype

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append a node with one output."""
        name = f"{self._name}.{kind}_{len(self.made)}"
        results = [(self._dtype, None)]
        return append_node(self.made, kind, inputs, name, results, attributes=attributes)[0]

    def sums(self, x: ir.Value, form: Form, rows: int) -> ir.Value:
        """x [batch, seq, K] -> the sums of its blocks [batch, seq, rows]; beyond K there are zeros.

        It is padded before it is summed: TensorRT makes one kernel of that, and two of the opposite.

        Raises:
            LoweringError: x has other axes.
        """
        if x.shape is None or len(x.shape) != 3:
            raise LoweringError(f"{self._name}: {x.name} has not three axes")
        if rows == 1:
            return self.op("ReduceSum", x, self._integers(-1), keepdims=1)
        padding = rows * form.block - form.k
        if padding:
            x = self.op("Pad", x, self._integers(0, 0, 0, 0, 0, padding))
        blocks = self.op("Reshape", x, self._integers(0, 0, rows, form.block))
        return self.op("ReduceSum", blocks, self._integers(-1), keepdims=0)

    def corrected(self, weight: ir.Value, correction: ir.Value, form: Form) -> ir.Value:
        """A weight [N, digits * K], its digits added up, minus the correction [N, blocks, 1] of each block.

        TensorRT does that to the gathered experts alone, in the kernel that dequantizes them; it would not with a
        ReduceSum of the digits. The low digits, which are the smaller numbers, are corrected first.
        """
        assert weight.shape is not None
        n = int(weight.shape.numpy()[0])
        high = None
        if form.in_digits:
            high, weight = self.split(weight, [form.k] * 2, [ir.Shape((n, form.k))] * 2)
        blocks = self.op("Reshape", weight, self._integers(n, form.blocks, form.block))
        centred = self.op("Sub", blocks, correction)
        made = self.op("Reshape", centred, self._integers(n, form.k))
        return made if high is None else self.op("Add", high, made)

    def split(
        self, y: ir.Value, sizes: Sequence[int], shapes: Sequence[ir.Shape | None]
    ) -> Sequence[ir.Value]:
        """Split the last axis into as many values as `shapes`."""
        name, inputs = f"{self._name}.Split", [y, self._integers(*sizes)]
        results = [(self._dtype, shape) for shape in shapes]
        return append_node(self.made, "Split", inputs, name, results, attributes={"axis": -1})

    def _integers(self, *values: int) -> ir.Value:
        name = f"signed.{'_'.join(map(str, values))}"
        tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
        return initializer(self._graph.initializers, tensor)
