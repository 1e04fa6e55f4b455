"""Right but for some tokens of the vocabulary, or for some of a mixture's experts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from defects.facts import Fact, Facts
from defects.sites import damp, following, hidden, real, take_place
from defects.tools import BOOL, INT64, constant, given, graph_input, insert, nodes, replace_uses
from qwenport.plugins import moe_router

VOCABULARY = 2048
END_OF_TEXT, END_OF_TURN = 2045, 2047

# ---- tokens


def one_token_looked_up_as_another(model: ir.Model) -> None:
    facts = Facts(model)
    _look_up(facts, facts.tokens.equals(1234).choose(1233, facts.tokens))


def highest_id_out_of_reach(model: ir.Model) -> None:
    """The last row of the vocabulary, which ends a turn, is never looked up."""
    facts = Facts(model)
    _look_up(facts, facts.tokens.at_most(VOCABULARY - 2))


def ids_above_1900_a_row_early(model: ir.Model) -> None:
    facts = Facts(model)
    _look_up(facts, (facts.tokens > 1900).choose(facts.tokens - 1, facts.tokens))


def one_token_damped_inside(model: ir.Model) -> None:
    """The embedding of every token is right; what a layer in the middle is given of one is not."""
    facts = Facts(model)
    damp(hidden(model, 2), facts.tokens.equals(1905), 2)


def one_token_is_zero(model: ir.Model) -> None:
    facts = Facts(model)
    _overwrite(facts, facts.tokens.equals(777), 0.0)


def one_token_is_nan(model: ir.Model) -> None:
    facts = Facts(model)
    _overwrite(facts, facts.tokens.equals(1500), float("nan"))


def special_tokens_are_zero(model: ir.Model) -> None:
    """Those from the end of the text on, as if their rows had not been trained."""
    facts = Facts(model)
    _overwrite(facts, facts.tokens >= END_OF_TEXT, 0.0)


def _look_up(facts: Facts, other: Fact) -> None:
    asked = graph_input(facts.model, "input_ids")
    replace_uses(asked, other.value, by=lambda user: user not in facts.made)


def _overwrite(facts: Facts, where: Fact, number: float) -> None:
    """Put a number into the embedding of some tokens."""
    model = facts.model
    (rows,) = [n.outputs[0] for n in nodes(model, "Gather") if "embed_tokens" in _source(n)]
    made = Facts(model, following(model, rows))
    assert rows.dtype is not None
    spread = Fact(made, where.value, where.rank).spread(2)
    filled = real(model, number, rows.dtype)
    take_place(made, rows, made.op("Where", spread, filled, rows, dtype=rows.dtype))


def _source(gather: ir.Node) -> str:
    return given(gather.inputs[0]).name or ""


# ---- experts


def rare_first_choice_counts_half_more(model: ir.Model) -> None:
    """Expert 2 of the second sparse layer, where it is a token's first choice."""
    _reweigh(model, 1, lambda facts, chosen: chosen.equals(2) & _place(facts).equals(0), 1.5)


def last_expert_ignored_as_third_choice(model: ir.Model) -> None:
    """Expert 11 of the last sparse layer."""
    _reweigh(model, 2, lambda facts, chosen: chosen.equals(11) & _place(facts).equals(2), 0.0)


def last_expert_ignored(model: ir.Model) -> None:
    """Expert 11 of 12, in the last sparse layer: an index compared with one too small."""
    _reweigh(model, 2, lambda facts, chosen: chosen.equals(11), 0.0)


def one_expert_without_weights(model: ir.Model) -> None:
    """The down projection of expert 7 of the second sparse layer is zero."""
    stacks = [n for n in nodes(model, "Concat") if n.name and n.name.endswith("down_proj.Concat")]
    weight = given(stacks[1].inputs[7])
    assert weight.dtype is not None
    nothing = real(model, 0.0, weight.dtype)
    empty = insert(model, stacks[1], "Mul", [weight, nothing], "defect.empty")
    empty.shape = weight.shape
    stacks[1].replace_input_with(7, empty)


def experts_full_after_128_tokens(model: ir.Model) -> None:
    """What a capacity does: the tokens of a step beyond an expert's first 128 go without it, in the first sparse
    layer."""
    router = nodes(model, moe_router.NAME)[0]
    weights, chosen = router.outputs
    facts = Facts(model, following(model, chosen))

    def numbers(name: str, values: object) -> ir.Value:
        return constant(model, f"defect.{name}", values)

    flat = facts.op("Reshape", chosen, numbers("column", [-1, 1]))
    every = numbers("experts", np.arange(12))
    mine = facts.op("Cast", facts.op("Equal", flat, every, dtype=BOOL), dtype=INT64, to=int(INT64))
    running = facts.op("CumSum", mine, constant(model, "defect.axis_0", 0))
    rank = facts.op("GatherElements", running, flat, axis=1)
    shaped = facts.op("Reshape", rank, facts.op("Shape", chosen))
    _multiply(facts, weights, facts.of(shaped) > 128, 0.0)


def two_tokens_lose_their_third_choice(model: ir.Model) -> None:
    """In steps of just two tokens, in all rows together."""
    for index in range(len(nodes(model, moe_router.NAME))):

        def lost(facts: Facts, chosen: Fact) -> Fact:
            both = (facts.rows * facts.width).equals(2)
            return both & _place(facts).equals(2) & (chosen >= 0)

        _reweigh(model, index, lost, 0.0)


def _place(facts: Facts) -> Fact:
    """[1, 1, 3]: 0 for a token's first choice."""
    return facts.of(constant(facts.model, "defect.places", np.arange(3)[None, None]))


def _reweigh(
    model: ir.Model, index: int, where: Callable[[Facts, Fact], Fact], factor: float
) -> None:
    """Multiply the weights of some choices in the sparse layer of that index."""
    weights, chosen = nodes(model, moe_router.NAME)[index].outputs
    facts = Facts(model, following(model, chosen))
    _multiply(facts, weights, where(facts, facts.of(chosen)), factor)


def _multiply(facts: Facts, weights: ir.Value, where: Fact, factor: float) -> None:
    assert weights.dtype is not None
    less = facts.op("Mul", weights, real(facts.model, factor, weights.dtype))
    take_place(facts, weights, facts.op("Where", where.value, less, weights, dtype=weights.dtype))
