"""MoEExperts for TensorRT without the plugin: a body whose decode steps read the chosen experts' weights once."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from qwenport.contract import DOMAIN, MOE_EXPERTS
from qwenport.plugins.moe_experts import BY_COLUMNS, INPUTS, body_by_columns, tensorrt_body


class ReadExpertsOnce(InPlacePass):
    """The package's body of MoEExperts by token -> the one for TensorRT, or the function BY_COLUMNS.

    That is where `UseSignedCodes` has given a node the order of its weights' columns. A body that rounds to FP8 is
    inlined: TensorRT's parser gives its layers one name in every call, and refuses the second.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        identifier = (DOMAIN, MOE_EXPERTS, "")
        function = model.functions.get(identifier)
        if function is None or function.attributes["by_expert"].as_int():
            return PassResult(model, modified=False)
        nodes = [node for node in model.graph if node.op_identifier() == identifier]
        opset = function.opset_imports[""]
        scales = any(len(node.inputs) == len(INPUTS) + 1 for node in nodes)
        if scales or function.attributes["round_inner"].as_int():
            dtype = nodes[0].outputs[0].dtype
            model.functions[identifier] = tensorrt_body(opset, dtype, input_scales=scales)
            InlinePass()(model)
            LiftConstantsToInitializersPass(size_limit=0)(model)
            return PassResult(model, modified=True)
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
