"""Mixtures of experts: each one is something a peer does, or an index away from right.

Where experts change places the package must hold one tensor an expert: its own dtype, weights not packed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from defects.tools import INT64, constant, given, insert, nodes, replace_uses, rounded, swap_inputs
from qwenport.plugins import moe_experts, moe_router


def _stacks(model: ir.Model, kind: str) -> list[ir.Node]:
    return [n for n in nodes(model, "Concat") if n.name and n.name.endswith(f"{kind}.Concat")]


def renormalised_weights(model: ir.Model) -> None:
    for router in nodes(model, moe_router.NAME):
        router.attributes["normalize"] = ir.AttrInt64("normalize", 1)


def one_expert_too_few(model: ir.Model) -> None:
    _choose(model, -1)


def one_expert_too_many(model: ir.Model) -> None:
    _choose(model, +1)


def _choose(model: ir.Model, more: int) -> None:
    for router in nodes(model, moe_router.NAME):
        k = router.attributes["k"].as_int() + more
        router.attributes["k"] = ir.AttrInt64("k", k)
        for value in router.outputs:
            assert value.shape is not None
            value.shape = ir.Shape([*value.shape[:-1], k])


def router_logits_in_bf16(model: ir.Model) -> None:
    """Router logits go through bf16. In a bf16 package, run in bf16, they do so rightly."""
    for index, router in enumerate(nodes(model, moe_router.NAME)):
        logits = given(router.inputs[0])
        half = rounded(model, router, logits, ir.DataType.BFLOAT16, f"defect.half.{index}")
        router.replace_input_with(0, half)


def experts_swapped(model: ir.Model) -> None:
    """Experts 0 and 1 of the first sparse layer exchange their weights, whole."""
    gate_up, down = _stacks(model, "gate_up_proj")[0], _stacks(model, "down_proj")[0]
    swap_inputs(gate_up, 0, 2)
    swap_inputs(gate_up, 1, 3)
    swap_inputs(down, 0, 1)


def experts_shifted_by_one(model: ir.Model) -> None:
    """In the second sparse layer each expert has the weights of the next, the last those of the first."""
    for kind, tensors in (("gate_up_proj", 2), ("down_proj", 1)):
        concat = _stacks(model, kind)[1]
        weights = [*concat.inputs]
        for index, weight in enumerate(weights[tensors:] + weights[:tensors]):
            concat.replace_input_with(index, weight)


def gate_and_up_swapped(model: ir.Model) -> None:
    for concat in _stacks(model, "gate_up_proj"):
        for index in range(0, len(concat.inputs), 2):
            swap_inputs(concat, index, index + 1)


def down_of_another_expert(model: ir.Model) -> None:
    swap_inputs(_stacks(model, "down_proj")[-1], 2, 5)


def routers_of_each_other_s_layers(model: ir.Model) -> None:
    first, *_, last = nodes(model, moe_router.NAME)
    _swap_transposed(first, last)


def _swap_transposed(first: ir.Node, last: ir.Node) -> None:
    """Exchange the weights under the products that make two routers' logits."""
    products = [router.inputs[0].producer() for router in (first, last)]
    transposes = [product.inputs[1].producer() for product in products]
    weights = [transpose.inputs[0] for transpose in transposes]
    for transpose, weight in zip(transposes, reversed(weights), strict=True):
        transpose.replace_input_with(0, weight)


def missing_shared_expert(model: ir.Model) -> None:
    for experts in nodes(model, moe_experts.NAME):
        (use,) = experts.outputs[0].uses()
        assert use.node.op_type == "Add"
        use.node.outputs[0].replace_all_uses_with(experts.outputs[0])


def ungated_shared_expert(model: ir.Model) -> None:
    for experts in nodes(model, moe_experts.NAME):
        (use,) = experts.outputs[0].uses()
        gated = use.node.inputs[1].producer()
        assert gated.op_type == "Mul"
        gated.outputs[0].replace_all_uses_with(gated.inputs[1])


def probabilities_left_out(model: ir.Model) -> None:
    """Every expert of a token counts alike; together they count as before."""
    for index, experts in enumerate(nodes(model, moe_experts.NAME)):
        weights, last = experts.inputs[2], constant(model, "last_axis", [-1])
        mean = insert(model, experts, "ReduceMean", [weights, last], f"mean.{index}", keepdims=1)
        shape = insert(model, experts, "Shape", [weights], f"shape.{index}", dtype=INT64)
        flat = insert(model, experts, "Expand", [mean, shape], f"flat.{index}")
        experts.replace_input_with(2, flat)


def weights_before_the_experts(model: ir.Model) -> None:
    """A token's weights multiply what its experts are given, not what they give: through SwiGLU not the same.

    Each of a token's k experts becomes a token of its own, with one expert and the weight 1, and the results are
    summed.
    """
    for index, experts in enumerate(nodes(model, moe_experts.NAME)):
        x, indices, weights = (given(value) for value in experts.inputs[:3])
        result = experts.outputs[0]
        assert x.dtype is not None and x.shape is not None and indices.shape is not None

        def op(
            kind: str,
            inputs: list[ir.Value],
            name: str,
            before: ir.Node = experts,
            end: str = f".{index}",
            **attributes: object,
        ) -> ir.Value:
            return insert(model, before, kind, inputs, f"defect.{name}{end}", **attributes)

        last, two = constant(model, "last_axis", [-1]), constant(model, "axis_2", [2])
        column = op("Unsqueeze", [weights, last], "column")
        factors = op("Cast", [column], "factors", dtype=x.dtype, to=int(x.dtype))
        scaled = op("Mul", [op("Unsqueeze", [x, two], "tokens"), factors], "scaled")
        chosen = op("Unsqueeze", [indices, last], "chosen")
        chosen.shape = ir.Shape([*indices.shape, 1])
        one = constant(model, "defect.one", np.ones((1, 1, 1, 1)), np.float32)
        shape = op("Shape", [column], "shape", dtype=INT64)
        for place, value in enumerate((scaled, chosen, op("Expand", [one, shape], "ones"))):
            experts.replace_input_with(place, value)
        user = result.uses()[0].node
        total = op("ReduceSum", [result, two], "sum", user, keepdims=0)
        total.shape, result.shape = result.shape, ir.Shape([*indices.shape, x.shape[2]])
        replace_uses(result, total, by=lambda use, made=total: use is not made.producer())
