"""Stop sequences against their definition, tried out token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fake_session import VOCAB, FakeSession, reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenport.engines import (
    Cancellation,
    GenerateOptions,
    Generation,
    GenerationError,
    SamplingParams,
    generate,
)
from qwenport.engines.stop_sequences import StopSequences

HOT = {"temperature": 0.8}
CAPACITY = 80
token = st.integers(0, VOCAB - 1)
prompts = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=3)


def undecided(new: Sequence[int], sequences: Sequence[Sequence[int]]) -> int:
    """How many of the last tokens begin a sequence, by trying every number of them."""
    beginnings = {tuple(s[:n]) for s in sequences for n in range(1, len(s))}
    return max((n for n in range(1, len(new) + 1) if tuple(new[-n:]) in beginnings), default=0)


bit = st.integers(0, 1)  # sequences that repeat and overlap


@settings(max_examples=500)
@given(
    new=st.lists(bit, max_size=40),
    sequences=st.lists(st.lists(bit, min_size=1, max_size=9), max_size=4),
)
@example([1, 1, 1, 0], [[1, 1, 0]])
@example([0, 1], [[1], [0, 1], [0, 1]])
def test_matching_equals_trying_every_end(new, sequences) -> None:
    matching = StopSequences(sequences)
    for count, token in enumerate(new, 1):
        ends = [i for i, s in enumerate(sequences) if new[max(count - len(s), 0) : count] == s]
        found = matching.push(token)
        assert found == min(ends, key=lambda i: (-len(sequences[i]), i), default=None)
        if ends:
            return
        assert matching.undecided == undecided(new[:count], sequences)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts and options, whose stop sequences are mostly taken from what would be generated without them."""
    given_prompts = draw(prompts)
    seed = draw(st.integers(0, 99))
    max_new_tokens = draw(st.integers(1, 14))
    params = SamplingParams(**HOT, seed=seed)
    runs = [
        reference(prompt, b, params, 14, set(), CAPACITY)[0].tokens
        for b, prompt in enumerate(given_prompts)
    ]

    def piece(run: list[int]) -> st.SearchStrategy[list[int]]:
        where = st.tuples(st.integers(0, len(run) - 1), st.integers(1, 5))
        return where.map(lambda at: run[at[0] : at[0] + at[1]])

    one = st.one_of(st.sampled_from(runs).flatmap(piece), st.lists(token, min_size=1, max_size=20))
    sequences = draw(st.lists(one, min_size=1, max_size=4))
    for sequence in list(sequences):  # one that is the end of another, or its equal
        if draw(st.booleans()):
            sequences.append(sequence[draw(st.integers(0, len(sequence) - 1)) :])
    stop_tokens = draw(st.sets(token, max_size=1))
    return given_prompts, {
        "max_new_tokens": max_new_tokens,
        "stop_tokens": stop_tokens,
        "stop_sequences": sequences,
        "seed": seed,
        **HOT,
    }


@settings(max_examples=400, deadline=None)
@given(case=cases(), spare=st.integers(0, 16))
def test_rows_end_where_their_tokens_end_with_a_sequence(case, spare) -> None:
    given_prompts, options = case
    capacity = max(map(len, given_prompts)) + spare
    session, params = FakeSession(3, capacity), SamplingParams(**HOT, seed=options["seed"])
    streamed: list[list[int]] = [[] for _ in given_prompts]

    def on_logits(row: int, _: Any, drawn: tuple[int, ...]) -> None:
        """What may begin a sequence is held back, and nothing else."""
        held_back = undecided(drawn, options["stop_sequences"])
        assert streamed[row] == list(drawn)[: len(drawn) - held_back]

    results = generate(
        session,
        given_prompts,
        GenerateOptions(**options, on_logits=on_logits),
        on_token=lambda row, token: streamed[row].append(token),
    )
    for b, prompt in enumerate(given_prompts):
        wanted = reference(
            prompt, b, params, options["max_new_tokens"], options["stop_tokens"], capacity,
            sequences=options["stop_sequences"],
        )  # fmt: skip
        assert (results[b], session.held[b]) == wanted
    assert streamed == [result.tokens for result in results]


