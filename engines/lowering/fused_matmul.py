"""Weights stay [out, in] in onnxruntime: one transposing matmul in place of Transpose and MatMul.

onnxruntime would fold the Transpose into a second copy of every weight when it loads the model, and then pack a
third. FusedMatMul packs the weight in its stored layout, so the model loads in less time and memory and decodes faster.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

DOMAIN = "com.microsoft"


class FuseTransposedMatMul(InPlacePass):
    """MatMul(x, Transpose(w)) -> com.microsoft.FusedMatMul(x, w, transB=1), for two-dimensional w."""

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        graph, modified = model.graph, False
        for node in [*graph]:
            weight = _transposed(node)
            if weight is None:
                continue
            transpose = node.inputs[1].producer()
            fused = ir.node(
                "FusedMatMul",
                [node.inputs[0], weight],
                domain=DOMAIN,
                attributes={"transB": 1},
                name=node.name,
            )
            (old,), (new,) = node.outputs, fused.outputs
            new.name, new.type, new.shape = old.name, old.type, old.shape
            graph.insert_before(node, fused)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            if transpose is not None and not transpose.outputs[0].uses():
                graph.remove(transpose, safe=True)
            modified = True
        if modified:
            model.opset_imports[DOMAIN] = 1
        return PassResult(model, modified)


def _transposed(node: ir.Node) -> ir.Value | None:
    """w, if `node` is MatMul(x, Transpose(w)) with the two axes of w exchanged."""
    if node.op_type != "MatMul" or node.domain != "" or node.inputs[1] is None:
        return None
    producer = node.inputs[1].producer()
    if producer is None or producer.op_type != "Transpose":
        return None
    if tuple(producer.attributes["perm"].as_ints()) != (1, 0):
        return None
    return producer.inputs[0]
