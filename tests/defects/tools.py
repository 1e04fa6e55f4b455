"""A healthy package copied with one mistake in it, its manifest made to agree; and how a graph is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qwenport.contract import MANIFEST
from qwenport.exporter import describe_graph, sha256, write_json

DOMAIN = "defects"  # of model-local functions that a defect brings along
INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
OTHER_VERSION = "0.0.0-seeded"


def seed(
    package: Path,
    faulty: Path,
    change: Callable[[ir.Model], None],
    *,
    other_version: bool = True,
) -> Path:
    """Copy `package` to `faulty` with its weights, apply `change` to its graph, make the manifest right.

    Args:
        package: a healthy one.
        faulty: the copy; it must not exist.
        change: made in place.
        other_version: say that another version of qwenport wrote it, so that nobody can tell the fault by comparing
            the graph with what the exporter writes now.
    """
    shutil.copytree(package, faulty)
    model = ir.load(faulty / "model.onnx")
    change(model)
    ir.save(model, faulty / "model.onnx")
    manifest = json.loads((faulty / MANIFEST).read_text(encoding="utf-8"))
    for name in manifest["files"]:
        file = faulty / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest |= describe_graph(model)
    if other_version:
        manifest["qwenport_version"] = OTHER_VERSION
    write_json(faulty / MANIFEST, manifest)
    return faulty


def node(model: ir.Model, name: str) -> ir.Node:
    """The node of that name."""
    (found,) = [n for n in model.graph if n.name == name]
    return found


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    """Every node of that operator, of which there is at least one."""
    found = [n for n in model.graph if n.op_type == op_type]
    assert found, f"the graph has no {op_type}"
    return found


def graph_input(model: ir.Model, name: str) -> ir.Value:
    """The graph's input of that name."""
    (found,) = [value for value in model.graph.inputs if value.name == name]
    return found


def given(value: ir.Value | None) -> ir.Value:
    """An input that is not left out."""
    assert value is not None
    return value


def constant(
    model: ir.Model, name: str, values: object, dtype: type | ir.DataType = np.int64
) -> ir.Value:
    """A new initializer, or the one that has this name already."""
    if name not in model.graph.initializers:
        kind = dtype.numpy() if isinstance(dtype, ir.DataType) else dtype
        tensor = ir.tensor(np.array(values, dtype=kind), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    *,
    dtype: ir.DataType | None = None,
    domain: str = "",
    **attributes: Any,
) -> ir.Value:
    """Add a node before another; its output has the first input's dtype where none is given."""
    new = ir.node(op_type, inputs, attributes=attributes, name=name, domain=domain)
    (output,) = new.outputs
    output.name = name
    output.type = given(inputs[0]).type if dtype is None else ir.TensorType(dtype)
    model.graph.insert_before(before, new)
    return output


def replace_uses(old: ir.Value, new: ir.Value, *, by: Callable[[ir.Node], bool]) -> None:
    """Make the nodes that `by` picks read `new` instead of `old`."""
    uses = [use for use in old.uses() if by(use.node)]
    assert uses, f"nothing uses {old.name} there"
    for use in uses:
        use.node.replace_input_with(use.idx, new)


def swap_inputs(graph_node: ir.Node, first: int, second: int) -> None:
    """Exchange two inputs of a node."""
    a, b = graph_node.inputs[first], graph_node.inputs[second]
    graph_node.replace_input_with(first, b)
    graph_node.replace_input_with(second, a)


def rounded(
    model: ir.Model, before: ir.Node, value: ir.Value, dtype: ir.DataType, name: str
) -> ir.Value:
    """`value` rounded to a half-precision dtype and back, by two casts in a model-local function.

    In the function, because on the CPU every half-precision Cast of the graph itself becomes one to fp32. Where the
    package computes in `dtype` anyway this changes nothing.
    """
    function = f"Through{dtype.name}"
    key = (DOMAIN, function, "")
    if key not in model.functions:
        x = ir.Value(name="x")
        down = ir.node("Cast", [x], attributes={"to": int(dtype)}, name="down")
        back = ir.node("CastLike", [down.outputs[0], x], name="back")
        down.outputs[0].name, back.outputs[0].name = "narrow", "y"
        opsets = {"": model.opset_imports[""]}
        body = ir.Graph([x], back.outputs, nodes=[down, back], opset_imports=opsets, name=function)
        model.functions[key] = ir.Function(DOMAIN, function, "", graph=body, attributes=[])
        model.opset_imports[DOMAIN] = 1
    return insert(model, before, function, [value], name, domain=DOMAIN)
