"""What TensorRT's parser would drop or misread, found before and after it parses.

The parser reports a dropped input as a warning and builds an engine that attends to garbage. Here every
such case is an error that names the node.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from qwenport.contract import WITH_QUERIES, is_past, is_present, is_query, past_of, query
from qwenport.engines.errors import LoweringError
from qwenport.plugins.as_plugin import is_plugin

ATTENTION_INPUTS = 4  # q, k, v, mask


def check_graph(model: ir.Model) -> None:
    """Refuse ONNX nodes that TensorRT's parser is known to misread.

    Raises:
        LoweringError: Attention without an explicit mask, with `is_causal` (upper-left aligned: wrong
            over a cache), or with inputs or outputs that the parser drops (past_key, past_value,
            nonpad_kv_seqlen); an operator of an undefined domain; a function with the name of an ONNX
            operator that computes something else.
    """
    functions = {(f.domain, f.name) for f in model.functions.values()}
    for function in model.functions.values():
        _check_name(function)
    for node in model.graph:
        defined = (node.domain, node.op_type) in functions or is_plugin(node)
        if node.domain not in ("", "ai.onnx") and not defined:
            raise LoweringError(
                f"{node.name}: {node.domain}.{node.op_type} has neither a function body nor a plugin"
            )
        if node.op_type != "Attention":
            continue
        if len(node.inputs) < ATTENTION_INPUTS or node.inputs[3] is None:
            raise LoweringError(f"{node.name}: Attention without an explicit mask")
        if any(value is not None for value in node.inputs[ATTENTION_INPUTS:]):
            raise LoweringError(
                f"{node.name}: TensorRT's parser drops Attention's inputs after the mask"
            )
        if "is_causal" in node.attributes and node.attributes["is_causal"].as_int():
            raise LoweringError(f"{node.name}: is_causal is aligned upper-left, wrong over a cache")
        if len(node.outputs) != 1:
            raise LoweringError(f"{node.name}: TensorRT's Attention has one output")


def _check_name(function: ir.Function) -> None:
    """The parser looks at an operator's name alone: it never reads the body of one that it knows itself."""
    if not onnx.defs.has(function.name):
        return
    nodes = list(function)
    same = len(nodes) == 1 and (nodes[0].domain, nodes[0].op_type) == ("", function.name)
    if same:
        known = onnx.defs.get_schema(function.name, function.opset_imports[""]).attributes
        for name, attribute in nodes[0].attributes.items():
            default = onnx.helper.get_attribute_value(known[name].default_value)
            same = same and attribute.value == default
    if not same:
        raise LoweringError(
            f"{function.domain}.{function.name}: TensorRT's parser would take it for ONNX's {function.name}, "
            "which its body is not"
        )


def check_network(network: Any, trt: Any) -> None:
    """Refuse a parsed network in which something was lost.

    Args:
        network: an INetworkDefinition.
        trt: the module it comes from (tensorrt or tensorrt_rtx).

    Raises:
        LoweringError: an input that no layer reads, an attention without a mask, a `present` output that
            does not share its `past_key_values` input's memory, or a cache that another layer reads: whether before
            or after the update is undefined.
    """
    read: set[str] = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        names = [layer.get_input(i) for i in range(layer.num_inputs)]
        read.update(tensor.name for tensor in names if tensor is not None)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            attention = layer.attention
            if attention.mask is None or attention.causal:
                raise LoweringError(f"{layer.name}: parsed without its explicit mask")
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name not in read:
            raise LoweringError(f"network input {name} is read by no layer: the parser dropped it")
    _check_caches(network, trt)


def check_changed(network: Any, trt: Any, form: str) -> None:
    """Refuse a network whose attention was changed wrongly; see `change_attention`.

    Args:
        network: an INetworkDefinition.
        trt: the module it comes from.
        form: the form that its attention has now.

    Raises:
        LoweringError: a cache that is not updated in place or is read before its update, an attention with neither a
            mask nor lengths, or outputs `query.N` that are not what the attentions with lengths read.
    """
    _check_caches(network, trt)
    queries = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        layer.__class__ = trt.IAttentionInputLayer
        attention = layer.attention
        if attention.key_value_lengths is not None:
            queries.append(attention.get_input(0).name)
            if attention.causal_kind != trt.CausalMaskKind.LOWER_RIGHT:
                raise LoweringError(
                    f"{layer.name}: lengths without a causal mask of each row's end"
                )
        elif attention.mask is None or attention.causal:
            raise LoweringError(f"{layer.name}: neither a mask nor lengths")
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    layers = sum(map(is_present, outputs)) // 2 if form in WITH_QUERIES else 0
    wanted = sorted(query(layer) for layer in range(layers))
    if not sorted(queries) == sorted(filter(is_query, outputs)) == wanted:
        raise LoweringError(
            f"attention of form {form} with lengths over {', '.join(queries) or 'nothing'}, and outputs "
            f"{', '.join(filter(is_query, outputs)) or 'without queries'}"
        )


def _check_caches(network: Any, trt: Any) -> None:
    """Every cache is updated in place, and read by its update alone."""
    updated: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for number in range(layer.num_inputs):
            tensor = layer.get_input(number)
            if tensor is not None and is_past(tensor.name):
                readers.setdefault(tensor.name, []).append(layer.name)
        if layer.type == trt.LayerType.KV_CACHE_UPDATE:
            updated[layer.get_output(0).name] = layer.get_input(0).name
    for name, layers in readers.items():
        if len(layers) > 1:
            raise LoweringError(
                f"{name} is read by {' and '.join(layers)}: it is updated in place, so what the others find in it "
                "depends on when they run"
            )
    for index in range(network.num_outputs):
        name = network.get_output(index).name
        if not is_present(name):
            continue
        past = past_of(name)
        if updated.get(name) != past:
            raise LoweringError(f"network output {name} is not an in-place update of {past}")
