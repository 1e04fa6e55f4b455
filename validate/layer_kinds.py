"""Which decoder layers of a package are the same graph, so that one of them can stand for all."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir

from qwenport.exporter import Package
from qwenport.validate.sites import hidden_states

SMALL = 64  # numbers: a constant up to this size is part of the structure, a larger one is a weight

_LAYER = re.compile(r"\.\d+\.")


def layer_kinds(package: Package, layers: int) -> dict[int, tuple[int, ...]]:
    """First layer of a kind -> all layers of that kind, among the first `layers`.

    Two layers are of the same kind if their hidden states are computed by the same operators with the same attributes
    from inputs and weights of the same shapes.

    Args:
        package: only its model.onnx is read, no weights.
        layers: how many decoder layers to examine.
    """
    graph = package.read_model().graph
    values = {value.name: value for node in graph for value in node.outputs}
    names = hidden_states(layers)
    kinds: dict[Any, list[int]] = {}
    for index in range(layers):
        entry, end = names[index], values.get(names[index + 1])
        key = ("missing", index) if end is None else _signature(end, entry)
        kinds.setdefault(key, []).append(index)
    return {found[0]: tuple(found) for found in kinds.values()}


def _signature(end: ir.Value, entry: str) -> tuple[Any, ...]:
    """The nodes that compute a value, back to the layer's input, the graph's inputs and its initializers."""
    order: dict[ir.Node, int] = {}
    lines: list[Any] = []
    pending: list[tuple[ir.Node | None, bool]] = [(end.producer(), False)]
    while pending:
        node, ready = pending.pop()
        if node is None or node in order:
            continue
        if not ready:
            pending.append((node, True))
            pending += [
                (value.producer(), False)
                for value in reversed(node.inputs)
                if value is not None and value.name != entry
            ]
            continue
        order[node] = len(lines)
        attributes = tuple(sorted(_attribute(a) for a in node.attributes.values()))
        inputs = tuple(_input(value, entry, order) for value in node.inputs)
        lines.append((node.domain, node.op_type, attributes, inputs))
    return tuple(lines)


def _input(value: ir.Value | None, entry: str, order: dict[ir.Node, int]) -> Any:
    if value is None:
        return None
    if value.name == entry:
        return "the layer's input"
    producer = value.producer()
    if producer is not None:
        return order[producer], value.index()
    tensor = value.const_value
    if tensor is None:
        return _LAYER.sub(".N.", str(value.name))
    shape = tuple(tensor.shape.numpy())
    if tensor.size <= SMALL and not isinstance(tensor, ir.ExternalTensor):
        return str(tensor.dtype), shape, tensor.tobytes()
    return str(tensor.dtype), shape


def _attribute(attribute: Any) -> tuple[str, str]:
    return attribute.name, str(attribute.value)
