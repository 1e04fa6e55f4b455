"""What is written to the cache, where, and who reads it."""

from __future__ import annotations

import onnx_ir as ir

from defects.tools import BOOL, INT64, constant, given, graph_input, insert, node, nodes


def cache_slot_off_by_one(model: ir.Model) -> None:
    """One layer writes its keys a slot late."""
    scatter = node(model, "model.layers.1.self_attn.TensorScatter")
    late = insert(
        model, scatter, "Add", [scatter.inputs[2], constant(model, "one", [1])], "defect.late"
    )
    scatter.replace_input_with(2, late)


def rows_share_the_first_rows_slots(model: ir.Model) -> None:
    """Every row writes where row 0 does: right for one row, and for rows of one length."""
    first = nodes(model, "TensorScatter")[0]
    write = graph_input(model, "write_indices")
    row = insert(
        model,
        first,
        "Slice",
        [write, constant(model, "zero", [0]), constant(model, "one", [1])],
        "defect.row",
    )
    shape = insert(model, first, "Shape", [write], "defect.shape")
    spread = insert(model, first, "Expand", [row, shape], "defect.spread")
    for scatter in nodes(model, "TensorScatter"):
        scatter.replace_input_with(2, spread)


def cache_of_another_layer(model: ir.Model) -> None:
    """Layer 3 attends to the keys and values of layer 2, and writes its own for nobody."""
    for name in ("Slice", "Slice_2"):
        mine = node(model, f"model.layers.3.self_attn.{name}")
        other = node(model, f"model.layers.2.self_attn.{name}")
        mine.replace_input_with(0, other.inputs[0])


def values_not_written(model: ir.Model) -> None:
    """One layer's values stay in the cache as they were before the step: its slots are given back what they hold.

    (Reading past in the place of present would say nothing where both are one memory.)
    """
    scatter = node(model, "model.layers.2.self_attn.TensorScatter_2")
    past, values = scatter.inputs[:2]
    axes = constant(model, "defect.axes_1_3", [1, 3])
    slots = insert(
        model, scatter, "Unsqueeze", [graph_input(model, "position_ids"), axes], "defect.slots"
    )
    shape = insert(model, scatter, "Shape", [values], "defect.shape", dtype=INT64)
    index = insert(model, scatter, "Expand", [slots, shape], "defect.index")
    held = insert(model, scatter, "GatherElements", [past, index], "defect.held", axis=2)
    scatter.replace_input_with(1, held)


def second_token_overwritten(model: ir.Model) -> None:
    """In one layer the slot of a step's second token gets the key and the value of its first."""
    first = node(model, "model.layers.2.self_attn.TensorScatter")
    one = constant(model, "one", [1])
    bounds = [constant(model, "zero", [0]), one, constant(model, "defect.axis_2", [2])]
    positions, write = (graph_input(model, n) for n in ("position_ids", "write_indices"))
    start = insert(model, first, "Unsqueeze", [write, one], "defect.start")
    order = insert(model, first, "Sub", [positions, start], "defect.order")
    second = insert(model, first, "Equal", [order, one], "defect.second", dtype=BOOL)
    axes = constant(model, "defect.axes_1_3", [1, 3])
    mask = insert(model, first, "Unsqueeze", [second, axes], "defect.mask")
    for name in ("TensorScatter", "TensorScatter_2"):
        scatter = node(model, f"model.layers.2.self_attn.{name}")
        written = given(scatter.inputs[1])
        token = insert(model, scatter, "Slice", [written, *bounds], f"defect.{name}.first")
        spoilt = insert(
            model, scatter, "Where", [mask, token, written], f"defect.{name}", dtype=written.dtype
        )
        scatter.replace_input_with(1, spoilt)
