"""MoERouter as a TensorRT plugin, where the kernel supports it."""

from __future__ import annotations

import onnx_ir as ir

from qwenport.contract import MOST_CHOSEN, MOST_EXPERTS
from qwenport.plugins.as_plugin import integer, size, use_everywhere
from qwenport.plugins.moe_router.schema import NAME, TOP_K


def use_plugin(model: ir.Model) -> bool:
    """MoERouter of kind top_k -> the plugin of its name. Changes `model`; returns whether it did."""
    return use_everywhere(model, NAME, _is_served, {"k": 1, "normalize": 0})


def _is_served(node: ir.Node) -> bool:
    return (
        node.attributes["kind"].as_string() == TOP_K
        and 1 <= size(node.inputs[0], -1) <= MOST_EXPERTS
        and integer(node, "k", 1) <= MOST_CHOSEN
    )
