"""Norms, biases, and weights in each other's place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from defects.tools import constant, given, insert, node, nodes, replace_uses


def wrong_epsilon(model: ir.Model) -> None:
    for norm in nodes(model, "RMSNormalization"):
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def wrong_epsilon_in_one_norm(model: ir.Model) -> None:
    norm = node(model, "model.layers.0.input_layernorm.RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def norm_without_weight(model: ir.Model) -> None:
    """One norm that only divides, as if its weight were all ones."""
    norm = node(model, "model.layers.1.input_layernorm.RMSNormalization")
    weight = given(norm.inputs[1])
    assert weight.shape is not None and weight.dtype is not None
    ones = np.ones(weight.shape.numpy())
    norm.replace_input_with(1, constant(model, "defect.ones", ones, weight.dtype))


def norm_subtracts_the_mean(model: ir.Model) -> None:
    """LayerNorm without its bias in the place of one RMSNorm."""
    norm = node(model, "model.layers.2.post_attention_layernorm.RMSNormalization")
    x, last = given(norm.inputs[0]), constant(model, "defect.last", [-1])
    mean = insert(model, norm, "ReduceMean", [x, last], "defect.mean", keepdims=1)
    norm.replace_input_with(0, insert(model, norm, "Sub", [x, mean], "defect.centred"))


def missing_bias(model: ir.Model) -> None:
    """The value projection of one layer without its bias."""
    add = node(model, "model.layers.2.self_attn.v_proj.Add")
    replace_uses(add.outputs[0], given(add.inputs[0]), by=lambda user: True)


def doubled_bias(model: ir.Model) -> None:
    """The query projection of one layer gets its bias twice."""
    add = node(model, "model.layers.3.self_attn.q_proj.Add")
    once = insert(model, add, "Add", [*add.inputs], "defect.once")
    add.replace_input_with(0, once)


def query_bias_on_key(model: ir.Model) -> None:
    """One layer's keys get the first of its queries' biases."""
    query, key = (node(model, f"model.layers.1.self_attn.{p}_proj.Add") for p in "qk")
    key.replace_input_with(1, _rows(model, key, given(query.inputs[1]), 0, _size(key.inputs[1])))


def swapped_key_and_value_weights(model: ir.Model) -> None:
    key, value = (node(model, f"model.layers.1.self_attn.{p}_proj.Transpose") for p in "kv")
    key_weight, value_weight = key.inputs[0], value.inputs[0]
    key.replace_input_with(0, value_weight)
    value.replace_input_with(0, key_weight)


def swapped_query_and_key_weights(model: ir.Model) -> None:
    """One layer's stacked rows [query; key] cut as if the key's came first."""
    query, key = (node(model, f"model.layers.2.self_attn.{p}_proj.Transpose") for p in "qk")
    query_weight, key_weight = given(query.inputs[0]), given(key.inputs[0])
    size, cut = _size(query_weight), _size(key_weight)
    rest = _rows(model, query, query_weight, cut, size)
    key.replace_input_with(0, _rows(model, query, query_weight, 0, cut))
    stacked = insert(model, query, "Concat", [rest, key_weight], "defect.stacked", axis=0)
    query.replace_input_with(0, stacked)


def transposed_weight(model: ir.Model) -> None:
    """One output projection, which is square, used as it is stored: [out, in] taken for [in, out]."""
    product = node(model, "model.layers.0.self_attn.o_proj.MatMul")
    transpose = given(product.inputs[1]).producer()
    assert transpose is not None
    product.replace_input_with(1, transpose.inputs[0])


def dense_gate_and_up_swapped(model: ir.Model) -> None:
    """In the dense layer among the sparse ones."""
    gate = node(model, "model.layers.1.mlp.gate_proj.MatMul")
    up = node(model, "model.layers.1.mlp.up_proj.MatMul")
    first, second = gate.inputs[1], up.inputs[1]
    gate.replace_input_with(1, second)
    up.replace_input_with(1, first)


def _size(value: ir.Value | None) -> int:
    shape = given(value).shape
    assert shape is not None
    return int(shape.numpy()[0])


def _rows(model: ir.Model, before: ir.Node, value: ir.Value, start: int, stop: int) -> ir.Value:
    bounds = [constant(model, f"defect.{n}", [n]) for n in (start, stop)]
    axis = constant(model, "defect.axis_0", [0])
    return insert(model, before, "Slice", [value, *bounds, axis], f"defect.rows_{start}_{stop}")
