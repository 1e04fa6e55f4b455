"""Right but for a cache that was used before: what a reset or a truncation leaves behind comes back.

The cache keeps what lay behind a row's end; a fresh one has zeros there, and zeros show nothing here.
"""

from __future__ import annotations

import onnx_ir as ir

from defects.facts import Fact, Facts
from defects.sites import attention, following, layers, real, scatter, take_place
from defects.tools import BOOL, constant, given

LEAK = 2.0**-8


def slots_behind_the_span_leak(model: ir.Model) -> None:
    """One layer attends, a little, to the whole cache, where the active span ends earlier. A batch never fills that
    with padding: only a longer text before a reset does."""
    target = attention(model, 1)
    facts = Facts(model, following(model, target.outputs[0]))
    present = scatter(model, 1, "values").outputs[0]
    bounds = [facts.span.value, facts.size(present, 2).value, constant(model, "defect.axis2", [2])]
    _leak(facts, target.outputs[0], facts.op("Slice", present, *bounds))


def slots_behind_a_first_step_leak(model: ir.Model) -> None:
    """The first step of a text attends, a little, to the rest of its last block."""
    target = attention(model, 2)
    facts = Facts(model, following(model, target.outputs[0]))
    behind = (facts.slots >= facts.width) & facts.over_keys(facts.starts.equals(0))
    _leak(facts, target.outputs[0], _slots(facts, given(target.inputs[2]), behind))


def slots_behind_a_decoded_token_leak(model: ir.Model) -> None:
    """A single row's single-token steps attend, a little, to what lies behind them in the block."""
    target = attention(model, 3)
    facts = Facts(model, following(model, target.outputs[0]))
    alone = facts.width.equals(1) & facts.rows.equals(1)
    behind = (facts.slots > facts.over_keys(facts.starts)) & alone
    _leak(facts, target.outputs[0], _slots(facts, given(target.inputs[2]), behind))


def a_key_left_behind_is_seen(model: ir.Model) -> None:
    """Where a single row goes on by one token and the next slot is not empty, all layers but the first see it."""
    first = attention(model, 0)
    facts = Facts(model, following(model, first.outputs[0]))
    alone = facts.width.equals(1) & facts.rows.equals(1)
    next_slot = facts.slots.equals(facts.over_keys(facts.starts + 1)) & alone
    held = facts.op("Abs", _slots(facts, given(first.inputs[1]), next_slot))
    axes = constant(model, "defect.axes_1_2_3", [1, 2, 3])
    most = facts.op("ReduceMax", held, axes, keepdims=1)  # [batch, 1, 1, 1]
    dtype = given(first.inputs[1]).dtype
    assert dtype is not None
    filled = facts.of(facts.op("Greater", most, real(model, 0.0, dtype), dtype=BOOL))
    seen = facts.op("Or", given(first.inputs[3]), (filled & next_slot).value, dtype=BOOL)
    for layer in [*layers(model)][1:]:
        attention(model, layer).replace_input_with(3, seen)


def first_value_of_a_text_added_to_the_one_before(model: ir.Model) -> None:
    """A text's first value is written over a sixteenth of what its slot held: a scatter that adds."""
    target = scatter(model, 1, "values")
    past, value = (given(x) for x in target.inputs[:2])
    facts = Facts(model, target)
    bounds = [constant(model, f"defect.number_{n}", [n]) for n in (0, 1, 2)]
    held = facts.op("Slice", past, *bounds)
    assert value.dtype is not None
    more = facts.op("Mul", held, real(model, 0.0625, value.dtype))
    first = facts.starts.equals(0) & facts.order.equals(0)
    both = facts.op("Add", value, more)
    chosen = facts.op("Where", first.spread(1, 3), both, value, dtype=value.dtype)
    target.replace_input_with(1, chosen)


def _slots(facts: Facts, held: ir.Value, where: Fact) -> ir.Value:
    """Keys or values [batch, heads, span, head_dim] with zeros where a fact [batch or 1, 1, 1, span] does not hold."""
    column = facts.op("Transpose", where.value, perm=[0, 1, 3, 2])
    assert held.dtype is not None
    return facts.op("Where", column, held, real(facts.model, 0.0, held.dtype), dtype=held.dtype)


def _leak(facts: Facts, result: ir.Value, held: ir.Value) -> None:
    """Add a little of the sum over slots, of all heads, to what an attention gives."""
    model, dtype = facts.model, held.dtype
    assert dtype is not None
    total = facts.op("ReduceSum", held, constant(model, "defect.axes_1_2", [1, 2]), keepdims=1)
    little = facts.op("Mul", total, real(model, LEAK, dtype))
    take_place(facts, result, facts.op("Add", result, little))