@given(
    given_prompts=prompts, stops=st.lists(token, max_size=4, unique=True), spare=st.integers(0, 12)
)
def test_a_sequence_of_one_token_is_a_stop_token(given_prompts, stops, spare) -> None:
    runs = []
    for options in ({"stop_tokens": stops}, {"stop_sequences": [[stop] for stop in stops]}):
        session = FakeSession(3, max(map(len, given_prompts)) + spare)
        calls: list[tuple[int, int, int]] = []
        results = generate(
            session,
            given_prompts,
            GenerateOptions(9, temperature=0.8, repetition_penalty=1.2, logprobs=2, **options),
            on_token=lambda *call, s=session, c=calls: c.append((*call, len(s.decodes))),
        )
        runs.append((session.held, session.decodes, calls, results))
    (*theirs, by_token), (*ours, by_sequence) = runs
    assert theirs == ours
    for a, b in zip(by_token, by_sequence, strict=True):
        assert b.stop_token is None and a.stop_sequence is None
        assert (a.stop_token is None) == (b.stop_sequence is None)
        if b.stop_sequence is not None:
            assert stops[b.stop_sequence] == a.stop_token
        for name in ("tokens", "reason", "pending", "logprobs", "top_logprobs"):
            assert getattr(a, name) == getattr(b, name)


@given(case=cases(), turns=st.lists(st.lists(token, max_size=3), min_size=1, max_size=3))
def test_a_row_goes_on_after_its_sequence_as_if_all_had_been_there(case, turns) -> None:
    given_prompts, options = case
    sequences = options["stop_sequences"]
    session, said = FakeSession(3, 200), [list(prompt) for prompt in given_prompts]
    results = generate(session, given_prompts, GenerateOptions(**options))
    for turn in [*turns, None]:
        for b, result in enumerate(results):
            said[b] += result.tokens
            said[b] += [] if result.stop_token is None else [result.stop_token]
            said[b] += [] if result.stop_sequence is None else sequences[result.stop_sequence]
            assert session.held[b] + result.pending == said[b]
        if turn is None:
            return
        continued = [[*result.pending, *turn] for result in results]
        said = [[*row, *turn] for row in said]
        results = generate(session, continued, GenerateOptions(**options, append=True))
        anew = generate(FakeSession(3, 200), said, GenerateOptions(**options))
        assert results == anew


@given(case=cases(), after=st.integers(1, 14))
def test_a_cancelled_row_gives_what_it_held_back(case, after) -> None:
    given_prompts, options = case
    cancellation, streamed = Cancellation(), [[] for _ in given_prompts]
    calls = 0

    def on_logits(row: int, logits: Any, drawn: tuple[int, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            cancellation.request()

    generation = Generation(
        FakeSession(3, 200),
        given_prompts,
        GenerateOptions(**options, cancellation=cancellation, on_logits=on_logits),
    )
    for row, new in generation:
        streamed[row].append(new)
    assert streamed == [result.tokens for result in generation.results]


@pytest.mark.parametrize(
    ("sequences", "complaint"),
    [
        ([[]], "stop sequence 0 is empty"),
        ([[1], []], "stop sequence 1 is empty"),
        ([[1, -2]], "an id of stop sequence 0 must be at least 0"),
        ([[1, 2.0]], "an id of stop sequence 0 must be an integer"),
        ([1, 2], "stop sequence 0 must be a list of token ids, got 1"),
        (["ab"], "stop sequence 0 must be a list of token ids, got 'ab'"),
        ([{1, 2}], "stop sequence 0 must be a list of token ids, got {1, 2}"),
        ({(1, 2)}, "stop_sequences must be a list of token ids"),
        (None, "stop_sequences must be a list of token ids, got None"),
    ],
)
def test_what_is_no_sequence_is_named(sequences: Any, complaint: str) -> None:
    with pytest.raises(GenerationError, match=complaint):
        GenerateOptions(stop_sequences=sequences)
