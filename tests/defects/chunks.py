"""Mistakes in the graph of dual chunk attention, for packages of `chunked`'s checkpoint."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from chunked import CHUNK, CHUNK_SIZE

from qwenport.contract import REQUEST_LENGTHS

from . import tools
from .tools import constant, insert, node, nodes


def same_for_previous(model: ir.Model) -> None:
    """Keys of the chunk before are attended to as those of the query's own."""
    for rotation in nodes(model, "RotaryEmbedding"):
        if rotation.name.endswith("rope_q_previous"):
            rotation.replace_input_with(3, node(model, "model.Mod").outputs[0])


def clamp_missing(model: ir.Model) -> None:
    clamp = node(model, "model.Min")
    clamp.replace_input_with(1, constant(model, "no_limit", [1000]))


def chunk_off_by_one(model: ir.Model) -> None:
    for name in ("model.Div", "model.Div_2"):
        node(model, name).replace_input_with(1, constant(model, "chunk", [CHUNK - 1]))


def scale_missing(model: ir.Model) -> None:
    node(model, "model.Mul").replace_input_with(1, constant(model, "none", [0.0], np.float32))


def scale_of_queries_alone(model: ir.Model) -> None:
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        keys = node(model, f"{path}.rope_k")
        keys.replace_input_with(0, node(model, f"{path}.Mul_2").inputs[0])


def older_position_off_by_one(model: ir.Model) -> None:
    for name in ("model.Max", "model.Min_2"):
        node(model, name).replace_input_with(1, constant(model, "older", [CHUNK_SIZE - 1]))


def keys_rotated_by_position(model: ir.Model) -> None:
    (positions,) = [value for value in model.graph.inputs if value.name == "position_ids"]
    for rotation in nodes(model, "RotaryEmbedding"):
        if rotation.name.endswith("rope_k"):
            rotation.replace_input_with(3, positions)


def previous_taken_for_older(model: ir.Model) -> None:
    last = node(model, "model.Add_2")
    last.replace_input_with(1, constant(model, "nothing", [0]))


def older_taken_for_previous(model: ir.Model) -> None:
    last = node(model, "model.Add_2")
    last.replace_input_with(1, constant(model, "much", [100]))


def positions_limited_as_in_the_paper(model: ir.Model) -> None:
    """No query stands further than chunk_size - 1, as the paper has it and no code."""
    limit = constant(model, "limit", [CHUNK_SIZE - 1])
    for name in ("model.Min", "model.Max", "model.Min_2"):
        node(model, name).replace_input_with(1, limit)


def scale_by_position(model: ir.Model) -> None:
    """Each token's own position for the length of its request."""
    (cast,) = [n for n in nodes(model, "Cast") if tools.given(n.inputs[0]).name == REQUEST_LENGTHS]
    (positions,) = [value for value in model.graph.inputs if value.name == "position_ids"]
    first = insert(
        model, cast, "Gather", [positions, constant(model, "at", 0)], "defect.first", axis=1
    )
    cast.replace_input_with(0, insert(model, cast, "Add", [first, constant(model, "o", [1])], "d"))


CHUNK_DEFECTS = (
    same_for_previous,
    clamp_missing,
    chunk_off_by_one,
    scale_missing,
    scale_of_queries_alone,
    older_position_off_by_one,
    positions_limited_as_in_the_paper,
    keys_rotated_by_position,
    previous_taken_for_older,
    older_taken_for_previous,
    scale_by_position,
)
