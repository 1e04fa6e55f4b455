"""The custom operators as TensorRT plugins, where the kernels serve them.

TensorRT's parser takes a node for a plugin if its operator is neither one of ONNX's own nor a function of the model,
and goes by the name alone. So an operator becomes a plugin everywhere, with its function gone, or nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from qwenport.plugins import DOMAIN, MOE_EXPERTS, MOE_ROUTER, ROTARY_EMBEDDING
from qwenport.plugins.compiled import (
    MOST_CHOSEN,
    MOST_EXPERTS,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    ROTARY_EMBEDDING_QK,
)

PLUGINS = (ROTARY_EMBEDDING_QK, MOE_ROUTER, MOE_EXPERTS)


class UsePlugins(InPlacePass):
    """RotaryEmbedding in pairs -> RotaryEmbeddingQK; MoERouter and MoEExperts -> the plugins of these names."""

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place."""
        modified = _fuse_rotations(model)
        modified |= _replace(model, MOE_ROUTER, _is_served_router, ("k", "normalize"))
        modified |= _replace(model, MOE_EXPERTS, _is_served_experts, ())
        return PassResult(model, modified)


def plugin_layers(model: ir.Model) -> dict[str, int]:
    """How often each plugin is used in a lowered graph."""
    used = Counter(node.op_type for node in model.graph if is_plugin(node))
    return {name: used[name] for name in PLUGINS if used[name]}


def is_plugin(node: ir.Node) -> bool:
    """Whether a node is to be found among TensorRT's plugins."""
    return node.domain == DOMAIN and "plugin_version" in node.attributes


def _nodes(model: ir.Model, name: str) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, name)]


def _as_plugin(node: ir.Node, attributes: Sequence[ir.Attr]) -> None:
    node.attributes.clear()
    for attribute in attributes:
        node.attributes.add(attribute)
    node.attributes.add(ir.AttrString("plugin_version", PLUGIN_VERSION))
    node.attributes.add(ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE))


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _size(value: ir.Value | None, axis: int) -> int:
    """A size that is known; 0 if it is not."""
    size = None if value is None or value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else 0


def _is_served_router(node: ir.Node) -> bool:
    return (
        node.attributes["kind"].as_string() == "top_k"
        and 1 <= _size(node.inputs[0], -1) <= MOST_EXPERTS
        and _integer(node, "k", 1) <= MOST_CHOSEN
    )


def _is_served_experts(node: ir.Node) -> bool:
    return (
        not _integer(node, "by_expert", 0)
        and 1 <= _size(node.inputs[1], -1) <= MOST_CHOSEN
        and 1 <= _size(node.inputs[4], 0) <= MOST_EXPERTS
    )


def _replace(
    model: ir.Model, name: str, serves: Callable[[ir.Node], bool], attributes: Sequence[str]
) -> bool:
    nodes = _nodes(model, name)
    if not nodes or not all(serves(node) for node in nodes):
        return False
    defaults = {"k": 1, "normalize": 0}
    for node in nodes:
        values = [ir.AttrInt64(each, _integer(node, each, defaults[each])) for each in attributes]
        _as_plugin(node, values)
    model.functions.pop((DOMAIN, name, ""))
    return True


def _fuse_rotations(model: ir.Model) -> bool:
    """Neighbours that rotate by the same angles; one that has no partner keeps its function."""
    fused = False
    waiting: ir.Node | None = None
    for node in [*model.graph]:
        if waiting is not None and any(value in waiting.outputs for value in node.inputs):
            waiting = None  # its result is needed before a partner has come
        if (node.domain, node.op_type) != (DOMAIN, ROTARY_EMBEDDING):
            continue
        if waiting is None or waiting.inputs[1:] != node.inputs[1:]:
            waiting = node
            continue
        _fuse(model.graph, waiting, node)
        waiting, fused = None, True
    if fused and not _nodes(model, ROTARY_EMBEDDING):
        model.functions.pop((DOMAIN, ROTARY_EMBEDDING, ""))
    return fused


def _fuse(graph: ir.Graph, first: ir.Node, second: ir.Node) -> None:
    both = ir.node(
        ROTARY_EMBEDDING_QK,
        [first.inputs[0], *second.inputs],
        domain=DOMAIN,
        num_outputs=2,
        name=f"{second.name}.QK",
    )
    _as_plugin(both, [])
    graph.insert_before(second, both)
    for old, new in zip((first.outputs[0], second.outputs[0]), both.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.replaced"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([first, second], safe=True)
