"""Attention as primitive operators, for dtypes without a fused kernel on the target."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.plugins.nodes import append_node, initializer


class DecomposeAttention(InPlacePass):
    """Attention(q, k, v, mask) -> MatMul, Where, Softmax, MatMul over grouped heads.

    q [B, H, S, D] becomes [B, G, H/G, S, D] against k, v [B, G, 1, N, D]; nothing is repeated in memory.
    """

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        modified = False
        for node in [*model.graph]:
            if node.op_type == "Attention" and node.domain == "":
                self._replace(model.graph, node)
                modified = True
        return PassResult(model, modified)

    def _replace(self, graph: ir.Graph, node: ir.Node) -> None:
        q, k, v, mask = node.inputs
        (result,) = node.outputs
        assert q is not None and k is not None and v is not None and q.dtype is not None
        dtype = q.dtype
        nodes: list[ir.Node] = []

        def op(kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
            name = f"{node.name}.{kind}_{len(nodes)}"
            return append_node(nodes, kind, inputs, name, attributes=attributes)[0]

        def constant(name: str, array: np.ndarray) -> ir.Value:
            stated = dtype if array.dtype == np.float32 else None
            return initializer(graph.initializers, ir.tensor(array, dtype=stated, name=name))

        # Only fp32 targets use this pass, so the lowest fp32 number serves as the mask value.
        two = constant("attention.axis_2", np.array([2], dtype=np.int64))
        scale = node.attributes["scale"].as_float()
        sizes = op("Shape", q)
        batch, tail = op("Shape", q, start=0, end=1), op("Shape", q, start=2)
        groups = constant("attention.groups", np.array([self.kv_heads, -1], dtype=np.int64))
        grouped = op("Reshape", q, op("Concat", batch, groups, tail, axis=0))
        keys = op("Transpose", op("Unsqueeze", k, two), perm=[0, 1, 2, 4, 3])
        scaled = op("Mul", grouped, constant("attention.scale", np.array(scale, dtype=np.float32)))
        scores = op("MatMul", scaled, keys)
        lowest = constant("attention.masked", np.array(np.finfo(np.float32).min, dtype=np.float32))
        masked = op("Where", op("Unsqueeze", mask, two), scores, lowest)
        weights = op("Softmax", masked, axis=-1)
        mixed = op("MatMul", weights, op("Unsqueeze", v, two))
        output = op("Reshape", mixed, sizes)
        output.name, output.type, output.shape = result.name, result.type, result.shape
        graph.insert_before(node, nodes)
        result.replace_all_uses_with(output, replace_graph_outputs=True)
        graph.remove(node, safe=True)
