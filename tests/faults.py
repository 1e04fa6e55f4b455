"""Seeded faults: a healthy package copied with one mistake in it, its manifest made to agree.

Each mistake is one that an exporter, a parser or a builder has been seen to make, or could.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qwenport.exporter import MANIFEST, sha256, write_json


def seed(package: Path, faulty: Path, change: Callable[[ir.Model], None]) -> Path:
    """Copy `package` to `faulty` with its weights, apply `change` to its graph, fix the hashes."""
    shutil.copytree(package, faulty)
    model = ir.load(faulty / "model.onnx")
    change(model)
    ir.save(model, faulty / "model.onnx")
    manifest = json.loads((faulty / MANIFEST).read_text(encoding="utf-8"))
    for name in manifest["files"]:
        file = faulty / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(faulty / MANIFEST, manifest)
    return faulty


def node(model: ir.Model, name: str) -> ir.Node:
    """The node of that name."""
    (found,) = [n for n in model.graph if n.name == name]
    return found


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == op_type]


def _constant(model: ir.Model, name: str, values: object, dtype: type = np.int64) -> ir.Value:
    tensor = ir.tensor(np.array(values, dtype=dtype), name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def _insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    **attributes: int,
) -> ir.Value:
    """Add a node before another; its output has the first input's dtype."""
    new = ir.node(op_type, inputs, attributes=attributes, name=name)
    (output,) = new.outputs
    assert inputs[0] is not None
    output.name, output.type = name, inputs[0].type
    model.graph.insert_before(before, new)
    return output


def _replace_uses(old: ir.Value, new: ir.Value, *, by: Callable[[ir.Node], bool]) -> None:
    uses = [use for use in old.uses() if by(use.node)]
    assert uses, f"nothing uses {old.name} there"
    for use in uses:
        use.node.replace_input_with(use.idx, new)


