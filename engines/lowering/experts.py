"""Experts one by one, for a runtime in which a matmul with zero rows costs nothing.

onnxruntime's Gather copies the weights that it selects, which costs more than using them. Here the tokens are sorted
by expert and split, and each expert multiplies its own rows by its own weights; no weights are stacked or copied. The
matmul of an expert without tokens reads nothing. Work and weight bytes read are proportional to the chosen experts, for
one token and for thousands; an idle expert costs only the calls of its matmuls. Where an expert's columns are sorted,
its rows are gathered in that order first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import DOMAIN, MOE_EXPERTS
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.act_order import sorted_weight
from qwenport.plugins.moe_experts import LARGEST_FP8
from qwenport.plugins.nodes import append_node, initializer, remove_unused

INT64 = ir.DataType.INT64


class SplitExperts(InPlacePass):
    """qwenport.MoEExperts -> Split, one SwiGLU per expert, Concat. The stacks of weights disappear."""

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place.

        Raises:
            LoweringError: indices are by expert, or an expert's weights are neither a separate tensor nor
                part of one in a file.
        """
        modified = False
        for node in [*model.graph]:
            if node.op_type == MOE_EXPERTS and node.domain == DOMAIN:
                _Split(model.graph, node).write()
                modified = True
        if modified:
            model.functions.pop((DOMAIN, MOE_EXPERTS, ""))
        return PassResult(model, modified)


