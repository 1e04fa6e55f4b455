"""What a step is, as values of its graph: how wide it is, how many rows, where in the context, over how much cache.

A defect that depends on the way of running is written with these in Python's own operators; each writes an ONNX node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from defects.tools import BOOL, INT64, constant, given, graph_input, insert

MAX_ROWS = 8  # of the packages that defects are made for


@dataclass(frozen=True, eq=False)
class Fact:
    """A number or a yes or no of each token.

    Attributes:
        facts: where its nodes are written.
        value: int64 or bool; [1] for what is one in a step, else [batch or 1, seq or 1].
        rank: 1 or 2.
    """

    facts: Facts
    value: ir.Value
    rank: int

    def _with(self, kind: str, other: Fact | int, dtype: ir.DataType = INT64) -> Fact:
        if isinstance(other, int):
            other = self.facts.number(other)
        made = self.facts.op(kind, self.value, other.value, dtype=dtype)
        return Fact(self.facts, made, max(self.rank, other.rank))

    def __add__(self, other: Fact | int) -> Fact:
        return self._with("Add", other)

    def __sub__(self, other: Fact | int) -> Fact:
        return self._with("Sub", other)

    def __mul__(self, other: Fact | int) -> Fact:
        return self._with("Mul", other)

    def __floordiv__(self, other: int) -> Fact:
        """Of numbers that are not negative."""
        return self._with("Div", other)

    def __mod__(self, other: int) -> Fact:
        return self._with("Mod", other)

    def __lt__(self, other: Fact | int) -> Fact:
        return self._with("Less", other, BOOL)

    def __gt__(self, other: Fact | int) -> Fact:
        return self._with("Greater", other, BOOL)

    def __le__(self, other: Fact | int) -> Fact:
        return ~(self > other)

    def __ge__(self, other: Fact | int) -> Fact:
        return ~(self < other)

    def equals(self, other: Fact | int) -> Fact:
        return self._with("Equal", other, BOOL)

    def __and__(self, other: Fact) -> Fact:
        return self._with("And", other, BOOL)

    def __or__(self, other: Fact) -> Fact:
        return self._with("Or", other, BOOL)

    def __invert__(self) -> Fact:
        return Fact(self.facts, self.facts.op("Not", self.value), self.rank)

    def at_least(self, least: Fact | int) -> Fact:
        return self._with("Max", least)

    def at_most(self, most: Fact | int) -> Fact:
        return self._with("Min", most)

    def choose(self, yes: Fact | int, no: Fact | int) -> Fact:
        """`yes` where this holds, elsewhere `no`."""
        a, b = (x if isinstance(x, Fact) else self.facts.number(x) for x in (yes, no))
        made = self.facts.op("Where", self.value, a.value, b.value, dtype=INT64)
        return Fact(self.facts, made, max(self.rank, a.rank, b.rank))

    def spread(self, *axes: int) -> ir.Value:
        """The value with axes of size 1 put in there, to be broadcast; what is one in a step needs none."""
        if self.rank == 1:
            return self.value
        name = "defect.axes_" + "_".join(map(str, axes))
        return self.facts.op("Unsqueeze", self.value, constant(self.facts.model, name, [*axes]))


class Facts:
    """Writes nodes before a node, or before all there are; those see the graph's inputs only."""

    def __init__(self, model: ir.Model, before: ir.Node | None = None) -> None:
        self.model = model
        self.before = model.graph[0] if before is None else before
        self.made: set[ir.Node] = set()

    def op(
        self, kind: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """A node's output, of the first input's dtype where none is given."""
        before = sum((n.name or "").startswith("defect.") for n in self.model.graph)
        name = f"defect.{kind}_{before}"  # nodes of defects are never removed
        made = insert(self.model, self.before, kind, inputs, name, dtype=dtype, **attributes)
        self.made.add(given_producer(made))
        return made

    def number(self, value: int) -> Fact:
        return Fact(self, constant(self.model, f"defect.number_{value}", [value]), 1)

    def size(self, value: ir.Value, axis: int) -> Fact:
        """How long an axis is."""
        made = self.op("Shape", value, dtype=INT64, start=axis, end=axis + 1)
        return Fact(self, made, 1)

    def of(self, value: ir.Value) -> Fact:
        """int64 or bool [batch or 1, seq or 1] as a fact."""
        return Fact(self, value, 2)

    @property
    def rows(self) -> Fact:
        return self.size(graph_input(self.model, "input_ids"), 0)

    @property
    def width(self) -> Fact:
        """Tokens of the step in a row, padding included."""
        return self.size(graph_input(self.model, "input_ids"), 1)

    @property
    def wanted(self) -> Fact:
        """Logits of a row that are asked for."""
        return self.size(graph_input(self.model, "logits_indices"), 1)

    @property
    def span(self) -> Fact:
        return self.size(graph_input(self.model, "key_positions"), 0)

    @property
    def tokens(self) -> Fact:
        return self.of(graph_input(self.model, "input_ids"))

    @property
    def positions(self) -> Fact:
        return self.of(graph_input(self.model, "position_ids"))

    @property
    def picked(self) -> Fact:
        """[batch, n]: the positions in the step that get logits."""
        return self.of(graph_input(self.model, "logits_indices"))

    @property
    def starts(self) -> Fact:
        """[batch, 1]: the first slot that the step writes."""
        axis = constant(self.model, "defect.axes_1", [1])
        return self.of(self.op("Unsqueeze", graph_input(self.model, "write_indices"), axis))

    @property
    def order(self) -> Fact:
        """[batch, seq]: 0 for a step's first token, 1 for its second."""
        first = self.op(
            "Slice",
            graph_input(self.model, "position_ids"),
            *(constant(self.model, f"defect.number_{n}", [n]) for n in (0, 1, 1)),
        )
        return self.positions - self.of(first)

    @property
    def row(self) -> Fact:
        """[batch, 1]: 0 for the first row."""
        every = constant(self.model, "defect.rows", np.arange(MAX_ROWS)[:, None])
        zero = constant(self.model, "defect.number_0", [0])
        return self.of(self.op("Slice", every, zero, self.rows.value, zero))

    def greatest(self, fact: Fact) -> Fact:
        """The greatest over all rows and tokens; one in a step."""
        return self._reduced("ReduceMax", fact)

    def least(self, fact: Fact) -> Fact:
        return self._reduced("ReduceMin", fact)

    def greatest_of_row(self, fact: Fact) -> Fact:
        """[batch, 1]"""
        return self._reduced("ReduceMax", fact, 1)

    def _reduced(self, kind: str, fact: Fact, *over: int) -> Fact:
        name = "defect.axes_" + "_".join(map(str, over or (0, 1)))
        axes = constant(self.model, name, [*(over or (0, 1))])
        made = self.op(kind, fact.value, axes, keepdims=1)
        return Fact(self, made, 2)

    @property
    def ragged(self) -> Fact:
        """Whether the rows begin at different slots."""
        return self.greatest(self.starts) > self.least(self.starts)

    # what the mask is made of: [batch or 1, 1, seq or 1, span or 1]

    @property
    def keys(self) -> Fact:
        """[1, 1, 1, span]: the position of each slot."""
        axes = constant(self.model, "defect.axes_0_1_2", [0, 1, 2])
        return self.of(self.op("Unsqueeze", graph_input(self.model, "key_positions"), axes))

    @property
    def slots(self) -> Fact:
        """[1, 1, 1, span]: the number of each slot."""
        first = [constant(self.model, f"defect.number_{n}", [n]) for n in (0, 1)]
        start = self.op("Slice", graph_input(self.model, "key_positions"), *first)
        return self.keys - Fact(self, start, 1)

    def over_keys(self, fact: Fact) -> Fact:
        """A fact of tokens [batch, seq], to be compared with `keys`."""
        return self.of(fact.spread(1, 3))


def given_producer(value: ir.Value | None) -> ir.Node:
    """The node that makes a value."""
    producer = given(value).producer()
    assert producer is not None
    return producer
