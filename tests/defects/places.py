"""Right but for some place: a range of positions, a span or a boundary of the cache, a capacity."""

from __future__ import annotations

import onnx_ir as ir

from defects.facts import Facts, given_producer
from defects.sites import attention, blind, damp, hidden, layers, rotate_for, scatter, turn
from defects.tools import given, graph_input, node

PLAIN_CAPACITY = 512  # of the example checkpoints

# ---- positions


def decoding_between_100_and_200_turned(model: ir.Model) -> None:
    """Queries of single-token steps there are rotated for the position before."""
    facts = Facts(model)
    there = (facts.positions >= 100) & (facts.positions < 200)
    turn(model, facts.width.equals(1) & there, "queries")


def decoding_from_340_to_350_damped(model: ir.Model) -> None:
    """A few single-token steps in the middle of the context, one layer's hidden states by a sixteenth."""
    facts = Facts(model)
    there = (facts.positions >= 340) & (facts.positions < 351)
    damp(hidden(model, 2), facts.width.equals(1) & there, 2, factor=1.0625)


def keys_of_the_last_quarter_turned(model: ir.Model) -> None:
    """One layer's keys from position 384 of 512 on."""
    facts = Facts(model)
    turn(model, facts.positions >= 384, "keys", {2})


def middle_of_the_context_damped(model: ir.Model) -> None:
    """Hidden states of positions 192 to 319, before one layer."""
    facts = Facts(model)
    damp(hidden(model, 3), (facts.positions >= 192) & (facts.positions < 320), 2)


def positions_of_eight_bits(model: ir.Model) -> None:
    """Positions as bf16 holds them, rounded down: even ones only from 256 on."""
    facts = Facts(model)
    position = facts.positions
    rotate_for(model, (position > 255).choose(position // 2 * 2, position))


def mask_counts_slots_instead_of_positions(model: ir.Model) -> None:
    """The same where a text begins at position 0."""
    mask = node(model, "model.LessOrEqual")
    mask.replace_input_with(0, Facts(model).slots.value)


# ---- spans and boundaries of blocks


def span_of_192_loses_its_last_block(model: ir.Model) -> None:
    """Of the third block of 64 slots a token sees its own only, where there are just three."""
    facts = Facts(model)
    lost = (facts.slots >= 128) & (facts.keys < facts.over_keys(facts.positions))
    blind(model, facts.span.equals(192) & lost)


def spans_of_129_to_320_damp_queries(model: ir.Model) -> None:
    """One layer's queries: another scale of its scores."""
    facts = Facts(model)
    damp(given(attention(model, 1).inputs[0]), (facts.span > 128) & (facts.span <= 320))


def first_token_of_a_block_loses_the_last_before(model: ir.Model) -> None:
    """Position 64k does not see position 64k - 1, from the third block on."""
    facts = Facts(model)
    first = (facts.positions > 64) & (facts.positions % 64).equals(0)
    blind(
        model,
        facts.over_keys(first) & facts.keys.equals(facts.over_keys(facts.positions) - 1),
    )


def second_token_of_a_block_turned(model: ir.Model) -> None:
    """Queries of position 64k + 1 in single-token steps, from the third block on."""
    facts = Facts(model)
    second = (facts.positions > 65) & (facts.positions % 64).equals(1)
    turn(model, facts.width.equals(1) & second, "queries")


def last_value_of_a_block_damped(model: ir.Model) -> None:
    """Values that a single-token step writes to slot 64k - 1, from the second block on."""
    facts = Facts(model)
    last = (facts.starts > 64) & (facts.starts % 64).equals(63)
    for layer in layers(model):
        value = given(scatter(model, layer, "values").inputs[1])
        damp(value, facts.width.equals(1) & last, 1, 3, factor=0.5)


def long_decodes_lose_a_slot_where_they_are_split(model: ir.Model) -> None:
    """Single-token steps over 256 slots or more do not see slot 128."""
    facts = Facts(model)
    split = facts.width.equals(1) & (facts.span >= 256)
    behind = facts.over_keys(split & (facts.positions > 128))
    blind(model, behind & facts.slots.equals(128))


# ---- capacities


def smaller_caches_damped(model: ir.Model) -> None:
    """Fewer slots than the model has positions."""
    facts = Facts(model)
    capacity = facts.size(graph_input(model, "past_key_values.0.key"), 2)
    damp(hidden(model, 1), capacity < PLAIN_CAPACITY)


def a_cache_of_64_slots_turned(model: ir.Model) -> None:
    """All queries over a cache of one block."""
    facts = Facts(model)
    capacity = facts.size(graph_input(model, "past_key_values.0.key"), 2)
    whole = facts.of(capacity.equals(64).value)
    turn(model, whole, "queries")


def a_cache_of_320_slots_damped(model: ir.Model) -> None:
    """One size of several that `generate` allocates."""
    facts = Facts(model)
    capacity = facts.size(graph_input(model, "past_key_values.0.key"), 2)
    damp(hidden(model, 3), capacity.equals(320))


def a_cache_in_use_to_its_end_damps_queries(model: ir.Model) -> None:
    """One layer's queries, where the active span is all of the cache."""
    query = given(attention(model, 3).inputs[0])
    facts = Facts(model, given_producer(query))
    present = scatter(model, 0, "keys").outputs[0]
    damp(query, facts.span.equals(facts.size(present, 2)))
