"""RotaryEmbedding as a TensorRT plugin: two nodes that rotate by the same angles become one RotaryEmbeddingQK."""

from __future__ import annotations

import onnx_ir as ir

from qwenport.contract import DOMAIN, ROTARY_EMBEDDING_QK
from qwenport.plugins.as_plugin import as_plugin, nodes_of, without_function
from qwenport.plugins.rotary_embedding.schema import NAME


def use_plugin(model: ir.Model) -> bool:
    """Fuse neighbours that rotate by the same angles; a node without a partner keeps its function.

    Changes `model`; returns whether it did.
    """
    fused = False
    waiting: ir.Node | None = None
    for node in [*model.graph]:
        if waiting is not None and any(value in waiting.outputs for value in node.inputs):
            waiting = None  # its result is needed before a partner was found
        if (node.domain, node.op_type) != (DOMAIN, NAME):
            continue
        if waiting is None or waiting.inputs[1:] != node.inputs[1:]:
            waiting = node
            continue
        _fuse(model.graph, waiting, node)
        waiting, fused = None, True
    if fused and not nodes_of(model, NAME):
        without_function(model, NAME)
    return fused


def _fuse(graph: ir.Graph, first: ir.Node, second: ir.Node) -> None:
    both = ir.node(
        ROTARY_EMBEDDING_QK,
        [first.inputs[0], *second.inputs],
        domain=DOMAIN,
        num_outputs=2,
        name=f"{second.name}.QK",
    )
    as_plugin(both)
    graph.insert_before(second, both)
    for old, new in zip((first.outputs[0], second.outputs[0]), both.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.replaced"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([first, second], safe=True)
