"""Rotary embeddings where they are applied."""

from __future__ import annotations

import onnx_ir as ir

from defects.tools import constant, graph_input, insert, node, nodes, swap_inputs


def swapped_cos_and_sin(model: ir.Model) -> None:
    for rotary in nodes(model, "RotaryEmbedding"):
        swap_inputs(rotary, 1, 2)


def interleaved_rope(model: ir.Model) -> None:
    """Rotate neighbours instead of halves."""
    changed = 0
    for function in model.functions.values():
        for inner in function:
            if inner.op_type == "RotaryEmbedding":
                inner.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
                changed += 1
    assert changed


def rope_restarts_every_step(model: ir.Model) -> None:
    """Positions counted from the step's first token: right in a first prefill, wrong over a cache."""
    first = nodes(model, "RotaryEmbedding")[0]
    positions, write = first.inputs[3], graph_input(model, "write_indices")
    column = insert(
        model, first, "Unsqueeze", [write, constant(model, "axis_1", [1])], "defect.column"
    )
    local = insert(model, first, "Sub", [positions, column], "defect.local")
    for rotary in nodes(model, "RotaryEmbedding"):
        rotary.replace_input_with(3, local)


def key_positions_off_by_one(model: ir.Model) -> None:
    """One layer's keys are rotated for the position before, its queries for their own."""
    rotary = node(model, "model.layers.3.self_attn.rope_k")
    earlier = insert(
        model, rotary, "Sub", [rotary.inputs[3], constant(model, "one", [1])], "defect.earlier"
    )
    clipped = insert(
        model, rotary, "Max", [earlier, constant(model, "zero", [0])], "defect.clipped"
    )
    rotary.replace_input_with(3, clipped)
