"""What a runtime would otherwise do each time it loads a graph: compute small constants, drop casts that do nothing."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class FoldConstants(InPlacePass):
    """Nodes of constants only -> their results. A tensor in a file is no such constant: it is never read here."""

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        from onnx.reference import ReferenceEvaluator
        from onnx_ir.passes.common import LiftConstantsToInitializersPass

        graph = model.graph
        lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        modified = lift(model).modified
        for node in [*graph]:
            given = [value for value in node.inputs if value is not None]
            if not given or not all(map(_is_small_constant, given)):
                continue
            if any(value.is_graph_output() for value in node.outputs):
                continue
            evaluator = ReferenceEvaluator(ir.to_proto(node), opsets=dict(model.opset_imports))
            arrays = {str(v.name): v.const_value.numpy() for v in given if v.const_value}
            for old, array in zip(node.outputs, evaluator.run(None, arrays), strict=True):
                name = str(old.name)
                tensor = ir.tensor(array, name=name)
                new = ir.Value(
                    name=name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(array.shape),
                    const_value=tensor,
                )
                old.name = f"{name}.folded"
                old.replace_all_uses_with(new)
                graph.initializers[name] = new
            graph.remove(node, safe=True)
            for value in given:
                if not value.uses() and value.name in graph.initializers:
                    del graph.initializers[value.name]
            modified = True
        return PassResult(model, modified)


class DropCasts(InPlacePass):
    """Cast to the dtype that a value has already -> the value itself, which takes the name if it is an output."""

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        modified = False
        for node in [*model.graph]:
            if node.op_type != "Cast" or node.domain != "":
                continue
            (value,), (result,) = node.inputs, node.outputs
            if value is None or value.dtype != ir.DataType(node.attributes["to"].as_int()):
                continue
            if result.is_graph_output():
                if value.producer() is None or value.is_graph_output():
                    continue
                value.name, result.name = result.name, f"{result.name}.cast"
                value.type, value.shape = result.type, result.shape
            result.replace_all_uses_with(value, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            modified = True
        return PassResult(model, modified)


def _is_small_constant(value: ir.Value) -> bool:
    return (
        value.is_initializer()
        and value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
    )
