"""Rows of a quantized embedding on onnxruntime's CPU: com.microsoft.GatherBlockQuantized dequantizes those looked up.

It takes the codes in the shape that MatMulNBits has, [N, blocks, bytes], so that a tied head multiplies by the same
tensor. Scales and zero points then have a last axis of one, which onnxruntime gives them when it loads the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qwenport.contract import FP32
from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering.fused_matmul import DOMAIN
from qwenport.plugins.nodes import append_node, initializer


def is_lookup(node: ir.Node, operand: int) -> bool:
    """Whether a node looks rows up in its input number `operand`."""
    axis = node.attributes.get("axis")
    rows = axis is None or axis.as_int() == 0
    return node.op_type == "Gather" and node.domain == "" and operand == 0 and rows


def look_up(graph: ir.Graph, gather: ir.Node, inputs: list[ir.Value], *, bits: int) -> None:
    """Replace the Gather of a dequantized weight.

    Args:
        graph: the graph.
        gather: looks up rows; its result has the rank of its indices and one more.
        inputs: the codes as bytes [N, blocks, bytes], the scales [N, blocks] and, unless the middle code is zero's, the
            zero points.
        bits: of a code.

    Raises:
        LoweringError: zero points of 4 bits, of which two share a byte.
    """
    codes, *others = inputs
    if bits == 4 and len(others) > 1:
        raise LoweringError(
            f"{gather.name}: onnxruntime looks up no rows of 4 bits with zero points"
        )
    assert codes.shape is not None
    _, blocks, octets = codes.shape.numpy()
    nodes: list[ir.Node] = []

    def constant(name: str, *values: int) -> ir.Value:
        return initializer(graph.initializers, ir.tensor(np.array(values, np.int64), name=name))

    def op(op_type: str, values: list[Any], name: str, dtype: Any, **how: Any) -> ir.Value:
        return append_node(nodes, op_type, values, name, [(dtype, None)], **how)[0]

    last = constant("const_last_axis", -1)
    columns = [op("Unsqueeze", [v, last], f"{v.name}.columns", v.dtype) for v in others]
    (old,), indices = gather.outputs, gather.inputs[1]
    assert indices is not None and indices.shape is not None
    name, block = str(old.name), octets * 8 // bits
    rows = op(
        "GatherBlockQuantized",
        [codes, indices, *columns],
        f"{name}.blocks",
        FP32.ir,
        domain=DOMAIN,
        attributes={"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 2},
    )
    sizes = [0] * len(indices.shape) + [blocks * block]
    made = op("Reshape", [rows, constant(f"{name}.sizes", *sizes)], f"{name}.rows", FP32.ir)
    graph.insert_before(gather, nodes)
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    made.shape = old.shape
    graph.remove(gather, safe=True)
    made.name = name
