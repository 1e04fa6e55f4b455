"""Where a graph is changed, found by operators and by what feeds them, and the changes that many defects share."""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from defects.facts import Fact, Facts, given_producer
from defects.tools import BOOL, constant, given, node, nodes, replace_uses

DAMPED = 0.9375  # a number that bf16 has


def attention(model: ir.Model, layer: int) -> ir.Node:
    return nodes(model, "Attention")[layer]


def rope(model: ir.Model, layer: int, which: str) -> ir.Node:
    """The node that rotates one layer's "queries" or "keys"."""
    if which == "queries":
        return given_producer(attention(model, layer).inputs[0])
    return given_producer(scatter(model, layer, "keys").inputs[1])


def scatter(model: ir.Model, layer: int, which: str) -> ir.Node:
    """The node that writes one layer's "keys" or "values" to the cache."""
    cut = given_producer(attention(model, layer).inputs[1 if which == "keys" else 2])
    return given_producer(cut.inputs[0])


def hidden(model: ir.Model, layer: int) -> ir.Value:
    """What a layer is given: [batch, seq, hidden]."""
    return given(node(model, f"model.layers.{layer}.input_layernorm.RMSNormalization").inputs[0])


def head_products(model: ir.Model) -> ir.Value:
    """The logits in the model's dtype: [batch, n, vocab]."""
    return node(model, "model.lm_head.MatMul").outputs[0]


def layers(model: ir.Model) -> range:
    return range(len(nodes(model, "Attention")))


def following(model: ir.Model, value: ir.Value) -> ir.Node:
    """The node behind the one that makes a value."""
    order = [*model.graph]
    return order[order.index(given_producer(value)) + 1]


def take_place(facts: Facts, old: ir.Value, new: ir.Value) -> None:
    """Make everything but the nodes of `facts` read `new` for `old`. The name goes with it: who observes it by name
    sees what the model goes on with."""
    replace_uses(old, new, by=lambda user: user not in facts.made)
    name = old.name
    old.name, new.name = f"{name}.before", name
    new.shape = old.shape


def real(model: ir.Model, value: float, dtype: ir.DataType) -> ir.Value:
    """A number that the dtype has, as a constant of it."""
    kind = ml_dtypes.bfloat16 if dtype == ir.DataType.BFLOAT16 else dtype.numpy()
    assert not np.isfinite(value) or float(np.array(value).astype(kind)) == value
    return constant(model, f"defect.real_{value}", value, dtype)


def damp(value: ir.Value, where: Fact, *axes: int, factor: float = DAMPED) -> None:
    """Multiply a value where a fact holds; `axes` of size 1 are put into the fact's for that."""
    facts = Facts(where.facts.model, following(where.facts.model, value))
    dtype = given(value).dtype
    assert dtype is not None
    less = facts.op("Mul", value, real(facts.model, factor, dtype))
    chosen = facts.op("Where", spread(facts, where, *axes), less, value, dtype=dtype)
    take_place(facts, value, chosen)


def spread(facts: Facts, where: Fact, *axes: int) -> ir.Value:
    """`where.spread`, written among other facts."""
    return Fact(facts, where.value, where.rank).spread(*axes)


def turn(
    model: ir.Model, where: Fact, which: str, at: Iterable[int] | None = None, by: int = -1
) -> None:
    """Rotate "queries" or "keys" for another position, at least 0, where a fact holds."""
    own = where.facts.positions
    other = where.choose((own + by).at_least(0), own)
    for layer in layers(model) if at is None else at:
        rope(model, layer, which).replace_input_with(3, other.value)


def rotate_for(model: ir.Model, positions: Fact) -> None:
    """Rotate the queries and keys of all layers for other positions [batch, seq]."""
    for layer in layers(model):
        for which in ("queries", "keys"):
            rope(model, layer, which).replace_input_with(3, positions.value)


def blind(model: ir.Model, where: Fact, at: Iterable[int] | None = None) -> None:
    """Take keys out of the mask where a fact [batch, 1, seq, span] holds, in some layers or in all."""
    mask = node(model, "model.LessOrEqual").outputs[0]
    facts = Facts(model, following(model, mask))
    kept = facts.op("And", mask, facts.op("Not", where.value), dtype=BOOL)
    if at is None:
        take_place(facts, mask, kept)
        return
    for layer in at:
        attention(model, layer).replace_input_with(3, kept)


def read_rows(model: ir.Model, layer: int, index: Fact) -> None:
    """Let each row of one layer attend to the keys and values of row index [batch, 1]."""
    flat = index.facts.op("Squeeze", index.value, constant(model, "defect.axes_1", [1]))
    target = attention(model, layer)
    facts = Facts(model, target)
    for place in (1, 2):
        held = given(target.inputs[place])
        target.replace_input_with(place, facts.op("Gather", held, flat, axis=0))
