"""Products by quantized weights in a package's graph, and the new nodes that take their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenport.engines.errors import LoweringError
from qwenport.plugins.nodes import append_node, initializer, remove_unused


@dataclass(frozen=True)
class Multiplication:
    """MatMul(x, Transpose(DequantizeLinear(...)))."""

    node: ir.Node
    transpose: ir.Node
    dequantize: ir.Node

    @property
    def x(self) -> ir.Value:
        (x, *_) = self.node.inputs
        assert x is not None
        return x


def multiplications(graph: ir.Graph) -> Iterator[Multiplication]:
    """The products by quantized weights, whatever their codes."""
    for node in graph:
        transpose = producer(node, 1) if node.op_type == "MatMul" and node.domain == "" else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        perm = transpose.attributes.get("perm")
        turned = perm is not None and tuple(perm.as_ints()) == (1, 0)
        dequantize = producer(transpose, 0) if turned else None
        if dequantize is not None and is_dequantized(dequantize):
            yield Multiplication(node, transpose, dequantize)


def is_dequantized(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and node.domain == ""


def producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return None if value is None else value.producer()


def replace_products(
    graph: ir.Graph,
    group: Sequence[Multiplication],
    results: Sequence[ir.Value],
    gathered: ir.Value | None,
) -> None:
    """Give what uses products their new values, and remove them and their weights.

    Args:
        graph: the graph.
        group: the products.
        results: the new values.
        gathered: the new weight, of which rows may be gathered; None if they may not.

    Raises:
        LoweringError: another node uses a weight.
    """
    for product, new in zip(group, results, strict=True):
        (old,) = product.node.outputs
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(product.node, safe=True)
        redirect(product.transpose, {})
        graph.remove(product.transpose, safe=True)
        redirect(product.dequantize, {} if gathered is None else {"Gather": gathered})
        remove_unused(graph, product.dequantize.outputs[0])


def redirect(node: ir.Node, allowed: Mapping[str, ir.Value]) -> None:
    """Give what still uses a weight another value: first inputs of the operators that have one.

    Raises:
        LoweringError: another operator uses it.
    """
    for use in [*node.outputs[0].uses()]:
        if use.node.op_type not in allowed or use.idx != 0:
            raise LoweringError(
                f"{node.name}: used by {use.node.name}; TensorRT takes a quantized weight that is transposed and "
                "multiplied by once, stacked for MoEExperts, or without zero points gathered"
            )
        use.node.replace_input_with(0, allowed[use.node.op_type])


class NewNodes:
    """New nodes that will stand in front of an old one.

    Attributes:
        made: the nodes in order.
    """

    def __init__(self, graph: ir.Graph, name: str, dtype: ir.DataType) -> None:
        """Begin with no nodes.

        Args:
            graph: that they will be in.
            name: what their names begin with.
            dtype: of their results.
        """
        self.made: list[ir.Node] = []
        self._graph, self._name, self._dtype = graph, name, dtype

    def op(
        self,
        kind: str,
        *inputs: ir.Value,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append a node with one output, in `dtype` if that is another."""
        name = f"{self._name}.{kind}_{len(self.made)}"
        results = [(dtype or self._dtype, shape)]
        return append_node(self.made, kind, inputs, name, results, attributes=attributes)[0]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in a dtype; itself if it is in that one."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, dtype=dtype, shape=value.shape, to=int(dtype))

    def flat_product(self, x: ir.Value, weight: ir.Value, k: int, n: int) -> ir.Value:
        """x [B, S, k] times weight [k, n] as a product of matrices.

        TensorRT-RTX has a kernel for SM75 that multiplies by 8 bits as they are, and uses it if x has two dimensions. A
        Reshape alone does not survive its optimizer, one that is multiplied by ones does. That is exact, and becomes a
        part of the kernel before it.
        """
        int64 = ir.DataType.INT64
        ones = ir.tensor(np.ones((1, k), self._dtype.numpy()), name=f"signed.ones_{k}")
        one = initializer(self._graph.initializers, ones)
        flat = self.op("Mul", self.op("Reshape", x, self.integers(-1, k)), one)
        sizes = self.op("Shape", x, dtype=int64, start=0, end=2)
        sizes = self.op("Concat", sizes, self.integers(n), dtype=int64, axis=0)
        return self.op("Reshape", self.op("MatMul", flat, weight), sizes)

    def split(
        self, y: ir.Value, sizes: Sequence[int], shapes: Sequence[ir.Shape | None]
    ) -> Sequence[ir.Value]:
        """Split the last axis into as many values as `shapes`; one is y itself."""
        if len(sizes) == 1:
            return [y]
        name, inputs = f"{self._name}.Split", [y, self.integers(*sizes)]
        results = [(self._dtype, shape) for shape in shapes]
        return append_node(self.made, "Split", inputs, name, results, attributes={"axis": -1})

    def integers(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        name = f"signed.{'_'.join(map(str, values))}"
        tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
        return initializer(self._graph.initializers, tensor)
