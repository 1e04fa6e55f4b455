"""MoEExperts as a TensorRT plugin, where the kernels support it."""

from __future__ import annotations

import onnx_ir as ir

from qwenport.contract import MOST_CHOSEN, MOST_EXPERTS
from qwenport.plugins.as_plugin import integer, size, use_everywhere
from qwenport.plugins.moe_experts.schema import INPUTS, NAME


def use_plugin(model: ir.Model) -> bool:
    """MoEExperts by token -> the plugin of its name. Changes `model`; returns whether it did."""
    return use_everywhere(model, NAME, _is_served, {})


def _is_served(node: ir.Node) -> bool:
    return (
        len(node.inputs) == len(INPUTS)
        and not integer(node, "by_expert", 0)
        and not integer(node, "round_inner", 0)
        and 1 <= size(node.inputs[1], -1) <= MOST_CHOSEN
        and 1 <= size(node.inputs[4], 0) <= MOST_EXPERTS
    )