def wrong_epsilon(model: ir.Model) -> None:
    for norm in _nodes(model, "RMSNormalization"):
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def wrong_epsilon_in_one_norm(model: ir.Model) -> None:
    norm = node(model, "model.layers.0.input_layernorm.RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def swapped_cos_and_sin(model: ir.Model) -> None:
    for rotary in _nodes(model, "RotaryEmbedding"):
        cos, sin = rotary.inputs[1:3]
        rotary.replace_input_with(1, sin)
        rotary.replace_input_with(2, cos)


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
    first = _nodes(model, "RotaryEmbedding")[0]
    positions, write = first.inputs[3], _input(model, "write_indices")
    column = _insert(
        model, first, "Unsqueeze", [write, _constant(model, "axis_1", [1])], "fault.column"
    )
    local = _insert(model, first, "Sub", [positions, column], "fault.local")
    for rotary in _nodes(model, "RotaryEmbedding"):
        rotary.replace_input_with(3, local)


def missing_bias(model: ir.Model) -> None:
    """The value projection of one layer without its bias."""
    add = node(model, "model.layers.2.self_attn.v_proj.Add")
    _replace_uses(add.outputs[0], _given(add.inputs[0]), by=lambda user: True)


def strict_mask(model: ir.Model) -> None:
    """A token does not see itself."""
    mask = node(model, "model.LessOrEqual")
    mask.op_type = "Less"


def permissive_mask(model: ir.Model) -> None:
    """A token sees the next slot, too."""
    mask = node(model, "model.LessOrEqual")
    shifted = _insert(
        model, mask, "Add", [mask.inputs[1], _constant(model, "one", [1])], "fault.later"
    )
    mask.replace_input_with(1, shifted)


def causal_from_the_upper_left(model: ir.Model) -> None:
    """What `is_causal` means over a cache: the first token of a step sees slot 0 only."""
    mask = node(model, "model.LessOrEqual")
    write = _input(model, "write_indices")
    axes = _constant(model, "axes_1_2_3", [1, 2, 3])
    column = _insert(model, mask, "Unsqueeze", [write, axes], "fault.column")
    mask.replace_input_with(1, _insert(model, mask, "Sub", [mask.inputs[1], column], "fault.local"))


def cache_slot_off_by_one(model: ir.Model) -> None:
    """One layer writes its keys a slot late."""
    scatter = node(model, "model.layers.1.self_attn.TensorScatter")
    late = _insert(
        model, scatter, "Add", [scatter.inputs[2], _constant(model, "one", [1])], "fault.late"
    )
    scatter.replace_input_with(2, late)


def rows_share_the_first_rows_slots(model: ir.Model) -> None:
    """Every row writes where row 0 does: right for one row, and for rows of one length."""
    first = _nodes(model, "TensorScatter")[0]
    write = _input(model, "write_indices")
    row = _insert(
        model,
        first,
        "Slice",
        [write, _constant(model, "zero", [0]), _constant(model, "one", [1])],
        "fault.row",
    )
    shape = _insert(model, first, "Shape", [write], "fault.shape")
    spread = _insert(model, first, "Expand", [row, shape], "fault.spread")
    for scatter in _nodes(model, "TensorScatter"):
        scatter.replace_input_with(2, spread)


def doubled_attention_scale(model: ir.Model) -> None:
    for attention in _nodes(model, "Attention"):
        scale = attention.attributes["scale"].as_float()
        attention.attributes["scale"] = ir.AttrFloat32("scale", 2 * scale)


def swapped_head_rows(model: ir.Model) -> None:
    """Two tokens of the vocabulary projection exchanged."""
    head = node(model, "model.lm_head.MatMul")
    size = _given(_given(head.inputs[1]).producer().inputs[0]).shape[0]  # type: ignore[union-attr,index]
    order = np.arange(int(size))  # type: ignore[call-overload]
    order[[300, 301]] = [301, 300]
    rows = _insert(
        model,
        head,
        "Gather",
        [head.inputs[1], _constant(model, "order", order)],
        "fault.rows",
        axis=1,
    )
    head.replace_input_with(1, rows)


def swapped_key_and_value_weights(model: ir.Model) -> None:
    key, value = (node(model, f"model.layers.1.self_attn.{p}_proj.Transpose") for p in "kv")
    key_weight, value_weight = key.inputs[0], value.inputs[0]
    key.replace_input_with(0, value_weight)
    value.replace_input_with(0, key_weight)


def swapped_kv_heads(model: ir.Model) -> None:
    """Query heads attend to the other group's keys and values."""
    for attention in _nodes(model, "Attention"):
        for index in (1, 2):
            order = _constant(model, f"{attention.name}.order_{index}", [1, 0])
            swapped = _insert(
                model,
                attention,
                "Gather",
                [attention.inputs[index], order],
                f"{attention.name}.fault_{index}",
                axis=1,
            )
            attention.replace_input_with(index, swapped)


def skipped_layer(model: ir.Model) -> None:
    before = node(model, "model.layers.2.Add_2").outputs[0]
    after = node(model, "model.layers.3.Add_2").outputs[0]
    _replace_uses(after, before, by=lambda user: True)


def one_nan(model: ir.Model) -> None:
    """One logit of 2048 is NaN."""
    head = node(model, "model.lm_head.MatMul")
    weight = _given(_given(head.inputs[1]).producer().inputs[0])  # type: ignore[union-attr]
    spoilt = np.zeros(int(weight.shape[0]), dtype=np.float32)  # type: ignore[index,call-overload]
    spoilt[7] = np.nan
    final = _given(model.graph.outputs[0]).producer()
    assert final is not None
    # behind the last node, in fp32
    new = ir.node("Add", [final.outputs[0], _constant(model, "spoilt", spoilt, np.float32)])
    new.outputs[0].name, new.outputs[0].type = "fault.logits", final.outputs[0].type
    model.graph.insert_after(final, new)
    final.outputs[0].name, new.outputs[0].name = "fault.before", "logits"
    new.outputs[0].shape = final.outputs[0].shape
    model.graph.outputs[0] = new.outputs[0]


def unknown_operator(model: ir.Model) -> None:
    """A graph that no runtime loads."""
    node(model, "model.LessOrEqual").op_type = "NoSuchOperator"


def short_rope_table(model: ir.Model) -> None:
    """The last position has no row."""
    for name in ("rope.cos", "rope.sin"):
        _replace_table(model, name, lambda table: table[:-1])


def shifted_rope_table(model: ir.Model) -> None:
    """Row p holds position p + 1. Attention sees differences of positions only: no logit shows this."""
    for name in ("rope.cos", "rope.sin"):
        _replace_table(model, name, lambda table: np.concatenate([table[1:], table[-1:]]))


def wrong_last_rope_row(model: ir.Model) -> None:
    for name in ("rope.cos", "rope.sin"):
        _replace_table(model, name, lambda table: np.concatenate([table[:-1], table[-2:-1]]))


def _replace_table(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    table = np.ascontiguousarray(change(value.const_value.numpy()))
    value.const_value = ir.tensor(table, name=name)
    value.shape = ir.Shape(table.shape)
    for use in value.uses():
        use.node.outputs[0].shape = ir.Shape(table.shape)


def _input(model: ir.Model, name: str) -> ir.Value:
    (found,) = [value for value in model.graph.inputs if value.name == name]
    return found


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
