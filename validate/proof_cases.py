"""What a proof does with a session: token sequences, and cases of operations on them.

Cases share their marks: however a session gets to the first n tokens of a sequence, the logits must be the same. So a
case costs a few bytes, and a mark about half a kilobyte.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwenport.contract import CHUNK, SPAN_MULTIPLE
from qwenport.engines import Kind, Operation
from qwenport.engines.spans import Spans

SEED = 20240919
MAIN, BRANCH, ROWS = 0, 1, 2
"""Sequences: a long one; one that leaves it after SHARED tokens; from ROWS on, those of ragged rows."""
SHARED = 5
ROW_SEQUENCES, ROW_LENGTH = 8, 16
REQUESTS = ROWS + ROW_SEQUENCES
"""The first sequence of those that are scaled by length, if there are any."""
MOST_ROWS = 64
EXPERT_TOKENS = 512
BASIC = 6
"""Of `make_cases`: those that come before the ones for experts."""
CONTEXTS = (1026, 514, 258, 130, 66)
"""How far the main sequence may go: past a span's end. The longest that the time allows."""

Mark = tuple[int, int]


@dataclass
class Case:
    """One case: its operations without numbers of case and call, and the marks that it needs.

    Attributes:
        name: in words.
        calls: operations of each call.
        marks: (sequence, n) that are to be judged.
        rows, slots: what it needs.
    """

    name: str
    rows: int = 1
    slots: int = 1
    calls: list[list[Operation]] = field(default_factory=list)
    marks: set[Mark] = field(default_factory=set)

    def feed(self, rows: Mapping[int, Mark], *, judged: bool = True) -> None:
        """Feed row r up to n tokens of a sequence, for each r: (sequence, n), in one call."""
        self.calls.append(
            [Operation(0, 0, Kind.FEED, row, *mark) for row, mark in sorted(rows.items())]
        )
        self.rows = max(self.rows, *(row + 1 for row in rows))
        self.slots = max(self.slots, *(n for _, n in rows.values()))
        if judged:
            self.marks |= set(rows.values())

    def step(self, sequence: int, *ends: int, judged: bool = True) -> None:
        """Feed row 0 up to each of `ends`, one call each."""
        for end in ends:
            self.feed({0: (sequence, end)}, judged=judged)

    def truncate(self, length: int, row: int = 0) -> None:
        """Keep the first tokens of a row."""
        self.calls.append([Operation(0, 0, Kind.TRUNCATE, row, end=length)])

    def poison(self) -> None:
        """Fill the slots that hold no token."""
        self.calls.append([Operation(0, 0, Kind.POISON)])

    def reset(self) -> None:
        """Forget all tokens."""
        self.calls.append([Operation(0, 0, Kind.RESET)])


def operations(cases: Sequence[Case]) -> Iterator[Operation]:
    """The operations of all cases, numbered."""
    calls = itertools.count()
    for number, case in enumerate(cases):
        yield Operation(number, next(calls), Kind.BEGIN, case.rows, end=case.slots)
        for several, call in zip(case.calls, calls, strict=False):  # `calls` has no end
            for o in several:
                yield Operation(number, call, o.kind, o.row, o.sequence, o.end)


def make_sequences(
    vocab_size: int, context: int, *, experts: bool, longer: Sequence[int] = ()
) -> list[list[int]]:
    """The token sequences, drawn from the whole vocabulary; the last one is for experts if there are any.

    Args:
        vocab_size: the model's.
        context: tokens that a sequence may have.
        experts: whether the model has experts.
        longer: lengths of sequences from REQUESTS on, which may be longer than `context`; they begin alike.
    """
    generator = np.random.default_rng(SEED)

    def draw(count: int) -> list[int]:
        drawn: list[int] = generator.integers(0, vocab_size, min(count, context)).tolist()
        return drawn

    main = draw(context)
    found = [main, (main[:SHARED] + draw(ROW_LENGTH))[:ROW_LENGTH][:context]]
    found += [draw(ROW_LENGTH) for _ in range(ROW_SEQUENCES)]
    last = [draw(EXPERT_TOKENS)] if experts else []
    rest = generator.integers(0, vocab_size, max(0, max(longer, default=0) - context)).tolist()
    return [*found, *([*main, *rest][:length] for length in longer), *last]


def span_edges(limit: int) -> list[int]:
    """The last slots of the spans of every form of attention, up to `limit`."""
    return sorted(
        {
            span
            for first in (SPAN_MULTIPLE, CHUNK)
            for span in Spans(first, limit)
            if span % first == 0
        }
    )


