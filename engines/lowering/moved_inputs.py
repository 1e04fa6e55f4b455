"""A package's graph on onnxruntime's CPU with inputs moved a little before they are rounded to FP8.

For measuring what codes that fall the other way do to a model's logits: two correct programs differ by such codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.engines.lowering.float8 import FLOAT8
from qwenport.plugins.nodes import append_node, initializer

FLOAT = ir.DataType.FLOAT


class MoveRoundedInputs(InPlacePass):
    """x, which is rounded to FP8 -> x + max |x| * moves, with the largest of each token and a move for each column.

    For a graph that computes in fp32 already.
    """

    def __init__(self, share: float) -> None:
        """Set up the pass.

        Args:
            share: the largest move, of the token's largest input.
        """
        super().__init__()
        self._share = share

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        rounded = dict.fromkeys(x for node in model.graph for x in _rounded_by(node))
        for x in rounded:
            self._move(model.graph, x)
        return PassResult(model, bool(rounded))

    def _move(self, graph: ir.Graph, x: ir.Value) -> None:
        uses = [use for use in x.uses() if use.node.op_type in ("QuantizeLinear", "Abs", "Div")]
        nodes: list[ir.Node] = []

        def op(op_type: str, *inputs: ir.Value) -> ir.Value:
            name = f"{x.name}.moved.{op_type}"
            attributes = {"keepdims": 1} if op_type == "ReduceMax" else {}
            (made,) = append_node(
                nodes, op_type, inputs, name, [(FLOAT, None)], attributes=attributes
            )
            return made

        assert x.shape is not None
        last = initializer(
            graph.initializers, ir.tensor(np.array([-1], dtype=np.int64), name="moved.axis")
        )
        largest = op("ReduceMax", op("Abs", x), last)
        moved = op("Add", x, op("Mul", largest, self._moves(graph, x.shape[-1])))
        moved.shape = x.shape
        graph.insert_before(uses[0].node, nodes)
        for use in uses:
            use.node.replace_input_with(use.idx, moved)

    def _moves(self, graph: ir.Graph, columns: int | ir.SymbolicDim) -> ir.Value:
        assert isinstance(columns, int)
        random = np.random.default_rng(columns)
        moves = (self._share * random.uniform(-1, 1, columns)).astype(np.float32)
        return initializer(graph.initializers, ir.tensor(moves, name=f"moved.by.{columns}"))


def _rounded_by(node: ir.Node) -> Iterator[ir.Value]:
    """What a node rounds to FP8, as the exporter writes it: statically, or divided by its token's scale."""
    given = node.inputs[0] if node.inputs else None
    if given is None or not node.outputs or node.outputs[0].dtype != FLOAT8:
        return
    if node.op_type == "QuantizeLinear":
        yield given
    elif node.op_type == "Cast" and (division := given.producer()) is not None:
        assert division.op_type == "Div" and division.inputs[0] is not None
        yield division.inputs[0]
