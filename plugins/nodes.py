"""Nodes and initializers of an ONNX graph, as the exporter, the function bodies and the passes create them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import onnx_ir as ir

Result = tuple[ir.DataType | None, ir.Shape | None]
UNKNOWN: Result = (None, None)


def append_node(
    nodes: list[ir.Node],
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    results: Sequence[Result] = (UNKNOWN,),
    *,
    domain: str = "",
    attributes: Mapping[str, Any] | None = None,
    separator: str = ".",
) -> Sequence[ir.Value]:
    """Append a node and return its outputs.

    Args:
        nodes: the list to append to.
        op_type: the operator.
        inputs: the inputs; None for an omitted one.
        name: name of the node and of its output; several outputs are numbered.
        results: (dtype, shape) of each output, None where unknown.
        domain: the operator's domain.
        attributes: values, or onnx_ir attributes (references to a function's attributes).
        separator: between the name and the number of an output.
    """
    given = dict(attributes or {})
    made = {key: value for key, value in given.items() if isinstance(value, ir.Attr)}
    plain = {key: value for key, value in given.items() if key not in made}
    node = ir.node(
        op_type, inputs, domain=domain, attributes=plain, num_outputs=len(results), name=name
    )
    for attribute in made.values():
        node.attributes[attribute.name] = attribute
    for index, (value, (dtype, shape)) in enumerate(zip(node.outputs, results, strict=True)):
        value.name = name if len(results) == 1 else f"{name}{separator}{index}"
        value.type = None if dtype is None else ir.TensorType(dtype)
        value.shape = shape
    nodes.append(node)
    return node.outputs


def initializer(known: MutableMapping[str, ir.Value], tensor: ir.TensorProtocol) -> ir.Value:
    """The value of an initializer from those `known` by name, created on first use."""
    name = tensor.name
    assert name is not None
    if name not in known:
        known[name] = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=tensor.shape,  # type: ignore[arg-type]
            const_value=tensor,
        )
    return known[name]


def remove_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove a value that nothing uses, the node that makes it, and what only that was given; leave one in use."""
    node = value.producer()
    if node is None:
        if value.is_initializer() and not value.uses():
            del graph.initializers[str(value.name)]
        return
    if any(output.uses() for output in node.outputs):
        return
    inputs = dict.fromkeys(given for given in node.inputs if given is not None)
    graph.remove(node, safe=True)
    for given in inputs:
        remove_unused(graph, given)
