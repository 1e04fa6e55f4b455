"""MoEExperts for TensorRT without the plugin: a body whose decode steps read the chosen experts' weights once."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.contract import DOMAIN, MOE_EXPERTS
from qwenport.engines.errors import LoweringError
from qwenport.plugins.as_plugin import integer
from qwenport.plugins.moe_experts import BY_COLUMNS, INPUTS, body_by_columns, tensorrt_body


class ReadExpertsOnce(InPlacePass):
    """The package's body of MoEExperts by token -> the one for TensorRT, or the function BY_COLUMNS.

    That is where `UseSignedCodes` has given a node the order of its weights' columns.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place.

        Raises:
            LoweringError: experts round their activations.
        """
        identifier = (DOMAIN, MOE_EXPERTS, "")
        function = model.functions.get(identifier)
        if function is None or function.attributes["by_expert"].as_int():
            return PassResult(model, modified=False)
        if any(_rounds(node) for node in model.graph):
            raise LoweringError(
                "experts whose activations are rounded to FP8 are not supported by TensorRT here; use --target "
                "onnxruntime"
            )
        opset = function.opset_imports[""]
        model.functions[identifier] = tensorrt_body(opset)
        ordered = [
            node
            for node in model.graph
            if node.op_identifier() == identifier and len(node.inputs) > len(INPUTS)
        ]
        for node in ordered:
            node.op_type = BY_COLUMNS
        if ordered:
            made = body_by_columns(opset)
            model.functions[made.identifier()] = made
        return PassResult(model, modified=True)


def _rounds(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, MOE_EXPERTS) and (
        len(node.inputs) == len(INPUTS) + 1 or bool(integer(node, "round_inner", 0))
    )
