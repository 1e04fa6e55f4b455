"""Compute a bf16 or fp16 package in fp32, without rewriting a weight.

onnxruntime's CPU MatMul has no bf16. Every half-precision initializer gets a Cast, which onnxruntime folds
when it loads the model, so the package's bytes stay unchanged.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport import contract

HALF = tuple(dtype.ir for dtype in contract.HALF)
FLOAT = contract.FP32.ir


class ComputeInFloat32(InPlacePass):
    """Cast half-precision weights to fp32; inputs, outputs and everything in between become fp32."""

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place; modified is false for a model that is fp32 already."""
        graph = model.graph
        modified = False
        casts: list[ir.Node] = []
        looked_up: set[ir.Value] = set()
        for value in [*graph.initializers.values()]:
            if value.dtype not in HALF:
                continue
            modified = True
            # A table that is only looked up stays unchanged: the rows are cast, not the table.
            lookups = [use for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
            for use in lookups:
                (rows,) = use.node.outputs
                cast = _cast(rows)
                (widened,) = cast.outputs
                rows.replace_all_uses_with(widened, replace_graph_outputs=True)
                cast.replace_input_with(0, rows)
                # the fp32 rows take the name, since they are what observers look for
                rows.name, widened.name = f"{rows.name}.stored", rows.name
                graph.insert_after(use.node, cast)
                looked_up.add(rows)
            others = [use for use in value.uses() if use not in lookups]
            if others:
                cast = _cast(value)
                for use in others:
                    use.node.replace_input_with(use.idx, cast.outputs[0])
                casts.append(cast)
        for node in graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() in map(int, HALF):
                node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
            if value.dtype in HALF and value not in looked_up:
                value.type = ir.TensorType(FLOAT)
                modified = True
        if casts:
            graph.insert_before(graph[0], casts)
        return PassResult(model, modified)


def _cast(value: ir.Value) -> ir.Node:
    name = f"{value.name}.fp32"
    node = ir.node("Cast", [value], attributes={"to": int(FLOAT)}, name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(FLOAT)
    return node
