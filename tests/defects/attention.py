"""Masks, the scale, heads, and the precision of scores."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from defects.tools import constant, given, graph_input, insert, node, nodes, replace_uses, rounded


def strict_mask(model: ir.Model) -> None:
    """A token does not see itself."""
    mask = node(model, "model.LessOrEqual")
    mask.op_type = "Less"


def permissive_mask(model: ir.Model) -> None:
    """A token sees the next slot, too."""
    mask = node(model, "model.LessOrEqual")
    shifted = insert(
        model, mask, "Add", [mask.inputs[1], constant(model, "one", [1])], "defect.later"
    )
    mask.replace_input_with(1, shifted)


def causal_from_the_upper_left(model: ir.Model) -> None:
    """What `is_causal` means over a cache: the first token of a step sees slot 0 only."""
    mask = node(model, "model.LessOrEqual")
    write = graph_input(model, "write_indices")
    axes = constant(model, "axes_1_2_3", [1, 2, 3])
    column = insert(model, mask, "Unsqueeze", [write, axes], "defect.column")
    mask.replace_input_with(1, insert(model, mask, "Sub", [mask.inputs[1], column], "defect.local"))


def doubled_attention_scale(model: ir.Model) -> None:
    for attention in nodes(model, "Attention"):
        scale = attention.attributes["scale"].as_float()
        attention.attributes["scale"] = ir.AttrFloat32("scale", 2 * scale)


def attention_without_scale(model: ir.Model) -> None:
    """Scores as they come. (The attribute left out would mean the right scale.)"""
    for attention in nodes(model, "Attention"):
        attention.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def swapped_kv_heads(model: ir.Model) -> None:
    """Query heads attend to the other group's keys and values."""
    for attention in nodes(model, "Attention"):
        for index in (1, 2):
            order = constant(model, f"{attention.name}.order_{index}", [1, 0])
            swapped = insert(
                model,
                attention,
                "Gather",
                [attention.inputs[index], order],
                f"{attention.name}.defect_{index}",
                axis=1,
            )
            attention.replace_input_with(index, swapped)


def interleaved_kv_heads(model: ir.Model) -> None:
    """Query head h attends to key/value head h % 2 instead of h // 3: heads tiled where they are repeated.

    The query heads are ordered so that each finds that head, and their results ordered back.
    """
    for attention in nodes(model, "Attention"):
        heads, groups = _heads(attention.inputs[0]), _heads(attention.inputs[1])
        order = np.argsort(np.arange(heads) % groups, kind="stable")
        result = attention.outputs[0]
        ordered = insert(
            model,
            attention,
            "Gather",
            [attention.inputs[0], constant(model, "defect.order", order)],
            f"{attention.name}.ordered",
            axis=1,
        )
        attention.replace_input_with(0, ordered)
        user = result.uses()[0].node
        back = constant(model, "defect.back", np.argsort(order))
        restored = insert(
            model, user, "Gather", [result, back], f"{attention.name}.restored", axis=1
        )
        replace_uses(result, restored, by=lambda use, made=restored: use is not made.producer())


def scores_in_fp16(model: ir.Model) -> None:
    """One layer's scores go through fp16 before they are scaled: they lose bits, and past 65504 they overflow.

    The layer's attention is written out for it as two products. In a bf16 or fp16 engine scores are no finer than
    that anyway, and only the overflow is left.
    """
    attention = node(model, "model.layers.1.self_attn.attention")
    q, k, v, mask = (given(value) for value in attention.inputs)
    assert q.shape is not None and q.dtype is not None
    heads, groups, size = _heads(q), _heads(k), q.shape[3]

    def op(kind: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        return insert(model, attention, kind, inputs, f"defect.{name}", dtype=q.dtype, **attributes)

    two = constant(model, "defect.axis_2", [2])
    split = constant(model, "defect.split", [0, groups, heads // groups, -1, size])
    whole = constant(model, "defect.whole", [0, heads, -1, size])
    exact = constant(model, "defect.exact", attention.attributes["scale"].as_float(), np.float32)
    # not an initializer of q's dtype: that would be rounded on the CPU, too
    scale = op("Cast", "scale", exact, to=int(q.dtype))
    lowest = constant(model, "defect.lowest", ml_dtypes.finfo(q.dtype.numpy()).min, q.dtype)
    columns = op("Transpose", "columns", op("Unsqueeze", "keys", k, two), perm=[0, 1, 2, 4, 3])
    products = op("MatMul", "products", op("Reshape", "grouped", q, split), columns)
    half = rounded(model, attention, products, ir.DataType.FLOAT16, "defect.half")
    scores = op("Mul", "scores", half, scale)
    seen = insert(model, attention, "Unsqueeze", [mask, two], "defect.seen")
    weights = op("Softmax", "weights", op("Where", "masked", seen, scores, lowest), axis=-1)
    mixed = op("MatMul", "mixed", weights, op("Unsqueeze", "values", v, two))
    result = op("Reshape", "result", mixed, whole)
    replace_uses(attention.outputs[0], result, by=lambda user: True)
    model.graph.remove(attention, safe=True)


def _heads(value: ir.Value | None) -> int:
    shape = given(value).shape
    assert shape is not None
    return int(shape[1])  # type: ignore[call-overload]
