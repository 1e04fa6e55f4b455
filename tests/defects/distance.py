"""Right but for keys far away: windows, lost beginnings, long texts."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from defects.facts import Facts
from defects.sites import attention, blind, layers, rope, rotate_for
from defects.tools import constant, given, graph_input, insert


def window_of_256(model: ir.Model) -> None:
    """Sliding-window attention in every layer."""
    _window(model, 256)


def window_of_256_in_one_layer(model: ir.Model) -> None:
    _window(model, 256, {2})


def window_of_100_in_one_layer(model: ir.Model) -> None:
    _window(model, 100, {3})


def window_of_1024_in_one_layer(model: ir.Model) -> None:
    """For longer contexts."""
    _window(model, 1024, {2})


def _window(model: ir.Model, size: int, at: Iterable[int] | None = None) -> None:
    facts = Facts(model)
    blind(model, facts.keys + size <= facts.over_keys(facts.positions), at)


def beginning_lost_150_slots_on(model: ir.Model) -> None:
    """The very first key, to which much attention goes, is not seen from afar."""
    facts = Facts(model)
    blind(model, facts.over_keys(facts.positions > 150) & facts.slots.equals(0))


def first_block_lost_beyond_1024(model: ir.Model) -> None:
    """Single-token steps behind position 1024 do not see the first 64 slots."""
    facts = Facts(model)
    far = facts.width.equals(1) & (facts.positions > 1024)
    blind(model, facts.over_keys(far) & (facts.slots < 64))


def keys_beyond_300_turned(model: ir.Model) -> None:
    """Keys more than 300 before a step's first token are rotated by one position more, in every layer."""
    facts = Facts(model)
    axis = constant(model, "defect.axes_0", [0])
    keys_at = facts.of(facts.op("Unsqueeze", graph_input(model, "key_positions"), axis))
    far = (keys_at + 300 < facts.starts + facts.least(facts.positions - facts.starts)).choose(1, 0)
    for layer in layers(model):
        target, rotate = attention(model, layer), rope(model, layer, "queries")
        keys = given(target.inputs[1])
        turned = insert(
            model,
            target,
            rotate.op_type,
            [keys, *rotate.inputs[1:3], far.value],
            f"defect.turned_{layer}",
            domain=rotate.domain,
        )
        target.replace_input_with(1, turned)


def positions_clipped_at_1023(model: ir.Model) -> None:
    """Queries and keys of longer texts all stand at one position."""
    rotate_for(model, Facts(model).positions.at_most(1023))
