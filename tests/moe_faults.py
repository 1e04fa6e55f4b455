"""Seeded faults of mixtures of experts: each one is something a peer does, or an index away from right."""

from __future__ import annotations

import onnx_ir as ir
from faults import node

from qwenport.plugins import moe_experts, moe_router


def _all(model: ir.Model, op_type: str) -> list[ir.Node]:
    found = [n for n in model.graph if n.op_type == op_type]
    assert found, f"the graph has no {op_type}"
    return found


def _swap(graph_node: ir.Node, first: int, second: int) -> None:
    a, b = graph_node.inputs[first], graph_node.inputs[second]
    graph_node.replace_input_with(first, b)
    graph_node.replace_input_with(second, a)


def _stacks(model: ir.Model, kind: str) -> list[ir.Node]:
    return [n for n in _all(model, "Concat") if n.name and n.name.endswith(f"{kind}.Concat")]


def renormalised_weights(model: ir.Model) -> None:
    for router in _all(model, moe_router.NAME):
        router.attributes["normalize"] = ir.AttrInt64("normalize", 1)


def experts_swapped(model: ir.Model) -> None:
    """Experts 0 and 1 of the first sparse layer exchange their weights, whole."""
    gate_up, down = _stacks(model, "gate_up_proj")[0], _stacks(model, "down_proj")[0]
    _swap(gate_up, 0, 2)
    _swap(gate_up, 1, 3)
    _swap(down, 0, 1)


def gate_and_up_swapped(model: ir.Model) -> None:
    for concat in _stacks(model, "gate_up_proj"):
        for index in range(0, len(concat.inputs), 2):
            _swap(concat, index, index + 1)


def down_of_another_expert(model: ir.Model) -> None:
    _swap(_stacks(model, "down_proj")[-1], 2, 5)


def routers_of_each_other_s_layers(model: ir.Model) -> None:
    first, *_, last = _all(model, moe_router.NAME)
    _swap_transposed(first, last)


def _swap_transposed(first: ir.Node, last: ir.Node) -> None:
    """Exchange the weights under the products that make two routers' logits."""
    products = [router.inputs[0].producer() for router in (first, last)]
    transposes = [product.inputs[1].producer() for product in products]
    weights = [transpose.inputs[0] for transpose in transposes]
    for transpose, weight in zip(transposes, reversed(weights), strict=True):
        transpose.replace_input_with(0, weight)


def missing_shared_expert(model: ir.Model) -> None:
    for experts in _all(model, moe_experts.NAME):
        (use,) = experts.outputs[0].uses()
        assert use.node.op_type == "Add"
        use.node.outputs[0].replace_all_uses_with(experts.outputs[0])


def ungated_shared_expert(model: ir.Model) -> None:
    for experts in _all(model, moe_experts.NAME):
        (use,) = experts.outputs[0].uses()
        gated = use.node.inputs[1].producer()
        assert gated.op_type == "Mul"
        gated.outputs[0].replace_all_uses_with(gated.inputs[1])


def probabilities_left_out(model: ir.Model) -> None:
    """Every expert counts alike: 1/k."""
    for index, experts in enumerate(_all(model, moe_experts.NAME)):
        weights = experts.inputs[2]
        mean = ir.node(
            "ReduceMean", [weights, _axes(model)], attributes={"keepdims": 1}, name=f"mean.{index}"
        )
        flat = ir.node(
            "Expand",
            [mean.outputs[0], _shape_of(model, experts, weights, index)],
            name=f"flat.{index}",
        )
        for made in (mean, flat):
            made.outputs[0].name, made.outputs[0].type = made.name, weights.type
            model.graph.insert_before(experts, made)
        experts.replace_input_with(2, flat.outputs[0])


def _axes(model: ir.Model) -> ir.Value:
    import numpy as np

    if "last_axis" not in model.graph.initializers:
        tensor = ir.tensor(np.array([-1], dtype=np.int64), name="last_axis")
        model.graph.register_initializer(
            ir.Value(
                name="last_axis",
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,
                const_value=tensor,
            )
        )
    return model.graph.initializers["last_axis"]


def _shape_of(model: ir.Model, before: ir.Node, value: ir.Value, index: int) -> ir.Value:
    shape = ir.node("Shape", [value], name=f"shape.{index}")
    shape.outputs[0].name, shape.outputs[0].type = shape.name, ir.TensorType(ir.DataType.INT64)
    model.graph.insert_before(before, shape)
    return shape.outputs[0]


def dense_gate_and_up_swapped(model: ir.Model) -> None:
    """In the dense layer among the sparse ones."""
    gate = node(model, "model.layers.1.mlp.gate_proj.MatMul")
    up = node(model, "model.layers.1.mlp.up_proj.MatMul")
    first, second = gate.inputs[1], up.inputs[1]
    gate.replace_input_with(1, second)
    up.replace_input_with(1, first)