def make_cases(context: int, max_batch: int, *, whole: bool) -> list[Case]:
    """The cases that fit, the most important ones first.

    Args:
        context: tokens of the main sequence.
        max_batch: rows.
        whole: whether `context` is all that the package allows, so that its last slot is used.
    """
    found = [_decode(context), _poisoned(), _widths(), _chunks(), _truncate(), _restart()]
    sizes = {2, 3, max_batch, *(2**n for n in range(2, 7))}
    ragged = [_ragged(rows) for rows in sorted(sizes) if 1 < rows <= min(max_batch, MOST_ROWS)]
    edges = span_edges(context)
    groups = [
        [edge for edge in edges if top // 2 < edge <= top] for top in (64, 128, 256, 512, 1024)
    ]
    found += ragged[:1] + ragged[-1:] if len(ragged) > 1 else ragged
    before = [0, *(group[-1] for group in groups if group)]
    found += [
        _edges(last, group) for last, group in zip(before, filter(None, groups), strict=False)
    ]
    if edges:
        found.append(_beyond(edges[-1]))
    found += [_across(edge) for edge in edges[:1] if max_batch > 1]
    if whole:
        found.append(_full(context, max_batch))
    found += ragged[1:-1]
    return [case for case in found if case.slots <= context]


def expert_case(sequence: int, ends: Iterable[int]) -> Case:
    """Feeds up to each of `ends`, every second one with a last step of one token."""
    case, held = Case("experts"), 0
    for number, end in enumerate(ends):
        if number % 2 and end - held > 1:
            case.step(sequence, end - 1, judged=False)
        case.step(sequence, end)
        held = end
    return case


def _decode(context: int) -> Case:
    """Also of the shortest context, so that every package has a case."""
    case = Case("one token, and decode")
    case.step(MAIN, *(n for n in (1, 2, 3, 8, 9, 10) if n <= context))
    return case


def _poisoned() -> Case:
    case = Case("poisoned cache")
    case.poison()
    case.step(MAIN, 2)
    case.step(MAIN, 8)
    case.poison()
    case.step(MAIN, 9, 10)
    return case


def _widths() -> Case:
    case = Case("prefill of several widths")
    for end in (2, 3, 8, 10, 16):
        case.step(MAIN, end)
        case.reset()
    return case


def _chunks() -> Case:
    case = Case("chunked prefill")
    case.step(MAIN, 3, 8, 9, 16)
    return case


def _truncate() -> Case:
    """Go back and continue in another way: what was written before must not be read again."""
    case = Case("truncate and continue")
    case.step(MAIN, 10)
    case.truncate(SHARED)
    case.step(BRANCH, 8, 9)
    case.truncate(8)
    case.step(BRANCH, 12)
    return case


def _restart() -> Case:
    case = Case("restart")
    case.step(MAIN, 16)
    case.reset()
    case.step(BRANCH, 8, 9)
    case.reset()
    case.step(MAIN, 3)
    return case


def _row_sequence(row: int) -> int:
    """Neighbours differ, also in groups of ROW_SEQUENCES."""
    return ROWS + (row + row // ROW_SEQUENCES) % ROW_SEQUENCES


def _ragged(rows: int) -> Case:
    """Rows of different lengths; then all, the odd ones and the even ones go on alone."""
    case = Case(f"{rows} ragged rows")
    first = {row: 1 + (5 * (_row_sequence(row) - ROWS)) % 13 for row in range(rows)}

    def upto(added: int, only: Iterable[int]) -> dict[int, Mark]:
        return {row: (_row_sequence(row), first[row] + added) for row in only}

    case.poison()
    case.feed(upto(0, range(rows)))
    case.feed(upto(1, range(rows)))
    case.feed(upto(2, range(1, rows, 2)))
    case.poison()
    case.feed(upto(2, range(0, rows, 2)))
    longest = max(range(rows), key=lambda row: first[row])
    case.truncate(1, longest)
    case.feed(upto(0, [longest]))
    return case


def _edges(before: int, edges: Sequence[int]) -> Case:
    """The first slot after a span and the last one of each following span, by prefill and by single tokens.

    It needs no slot after the last edge: an engine with so many slots is tested up to its own end.

    Args:
        before: the edge before `edges`, 0 if there is none.
        edges: rising.
    """
    last = edges[-1]
    case = Case(f"span edges up to {last}")
    case.poison()
    if before:
        _cross(case, before)
    for edge in edges:
        case.step(MAIN, edge - 1, judged=False)
        case.step(MAIN, edge, *([edge + 1] if edge < last else []))
    case.reset()
    case.step(MAIN, last)
    case.truncate(last - ROW_LENGTH)
    case.step(MAIN, last)
    return case


def _beyond(edge: int) -> Case:
    """What follows the last edge that the sequence reaches."""
    case = Case(f"beyond span edge {edge}")
    case.poison()
    _cross(case, edge)
    return case


def _cross(case: Case, edge: int) -> None:
    """The first slot after an edge, of a prompt and by a single token; between these it is stale, behind the span."""
    case.step(MAIN, edge + 1)
    case.truncate(edge - ROW_LENGTH)
    case.step(MAIN, edge, edge + 1)


def _across(edge: int) -> Case:
    """A short row next to one that crosses a span's edge: the span is the longest row's."""
    case = Case(f"short row next to one that crosses {edge}")
    case.poison()
    case.feed({0: (ROWS, 1), 1: (MAIN, edge - 1)}, judged=False)
    case.feed({0: (ROWS, 2), 1: (MAIN, edge)})
    case.feed({0: (ROWS, 3), 1: (MAIN, edge + 1)})
    return case


def _full(context: int, max_batch: int) -> Case:
    """A prompt that fills it, then its last slot alone; an idle full row replays its last token and changes nothing."""
    case = Case("full cache")
    case.step(MAIN, context)
    case.truncate(context - 1)
    case.poison()
    case.step(MAIN, context)
    if max_batch > 1:
        case.feed({1: (ROWS + 1, 6)})
        case.feed({1: (ROWS + 1, 7)})
        case.truncate(context - 1)
        case.feed({0: (MAIN, context), 1: (ROWS + 1, 8)})
    return case