class _Split:
    """One operator's replacement."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.nodes: list[ir.Node] = []
        (self.y,) = node.outputs
        assert self.y.dtype is not None
        self.dtype = self.y.dtype
        self.gathered: dict[tuple[ir.Value, ir.Value], ir.Value] = {}

    def write(self) -> None:
        x, indices, weights, gate_up, down, *scales = self.node.inputs
        assert x is not None and indices is not None and weights is not None
        assert gate_up is not None and down is not None and indices.shape is not None
        op, constant = self.op, self.constant
        if self.attribute("by_expert"):
            raise LoweringError(f"{self.node.name}: experts that choose tokens cannot be split")
        k = indices.shape[-1]
        assert isinstance(k, int)
        halves = self.experts_of(gate_up, 2)
        downs = self.experts_of(down, 1)
        hidden = _shape(down)[1]

        flat = op("Reshape", indices, constant(-1), dtype=INT64)
        count = op("Shape", flat, dtype=INT64)
        order = self.sorted_indices(flat, count)  # among equals the lowest comes first
        back = self.sorted_indices(order, count)
        ids = constant(*range(len(downs)))
        mine = op(
            "Equal", op("Unsqueeze", flat, constant(1), dtype=INT64), ids, dtype=ir.DataType.BOOL
        )
        sizes = op(
            "ReduceSum",
            op("Cast", mine, dtype=INT64, to=int(INT64)),
            constant(0),
            dtype=INT64,
            keepdims=0,
        )
        tokens = op("Reshape", x, constant(-1, hidden))
        rows = op("Gather", tokens, op("Div", order, constant(k), dtype=INT64))
        rows.shape = ir.Shape((None, hidden))

        # all but the matmuls is done once for all experts: an idle expert costs its three matmuls' calls
        for_gates = for_ups = self.ops("Split", [rows, sizes], [self.dtype] * len(downs), axis=0)
        of_rows: Sequence[ir.Value] = ()
        if scales:
            assert scales[0] is not None
            sorted_flat = op("Gather", flat, order, dtype=INT64)
            of_rows = self.ops(
                "Split",
                [op("Gather", scales[0], sorted_flat)],
                [self.dtype] * 3,
                axis=1,
                num_outputs=3,
            )
            for_gates, for_ups = (
                self.ops(
                    "Split", [self.with_scale(rows, s), sizes], [self.dtype] * len(downs), axis=0
                )
                for s in of_rows[:2]
            )
        gates = [self.product(g, gate) for g, (gate, _) in zip(for_gates, halves, strict=True)]
        ups = [self.product(group, up) for group, (_, up) in zip(for_ups, halves, strict=True)]
        gated = op("Concat", *gates, axis=0)
        active = op("Mul", op("Mul", gated, op("Sigmoid", gated)), op("Concat", *ups, axis=0))
        active.shape = ir.Shape((None, _shape(down)[2]))
        if scales:
            active = self.with_scale(active, of_rows[2])
        elif self.attribute("round_inner"):
            active = self.rounded(active)
        inner = self.ops("Split", [active, sizes], [self.dtype] * len(downs), axis=0)
        parts = [self.product(group, out) for group, (out,) in zip(inner, downs, strict=True)]
        ordered = op("Gather", op("Concat", *parts, axis=0), back)
        single = op("Cast", ordered, dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        by_token = op("Reshape", single, constant(-1, k, hidden), dtype=ir.DataType.FLOAT)
        factors = op("Reshape", weights, constant(-1, k, 1), dtype=ir.DataType.FLOAT)
        weighted = op("Mul", by_token, factors, dtype=ir.DataType.FLOAT)
        total = op("ReduceSum", weighted, constant(1), dtype=ir.DataType.FLOAT, keepdims=0)
        cast = op("Cast", total, to=int(self.dtype))
        y = op("Reshape", cast, op("Shape", x, dtype=INT64))
        y.name, y.type, y.shape = self.y.name, self.y.type, self.y.shape
        self.graph.insert_before(self.node, self.nodes)
        self.y.replace_all_uses_with(y, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        for stack in (gate_up, down):
            remove_unused(self.graph, stack)

    def attribute(self, name: str) -> int:
        found = self.node.attributes.get(name)
        return 0 if found is None else found.as_int()

    def op(
        self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Append a one-output node, by default of the experts' dtype."""
        (result,) = self.ops(op_type, inputs, [dtype or self.dtype], **attributes)
        return result

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtypes: Sequence[ir.DataType],
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node with one output per dtype."""
        name = f"{self.node.name}.{op_type}_{len(self.nodes)}"
        results = [(dtype, None) for dtype in dtypes]
        return append_node(self.nodes, op_type, inputs, name, results, attributes=attributes)

    def sorted_indices(self, values: ir.Value, count: ir.Value) -> ir.Value:
        """Indices that sort the values in ascending order."""
        pair = [INT64, INT64]
        return self.ops("TopK", [values, count], pair, axis=0, largest=0, sorted=1)[1]

    def rounded(self, x: ir.Value) -> ir.Value:
        """x [rows, columns], each row rounded to FP8 with a scale of its own."""
        op = self.op
        largest = op("ReduceMax", op("Abs", x), self.constant(-1), keepdims=1)
        scale = op("Div", largest, self.number("largest", LARGEST_FP8))
        is_zero = op("Equal", scale, self.number("zero", 0.0), dtype=ir.DataType.BOOL)
        epsilon = self.number("eps", float(ml_dtypes.finfo(self.dtype.numpy()).eps))
        return self.with_scale(x, op("Where", is_zero, epsilon, scale))

    def with_scale(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """x [rows, columns] rounded to FP8 with scales [rows, 1]."""
        op, fp8 = self.op, ir.DataType.FLOAT8E4M3FN
        codes = op("Cast", op("Div", x, scale), dtype=fp8, to=int(fp8), saturate=1)
        return op("Mul", op("Cast", codes, to=int(self.dtype)), scale)

    def number(self, name: str, value: float) -> ir.Value:
        tensor = ir.Tensor(np.array(value, self.dtype.numpy()), dtype=self.dtype)
        tensor.name = f"experts.{name}"
        return initializer(self.graph.initializers, tensor)

    def product(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        stored, permutation = sorted_weight(weight)
        if permutation is not None:
            x = self.ordered(x, permutation)
        return self.op("MatMul", x, self.op("Transpose", stored, perm=[1, 0]))

    def ordered(self, x: ir.Value, permutation: ir.Value) -> ir.Value:
        """The columns of x in an order, gathered once for all products that share it."""
        if (x, permutation) not in self.gathered:
            self.gathered[x, permutation] = self.op("Gather", x, permutation, axis=-1)
        return self.gathered[x, permutation]

    def constant(self, *values: int) -> ir.Value:
        name = "experts." + "_".join(
            map(str, values if len(values) < 8 else (f"0to{len(values)}",))
        )
        return initializer(
            self.graph.initializers, ir.tensor(np.array(values, dtype=np.int64), name=name)
        )

    def experts_of(self, stack: ir.Value, parts: int) -> list[list[ir.Value]]:
        """Each expert's `parts` matrices [out, in], which are consecutive in `stack`."""
        experts, rows, columns = _shape(stack)
        reshape = stack.producer()
        if reshape is not None:
            concat = reshape.inputs[0].producer() if reshape.inputs[0] is not None else None
            stacked = (
                concat is not None
                and (reshape.op_type, concat.op_type) == ("Reshape", "Concat")
                and concat.attributes["axis"].as_int() == 0
            )
            singles = [v for v in concat.inputs if v is not None] if concat and stacked else []
            if len(singles) != experts * parts:
                raise LoweringError(
                    f"{self.node.name}: {stack.name} is not a stack of single experts"
                )
            return [singles[at : at + parts] for at in range(0, len(singles), parts)]
        tensor = stack.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.length is None:
            raise LoweringError(f"{self.node.name}: {stack.name} is not stored in a file")
        length = tensor.length // (experts * parts)
        shape = ir.Shape((rows // parts, columns))
        views = [
            initializer(
                self.graph.initializers,
                ir.ExternalTensor(
                    tensor.location,
                    (tensor.offset or 0) + index * length,
                    length,
                    tensor.dtype,
                    shape=shape,
                    name=f"{stack.name}.{index}",
                    base_dir=tensor.base_dir,
                ),
            )
            for index in range(experts * parts)
        ]
        return [views[at : at + parts] for at in range(0, len(views), parts)]


def _shape(value: ir.Value) -> tuple[int, int, int]:
    assert value.shape is not None
    experts, rows, columns = value.shape.numpy()
    return experts, rows, columns
