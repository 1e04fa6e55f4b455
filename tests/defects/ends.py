"""What comes before the first layer and after the last: embedding, the choice of positions, the head, logits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from defects.tools import constant, given, graph_input, insert, node, replace_uses


def embedding_row_off_by_one(model: ir.Model) -> None:
    """Token t is looked up in row t - 1. A tied head keeps its rows."""
    _one_lower(model, graph_input(model, "input_ids"))


def logits_of_the_position_before(model: ir.Model) -> None:
    """Logits are taken one position early, of a step's first token at its own."""
    _one_lower(model, graph_input(model, "logits_indices"))


def _one_lower(model: ir.Model, value: ir.Value) -> None:
    """Every use of an integer input reads one less, at least 0."""
    first = value.uses()[0].node
    lower = insert(model, first, "Sub", [value, constant(model, "one", [1])], "defect.lower")
    clipped = insert(model, first, "Max", [lower, constant(model, "zero", [0])], "defect.clipped")
    replace_uses(value, clipped, by=lambda user: user is not lower.producer())


def swapped_head_rows(model: ir.Model) -> None:
    """Two tokens of the vocabulary projection exchanged."""
    head = node(model, "model.lm_head.MatMul")
    size = given(given(head.inputs[1]).producer().inputs[0]).shape[0]  # type: ignore[union-attr,index]
    order = np.arange(int(size))  # type: ignore[call-overload]
    order[[300, 301]] = [301, 300]
    rows = insert(
        model,
        head,
        "Gather",
        [head.inputs[1], constant(model, "order", order)],
        "defect.rows",
        axis=1,
    )
    head.replace_input_with(1, rows)


def changed_row_in_a_copy_of_the_tied_head(model: ir.Model) -> None:
    """The head is a copy of the embedding in which one token's row is still zero."""
    transpose = node(model, "model.lm_head.Transpose")
    tied = given(transpose.inputs[0])
    assert tied.name == "model.embed_tokens.weight" and tied.const_value is not None
    copy = np.array(tied.const_value.numpy())
    copy[400] = 0
    assert tied.dtype is not None
    transpose.replace_input_with(0, constant(model, "model.lm_head.weight", copy, tied.dtype))


def one_nan(model: ir.Model) -> None:
    """One logit of 2048 is NaN."""
    head = node(model, "model.lm_head.MatMul")
    weight = given(given(head.inputs[1]).producer().inputs[0])  # type: ignore[union-attr]
    spoilt = np.zeros(int(weight.shape[0]), dtype=np.float32)  # type: ignore[index,call-overload]
    spoilt[7] = np.nan
    final = given(model.graph.outputs[0]).producer()
    assert final is not None
    # behind the last node, in fp32
    new = ir.node("Add", [final.outputs[0], constant(model, "spoilt", spoilt, np.float32)])
    new.outputs[0].name, new.outputs[0].type = "defect.logits", final.outputs[0].type
    model.graph.insert_after(final, new)
    final.outputs[0].name, new.outputs[0].name = "defect.before", "logits"
    new.outputs[0].shape = final.outputs[0].shape
    model.graph.outputs[0] = new.outputs[0]


def unknown_operator(model: ir.Model) -> None:
    """A graph that no runtime loads."""
    node(model, "model.LessOrEqual").op_type = "NoSuchOperator"
