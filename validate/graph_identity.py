"""Compares two ONNX models node for node, and describes the differences in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import onnx

_NODE_LISTS = {"node", "initializer", "input", "output"}
_SHOWN = 60  # characters of a value


def differences(found: onnx.ModelProto, expected: onnx.ModelProto) -> list[str]:
    """All differences, one line each, nodes first; empty if the models are the same message."""
    if _bytes(found) == _bytes(expected):
        return []
    lines = [
        *_nodes(found.graph.node, expected.graph.node, ""),
        *_named("initializer", found.graph.initializer, expected.graph.initializer, _initializer),
        *_named("input", found.graph.input, expected.graph.input, _fields),
        *_named("output", found.graph.output, expected.graph.output, _fields),
        *_functions(found.functions, expected.functions),
        *_fields(found.graph, expected.graph, "the graph", _NODE_LISTS),
        *_fields(found, expected, "the model", {"graph", "functions"}),
    ]
    return lines or ["a field that ONNX does not define"]


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def _nodes(found: Any, expected: Any, scope: str) -> Iterator[str]:
    if [_bytes(node) for node in found] == [_bytes(node) for node in expected]:
        return
    have, want = (Counter(_label(node) for node in nodes) for nodes in (found, expected))
    yield from (f"{label} is missing{scope}" for label in want - have)
    yield from (f"{label} is not in the exporter's graph{scope}" for label in have - want)
    theirs = {_label(node): node for node in found}
    for node in expected:
        other = theirs.get(_label(node))
        if other is not None:
            yield from _node(other, node, scope)
    if have == want and [_label(n) for n in found] != [_label(n) for n in expected]:
        yield f"nodes are in another order{scope}"


def _label(node: onnx.NodeProto) -> str:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{operator} node {node.name or ', '.join(node.output)}"


def _node(found: onnx.NodeProto, expected: onnx.NodeProto, scope: str) -> Iterator[str]:
    label = _label(expected)
    for what in ("input", "output"):
        pairs = zip_longest(getattr(found, what), getattr(expected, what))
        for index, (have, want) in enumerate(pairs):
            if have != want:
                yield f"{label} has {what} {index} {have or 'nothing'}, not {want or 'nothing'}{scope}"
    theirs = {a.name: a for a in found.attribute}
    ours = {a.name: a for a in expected.attribute}
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in theirs:
            yield f"{label} lacks attribute {name}{scope}"
        elif name not in ours:
            yield f"{label} has attribute {name}, which the exporter does not write{scope}"
        elif _bytes(theirs[name]) != _bytes(ours[name]):
            have, want = (_value(a) for a in (theirs[name], ours[name]))
            yield f"{label} has {name} {short(have)}, not {short(want)}{scope}"
    yield from _fields(found, expected, label, {"input", "output", "attribute"})


def _value(attribute: onnx.AttributeProto) -> Any:
    try:
        return onnx.helper.get_attribute_value(attribute)
    except ValueError:  # of a type that ONNX does not define
        return attribute


def _named(what: str, found: Any, expected: Any, compare: Any) -> Iterator[str]:
    """Differences between named messages."""
    have, want = (Counter(item.name for item in items) for items in (found, expected))
    yield from (f"{what} {name} is missing" for name in want - have)
    yield from (f"{what} {name} is not in the exporter's graph" for name in have - want)
    theirs = {item.name: item for item in found}
    for item in expected:
        other = theirs.get(item.name)
        if other is not None and _bytes(other) != _bytes(item):
            yield from compare(other, item, f"{what} {item.name}")
    if have == want and [i.name for i in found] != [i.name for i in expected]:
        yield f"{what}s are in another order"


def _initializer(found: onnx.TensorProto, expected: onnx.TensorProto, label: str) -> Iterable[str]:
    where = [{e.key: e.value for e in t.external_data} for t in (found, expected)]
    if where[0] and where[1]:
        for key in sorted(where[0].keys() | where[1].keys()):
            have, want = (place.get(key, "not given") for place in where)
            if have != want:
                yield f"{label} has {key} {short(have)}, not {short(want)}"
        yield from _fields(found, expected, label, {"external_data"})
    else:
        yield from _fields(found, expected, label)


def _functions(found: Any, expected: Any) -> Iterator[str]:
    theirs, ours = ({(f.domain, f.name, f.overload): f for f in fs} for fs in (found, expected))
    for key in sorted(theirs.keys() | ours.keys()):
        name = f"function {key[0]}.{key[1]}"
        if key not in theirs:
            yield f"{name} is missing"
        elif key not in ours:
            yield f"{name} is not in the exporter's model"
        else:
            yield from _nodes(theirs[key].node, ours[key].node, f" in {name}")
            yield from _fields(theirs[key], ours[key], name, {"node"})
    if len(found) != len(theirs):
        yield "a function occurs twice"


def _fields(
    found: Any, expected: Any, label: str, skip: Iterable[str] = frozenset()
) -> Iterator[str]:
    """Differences between two messages of the same type, one line per field."""
    for field in expected.DESCRIPTOR.fields:
        if field.name in skip:
            continue
        have, want = getattr(found, field.name), getattr(expected, field.name)
        if have != want:
            yield f"{label} has {field.name} {short(have)}, not {short(want)}"


def short(value: Any) -> str:
    """A value on one line, cut if it is long."""
    text = " ".join(str(value).split()) or "nothing"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
