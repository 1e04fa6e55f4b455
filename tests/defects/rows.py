"""Right but for some rows of a batch: by their place, by their length beside others', joining late, or idle."""

from __future__ import annotations

import onnx_ir as ir

from defects.facts import Facts
from defects.sites import blind, damp, hidden, layers, read_rows, scatter
from defects.tools import constant, given, node


def rows_from_four_on_read_four_rows_before(model: ir.Model) -> None:
    """One layer's rows 4 to 7 attend to the cache of rows 0 to 3."""
    facts = Facts(model)
    read_rows(model, 1, (facts.row > 3).choose(facts.row - 4, facts.row))


def last_row_of_several_damped(model: ir.Model) -> None:
    facts = Facts(model)
    last = (facts.rows > 1) & facts.row.equals(facts.rows - 1)
    damp(hidden(model, 3), last, 2)


def second_row_loses_its_first_slot_beside_a_longer_one(model: ir.Model) -> None:
    """Row 1 does not see its slot 0 where rows begin a step at different slots."""
    facts = Facts(model)
    unlike = facts.ragged & facts.row.equals(1)
    late = facts.over_keys(unlike & (facts.positions > 0))
    blind(model, late & facts.slots.equals(0))


def rows_of_unlike_length_share_the_longest_mask(model: ir.Model) -> None:
    """Decoding, every row sees as many slots as the longest: shorter rows see what padding left there."""
    mask = node(model, "model.LessOrEqual")
    facts = Facts(model, mask)
    position = facts.of(given(mask.inputs[1]))
    longest = facts.greatest(facts.positions)
    seen = facts.width.equals(1).choose(facts.over_keys(longest), position)
    mask.replace_input_with(1, seen.value)


def idle_rows_overwrite_their_last_slot(model: ir.Model) -> None:
    """A row that gets no token while others decode has its padding written over its last token."""
    facts = Facts(model)
    padding = facts.greatest_of_row(facts.tokens).equals(0)
    idle = padding & facts.width.equals(1) & (facts.rows > 1)
    start = idle.choose((facts.starts - 1).at_least(0), facts.starts)
    flat = facts.op("Squeeze", start.value, constant(model, "defect.axes_1", [1]))
    for layer in layers(model):
        for which in ("keys", "values"):
            scatter(model, layer, which).replace_input_with(2, flat)


def joining_rows_lose_their_first_token(model: ir.Model) -> None:
    """A row whose first tokens come when another is decoding already: they do not see slot 0."""
    facts = Facts(model)
    joining = facts.starts.equals(0) & (facts.greatest(facts.starts) > 0)
    late = facts.over_keys(joining & (facts.positions > 0))
    blind(model, late & facts.slots.equals(0))


def first_decode_beside_a_prefill_damped(model: ir.Model) -> None:
    """A row that goes on in the step in which another begins."""
    facts = Facts(model)
    beside = (facts.starts > 0) & facts.least(facts.starts).equals(0)
    damp(hidden(model, 2), beside & (facts.width > 1), 2)
