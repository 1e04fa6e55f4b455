"""Turning nodes of a graph into nodes of a TensorRT plugin.

TensorRT's parser treats a node as a plugin if its operator is neither an ONNX operator nor a function of the model,
and it looks at the name alone. So an operator becomes a plugin everywhere, with its function removed, or nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qwenport.contract import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION


def is_plugin(node: ir.Node) -> bool:
    """Whether TensorRT should look a node up among its plugins."""
    return node.domain == DOMAIN and "plugin_version" in node.attributes


def nodes_of(model: ir.Model, name: str) -> list[ir.Node]:
    """The nodes of one of the custom operators."""
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, name)]


def as_plugin(node: ir.Node, attributes: Sequence[ir.Attr] = ()) -> None:
    """Turn a node into one of the plugin with its operator's name, with exactly these attributes."""
    node.attributes.clear()
    for attribute in attributes:
        node.attributes.add(attribute)
    node.attributes.add(ir.AttrString("plugin_version", PLUGIN_VERSION))
    node.attributes.add(ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE))


def without_function(model: ir.Model, name: str) -> None:
    """Remove an operator's function body."""
    model.functions.pop((DOMAIN, name, ""))


def use_everywhere(
    model: ir.Model, name: str, serves: Callable[[ir.Node], bool], attributes: Mapping[str, int]
) -> bool:
    """Turn an operator's nodes into nodes of the plugin of that name, if the kernels support all of them.

    Args:
        model: changed in place.
        name: the operator's name.
        serves: whether the kernels support a node.
        attributes: the plugin's integer attributes, with the operator's defaults.
    """
    nodes = nodes_of(model, name)
    if not nodes or not all(map(serves, nodes)):
        return False
    for node in nodes:
        values = [
            ir.AttrInt64(each, integer(node, each, default)) for each, default in attributes.items()
        ]
        as_plugin(node, values)
    without_function(model, name)
    return True


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def size(value: ir.Value | None, axis: int) -> int:
    """A static size; 0 if it is not known."""
    found = None if value is None or value.shape is None else value.shape[axis]
    return found if isinstance(found, int) else 0
