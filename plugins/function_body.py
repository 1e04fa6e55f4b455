"""Writing an operator's body in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qwenport.contract import DOMAIN
from qwenport.plugins.nodes import UNKNOWN, append_node


class FunctionBody:
    """The nodes of an ONNX function under construction. A function has no initializers, so constants are nodes."""

    def __init__(self, *inputs: str) -> None:
        self.inputs = [ir.Value(name=name) for name in inputs]
        self._nodes: list[ir.Node] = []
        self._integers: dict[tuple[int, ...] | int, ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append a one-output node and return its output."""
        (result,) = self.ops(1, op_type, *inputs, **attributes)
        return result

    def ops(
        self, outputs: int, op_type: str, *inputs: ir.Value, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node and return its outputs."""
        name = f"{op_type}_{len(self._nodes)}"
        results = [UNKNOWN] * outputs
        return append_node(
            self._nodes, op_type, inputs, name, results, attributes=attributes, separator="_"
        )

    def integer(self, value: int) -> ir.Value:
        """A shared int64 scalar."""
        if value not in self._integers:
            self._integers[value] = self.op("Constant", value_int=value)
        return self._integers[value]

    def integers(self, *values: int) -> ir.Value:
        """A shared int64 vector."""
        if values not in self._integers:
            self._integers[values] = self.op("Constant", value_ints=values)
        return self._integers[values]

    def attribute(self, name: str, kind: ir.AttributeType) -> ir.Value:
        """The scalar value of one of the function's INT or FLOAT attributes."""
        field = {ir.AttributeType.INT: "value_int", ir.AttributeType.FLOAT: "value_float"}[kind]
        return self.op("Constant", reference=ir.RefAttr(field, name, kind))

    def size(self, tensor: ir.Value, axis: int) -> ir.Value:
        """A size as a one-element vector."""
        end = {} if axis == -1 else {"end": axis + 1}
        return self.op("Shape", tensor, start=axis, **end)

    def arange(self, count: ir.Value) -> ir.Value:
        """0 .. count-1, for a count given as a one-element vector."""
        scalar = self.op("Squeeze", count, self.integers(0))
        return self.op("Range", self.integer(0), scalar, self.integer(1))

    def function(
        self,
        name: str,
        outputs: dict[str, ir.Value],
        opset: int,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Function:
        """Finish: return the function with its outputs renamed."""
        for label, value in outputs.items():
            value.name = label
        graph = ir.Graph(
            self.inputs,
            list(outputs.values()),
            nodes=self._nodes,
            opset_imports={"": opset},
            name=name,
        )
        return ir.Function(DOMAIN, name, "", graph=graph, attributes=attributes)
