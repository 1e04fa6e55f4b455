"""Right but for one shape of a step: how many logits are asked for, how many tokens come, in how many rows."""

from __future__ import annotations

import onnx_ir as ir

from defects.facts import Fact, Facts
from defects.sites import (
    blind,
    damp,
    head_products,
    hidden,
    read_rows,
    rotate_for,
    scatter,
    turn,
)
from defects.tools import constant, given, graph_input, node, replace_uses

# ---- fewer logits than tokens


def logits_damped_where_fewer_are_asked_for(model: ir.Model) -> None:
    facts = Facts(model)
    damp(head_products(model), facts.wanted < facts.width)


def one_of_many_picked_a_position_early(model: ir.Model) -> None:
    """One position's logits of a step of several tokens are those of the position before."""
    facts = Facts(model)
    alone = facts.wanted.equals(1) & (facts.width > 1)
    _pick(facts, alone.choose((facts.picked - 1).at_least(0), facts.picked))


def last_position_picked_whatever_was_asked(model: ir.Model) -> None:
    """One position's logits are the step's last: those of a pad token in shorter rows."""
    facts = Facts(model)
    _pick(facts, facts.wanted.equals(1).choose(facts.width - 1, facts.picked))


def several_positions_picked_in_reverse(model: ir.Model) -> None:
    """Fewer logits than tokens, but more than one, come in the order of the last position first."""
    facts = Facts(model)
    bounds = (constant(model, f"defect.number_{n}", [n]) for n in (-1, -10000, 1, -1))
    backwards = facts.of(facts.op("Slice", facts.picked.value, *bounds))
    several = (facts.wanted > 1) & (facts.wanted < facts.width)
    _pick(facts, several.choose(backwards, facts.picked))


def two_positions_picked_from_the_first_row(model: ir.Model) -> None:
    """Two positions of each row: every row gives the logits of those that row 0 asks for."""
    facts = Facts(model)
    bounds = (constant(model, f"defect.number_{n}", [n]) for n in (0, 1, 0))
    first = facts.of(facts.op("Slice", facts.picked.value, *bounds))
    other = first + facts.row * 0  # as many rows as there are
    _pick(facts, facts.wanted.equals(2).choose(other, facts.picked))


def logits_beyond_64_repeat_the_64th(model: ir.Model) -> None:
    facts = Facts(model)
    _pick(facts, (facts.wanted > 64).choose(facts.picked.at_most(63), facts.picked))


def _pick(facts: Facts, other: Fact) -> None:
    """Take the logits at other positions [batch, n] of the step."""
    asked = graph_input(facts.model, "logits_indices")
    replace_uses(asked, other.value, by=lambda user: user not in facts.made)


# ---- the width of a step


def wide_steps_see_the_next_slot(model: ir.Model) -> None:
    """In steps of more than 128 tokens each one sees the next one, too."""
    mask = node(model, "model.LessOrEqual")
    facts = Facts(model, mask)
    wide = (facts.width > 128).choose(1, 0)
    mask.replace_input_with(1, facts.op("Add", given(mask.inputs[1]), wide.value))


def steps_above_256_lose_their_first_block(model: ir.Model) -> None:
    """In steps of more than 256 tokens the later ones do not see the first 64 slots."""
    facts = Facts(model)
    late = facts.over_keys((facts.width > 256) & (facts.order >= 256))
    blind(model, late & (facts.slots < 64))


def last_token_of_a_full_step_damped(model: ir.Model) -> None:
    """The last token of a step of 512, in one layer."""
    facts = Facts(model)
    damp(hidden(model, 2), facts.width.equals(512) & facts.order.equals(511), 2)


def steps_of_65_to_127_turned(model: ir.Model) -> None:
    """One layer's queries are rotated for the position before, in steps of more than one block and less than two."""
    facts = Facts(model)
    turn(model, (facts.width > 64) & (facts.width < 128), "queries", {1})


def odd_steps_above_100_end_blind(model: ir.Model) -> None:
    """The last token of an odd step of more than 100 tokens does not see itself."""
    facts = Facts(model)
    odd = (facts.width > 100) & (facts.width % 2).equals(1)
    last = facts.over_keys(odd & facts.order.equals(facts.width - 1))
    blind(model, last & facts.keys.equals(facts.over_keys(facts.positions)))


def prompt_of_one_token_damped(model: ir.Model) -> None:
    """A single token that opens a context."""
    facts = Facts(model)
    damp(hidden(model, 0), facts.width.equals(1) & facts.starts.equals(0), 2)


def short_continuations_turned(model: ir.Model) -> None:
    """All layers' queries, in steps of 2 to 7 tokens behind others."""
    facts = Facts(model)
    short = (facts.width > 1) & (facts.width < 8)
    turn(model, short & (facts.starts > 0), "queries")


# ---- the number of rows


def third_of_three_rows_reads_the_second(model: ir.Model) -> None:
    """One layer's third row attends to the cache of the second, in steps of just three rows."""
    facts = Facts(model)
    third = facts.rows.equals(3) & facts.row.equals(2)
    read_rows(model, 2, third.choose(1, facts.row))


def five_rows_or_more_damped(model: ir.Model) -> None:
    facts = Facts(model)
    damp(hidden(model, 4), facts.rows >= 5)


def second_of_two_rows_decodes_at_the_positions_of_the_first(model: ir.Model) -> None:
    """Right for two rows of one length, and for any other number of rows."""
    facts = Facts(model)
    bounds = (constant(model, f"defect.number_{n}", [n]) for n in (0, 1, 0))
    first = facts.of(facts.op("Slice", facts.positions.value, *bounds))
    two = facts.rows.equals(2) & facts.width.equals(1)
    rotate_for(model, two.choose(first + facts.row * 0, facts.positions))


def last_row_of_a_full_batch_writes_less(model: ir.Model) -> None:
    """The values of the eighth of eight rows are damped in the first layer before they are written."""
    facts = Facts(model)
    eighth = facts.rows.equals(8) & facts.row.equals(7)
    damp(given(scatter(model, 0, "values").inputs[1]), eighth, 1, 3)
