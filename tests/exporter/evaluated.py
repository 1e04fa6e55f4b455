"""What the quantized weights of a package are, by ONNX's own evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference


def dequantized(package: Path, linear: str) -> np.ndarray[Any, Any]:
    """A weight of a package in fp64, of what model.onnx points at; the package must have no links."""
    model = onnx.load(package / "model.onnx")
    (node,) = [n for n in model.graph.node if n.name == f"{linear}.DequantizeLinear"]
    graph = onnx.helper.make_graph(
        [node],
        "weight",
        [],
        [onnx.helper.make_empty_tensor_value_info(node.output[0])],
        [t for t in model.graph.initializer if t.name in node.input],
    )
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    (weight,) = onnx.reference.ReferenceEvaluator(alone).run(None, {})
    return np.asarray(weight).astype(np.float64)


def stack_of(package: Path, name: str) -> np.ndarray[Any, Any]:
    """A value that is made of weights alone, in fp64; the package must have no links."""
    model = onnx.load(package / "model.onnx")
    needed, nodes = {name}, []
    for node in reversed(model.graph.node):
        if needed & {*node.output}:
            nodes.insert(0, node)
            needed |= {*node.input}
    graph = onnx.helper.make_graph(
        nodes,
        "stack",
        [],
        [onnx.helper.make_empty_tensor_value_info(name)],
        [t for t in model.graph.initializer if t.name in needed],
    )
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    (stack,) = onnx.reference.ReferenceEvaluator(alone).run(None, {})
    return np.asarray(stack).astype(np.float64)


def columns_of(package: Path, linear: str) -> tuple[str | None, np.ndarray[Any, Any] | None]:
    """The Gather of a linear's input, by name, and its columns; None if its input is not gathered."""
    model = onnx.load(package / "model.onnx")
    (dequantize,) = [n for n in model.graph.node if n.name == f"{linear}.DequantizeLinear"]
    (transpose,) = [n for n in model.graph.node if dequantize.output[0] in n.input]
    (product,) = [n for n in model.graph.node if transpose.output[0] in n.input]
    gathers = [n for n in model.graph.node if n.output[0] == product.input[0]]
    if not gathers or gathers[0].op_type != "Gather":
        return None, None
    (tensor,) = [t for t in model.graph.initializer if t.name == gathers[0].input[1]]
    return gathers[0].name, onnx.numpy_helper.to_array(tensor)
