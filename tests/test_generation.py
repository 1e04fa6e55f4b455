"""The generation loop against a row-at-a-time reference."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from fake_session import VOCAB, FakeSession, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport import QwenportError
from qwenport.engines import (
    Cancellation,
    CapacityError,
    Generated,
    GenerateOptions,
    Generation,
    GenerationError,
    SamplingError,
    SamplingParams,
    generate,
)

tokens = st.integers(0, VOCAB - 1)
temperatures, penalties = st.sampled_from([0.0, 0.8, 3.0]), st.sampled_from([1.0, 1.4])


@given(
    prompts=st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=5),
    params=st.builds(SamplingParams, temperature=temperatures, repetition_penalty=penalties),
    max_new=st.integers(1, 14),
    stop=st.sets(tokens, max_size=3),
    chunk=st.integers(1, 12),
    spare=st.integers(0, 12),
)
@settings(max_examples=300, deadline=None)
def test_rows_are_as_if_alone_and_no_step_is_wasted(prompts, params, max_new, stop, chunk, spare):
    longest, steps = max(map(len, prompts)), []
    session = FakeSession(len(prompts) + 1, longest + spare, chunk)
    streamed: list[list[int]] = [[] for _ in prompts]
    options = options_of(params, max_new_tokens=max_new, stop_tokens=stop)
    results = generate(
        session, prompts, options, on_token=lambda row, token: streamed[row].append(token)
    )
    for b, prompt in enumerate(prompts):
        want, held = reference(prompt, b, params, max_new, stop, session.capacity)
        assert results[b] == want
        assert session.held[b] == held
        steps.append(len(held) - len(prompt))
    assert streamed == [r.tokens for r in results]
    assert all(h == [] for h in session.held[len(prompts) :])
    # Each row decodes in its first steps[b] steps and idles after; no step beyond the longest row.
    assert session.decodes == [[i < n for n in steps] for i in range(max(steps))]
    starts = range(0, longest, chunk)
    assert session.prefills == [[len(p[i : i + chunk]) for p in prompts] for i in starts]


def options_of(params: SamplingParams, **others) -> GenerateOptions:
    return GenerateOptions(**asdict(params), **others)


def greedy_run(prompt: list[int], n: int) -> list[int]:
    return reference(prompt, 0, SamplingParams(), n, set(), 99)[0].tokens


def run(session, prompts, on_token=None, **options):
    return generate(session, prompts, GenerateOptions(**{"max_new_tokens": 6} | options), on_token)


def ended(tokens: list[int], reason: str, stop_token: int | None = None) -> Generated:
    last = tokens[-1] if stop_token is None else stop_token
    return Generated(tokens, reason, stop_token, [last])


def test_finish_reasons_and_their_precedence():
    prompt, want = [4, 2, 7], greedy_run([4, 2, 7], 6)
    assert run(FakeSession(1, 8), [prompt]) == [ended(want, "length")]
    assert run(FakeSession(1, 7), [prompt]) == [ended(want[:5], "capacity")]
    assert run(FakeSession(1, 3), [prompt]) == [ended(want[:1], "capacity")]
    (both,) = run(FakeSession(1, 3), [prompt], max_new_tokens=1)
    assert both == ended(want[:1], "length")
    assert want[1] != want[0]
    (stopped,) = run(FakeSession(1, 4), [prompt], stop_tokens=[want[1]], max_new_tokens=2)
    assert stopped == ended(want[:1], "stop", want[1])


def test_a_short_row_streams_while_the_others_are_prefilled():
    session, calls, long, short = FakeSession(2, 20, 2), [], [1, 2, 3, 4, 5], [6]

    def on_token(row: int, token: int) -> None:
        calls.append((row, token, len(session.prefills)))

    run(session, [long, short], max_new_tokens=1, on_token=on_token)
    assert calls == [(1, *greedy_run(short, 1), 1), (0, *greedy_run(long, 1), 3)]


def test_rows_of_the_same_prompt_draw_differently_and_no_seed_is_fresh():
    hot = {"temperature": 2.0, "max_new_tokens": 30}
    two = run(FakeSession(2, 40), [[1, 2]] * 2, **hot)
    assert two[0].tokens != two[1].tokens
    again = [run(FakeSession(1, 40), [[1]], seed=None, **hot) for _ in range(2)]
    assert again[0] != again[1]


def test_bad_requests_are_refused_before_anything_runs():
    session = FakeSession(2, 4)
    bad = [{"max_new_tokens": 0}, {"max_new_tokens": 1.5}]
    bad += [{"stop_tokens": stop} for stop in ("x", 5, ["x"], [-1])]
    for kwargs in bad:
        name = next(iter(kwargs)).replace("stop_tokens", "stop.token")
        with pytest.raises(GenerationError, match=name):
            run(session, [[1]], **kwargs)
    with pytest.raises(QwenportError, match="temperature"):
        run(session, [[1]], temperature=-1)
    for prompts in ([[1], []], [[1], [VOCAB]], [[1], [-1]], [[1], "text"], [[1], [True]]):
        with pytest.raises(GenerationError, match="prompt 1") as error:
            run(session, prompts)
        assert isinstance(error.value, QwenportError)
    with pytest.raises(GenerationError, match="3 prompts"):
        run(session, [[1]] * 3)
    with pytest.raises(CapacityError, match="prompt 1 has 5 tokens"):
        run(session, [[1], [1, 2, 3, 4, 5]])
    assert not session.clean
    assert run(session, []) == [] and session.clean  # no rows: it is reset all the same


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({"stop_tokens": stop}, "stop_tokens") for stop in (b"ab", np.array(3), {1: 2}, None, 5)),
        ({"append": "no"}, "append"),
        ({"append": 2}, "append"),
        ({"cancellation": threading.Event()}, "cancellation"),
        ({"temperature": 10**400}, "temperature"),
        ({"repetition_penalty": 10**400}, "repetition_penalty"),
        ({"temperature": np.array([1.0, 2.0])}, "temperature"),
        ({"temperature": np.complex64(1)}, "temperature"),
    ],
)
def test_an_option_of_another_type_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(QwenportError, match=f"^{name} must be"):
        GenerateOptions(**options)


def test_arguments_of_another_type_are_named_and_the_session_is_left_alone() -> None:
    session, few = FakeSession(2, 9), GenerateOptions(max_new_tokens=2)
    for prompts in (None, 5, [1, 2], iter([[1]]), {0: [1]}, "ab", [b"ab"], [iter([1])], [{0: 1}]):
        with pytest.raises(GenerationError, match="must be a list of token ids"):
            generate(session, prompts, few)
    for options in (10, None, {"max_new_tokens": 2}):
        with pytest.raises(GenerationError, match="options must be GenerateOptions"):
            generate(session, [[1]], options)
    with pytest.raises(GenerationError, match="on_token must be a function"):
        generate(session, [[1]], few, on_token=3)
    assert not session.clean
    for rows in ([np.array([1, 2]), (3,)], ((1, 2), range(3, 4)), np.array([[1, 2], [3, 4]])):
        assert len(generate(session, rows, few)) == 2


def test_unusable_logits_name_the_row(monkeypatch):
    decode = FakeSession.decode
    monkeypatch.setattr(FakeSession, "decode", lambda *a: decode(*a) * np.float32([[1], [np.nan]]))
    with pytest.raises(SamplingError, match="row 1, new token 1"):
        run(FakeSession(2, 9), [[1], [2]])
    generation = Generation(FakeSession(3, 9), [[1], [2], [3]])
    monkeypatch.setattr(
        FakeSession, "decode", lambda *a: decode(*a) * np.float32([[1], [np.nan], [1]])
    )
    with pytest.raises(SamplingError, match="row 1, new token 1"):
        list(generation)
    assert [len(result.pending) for result in generation.results] == [1, 0, 1]


@given(
    prompts=st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=3),
    turns=st.lists(st.lists(tokens, max_size=4), min_size=1, max_size=3),
    chunk=st.integers(1, 4),
)
def test_a_generation_goes_on_from_what_the_last_one_left(prompts, turns, chunk) -> None:
    """`pending` and then the new prompt: as if all of it had been there from the start."""
    session = FakeSession(len(prompts), 200, chunk)
    results = run(session, prompts)
    history = [prompt + result.tokens for prompt, result in zip(prompts, results, strict=True)]
    for turn in turns:
        given = [result.pending + turn for result in results]
        before = [list(row) for row in session.held]
        results = run(session, given, append=True)
        for b, result in enumerate(results):
            want, held = reference(given[b], b, SamplingParams(), 6, set(), 200, before[b])
            assert (result, session.held[b]) == (want, held)
            history[b] += turn + result.tokens
            assert session.held[b] + result.pending == history[b]


@given(
    prompts=st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=3),
    chunk=st.integers(1, 4),
    after=st.integers(0, 12),
    ask=st.booleans(),
)
def test_a_cancelled_generation_has_what_it_drew_and_what_is_pending(
    prompts, chunk, after, ask
) -> None:
    """By a request from outside, or because nobody iterates any more."""
    session, cancellation = FakeSession(len(prompts), 60, chunk), Cancellation()
    options = GenerateOptions(max_new_tokens=6, cancellation=cancellation)
    generation, drawn = Generation(session, prompts, options), []
    assert [result.reason for result in generation.results] == ["cancelled"] * len(prompts)
    assert [result.pending for result in generation.results] == prompts
    if after == 0 and ask:
        cancellation.request()
    for piece in generation if after or ask else ():
        drawn.append(piece)
        if len(drawn) == after:
            if not ask:
                break
            cancellation.request()
    results = generation.results
    for b, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        seen = [token for row, token in drawn if row == b]
        assert result.tokens[: len(seen)] == seen  # a step's tokens are drawn together
        assert len(result.tokens) - len(seen) in ((0,) if ask else (0, 1))
        assert result.pending
        assert session.held[b] + result.pending == prompt + result.tokens
        whole, _ = reference(prompt, b, SamplingParams(), 6, set(), 60)
        assert whole.tokens[: len(result.tokens)] == result.tokens
        assert result.reason == ("length" if len(result.tokens) == 6 else "cancelled")
    if not session.clean:  # it never began
        return
    rest = GenerateOptions(max_new_tokens=6, append=True)
    for (b, prompt), result, more in zip(
        enumerate(prompts),
        results,
        generate(session, [result.pending for result in results], rest),
        strict=True,
    ):
        whole, _ = reference(prompt, b, SamplingParams(), 12, set(), 60)
        tokens = result.tokens + more.tokens
        assert tokens == whole.tokens[: len(tokens)]


@given(
    prompts=st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=3),
    pauses=st.lists(st.integers(1, 5), max_size=4),
)
def test_a_generation_that_was_left_goes_on_where_it_was(prompts, pauses) -> None:
    generation = Generation(FakeSession(len(prompts), 60, 2), prompts, GenerateOptions(6))
    pieces = [piece for pause in pauses for piece in itertools.islice(generation, pause)]
    pieces += list(generation)
    assert generation.results == run(FakeSession(len(prompts), 60, 2), prompts)
    for b, result in enumerate(generation.results):
        assert [token for row, token in pieces if row == b] == result.tokens


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.reset(),
        lambda session: session.decode([3]),
        lambda session: session.prefill([[1, 2]]),
        lambda session: list(itertools.islice(Generation(session, [[1, 2]]), 2)),
        lambda session: generate(session, [[1]], GenerateOptions(1, append=True)),
    ],
)
def test_a_session_that_was_used_meanwhile_is_noticed(use: Callable[[Any], Any]) -> None:
    session = FakeSession(1, 60)
    generation = Generation(session, [[1, 2]])
    assert len(list(itertools.islice(generation, 2))) == 2
    before = generation.results
    use(session)
    with pytest.raises(GenerationError, match=r"meanwhile|another generation"):
        list(generation)
    assert generation.results == before
    late = Generation(session, [[1, 2]], GenerateOptions(append=True))
    session.decode([3])
    with pytest.raises(GenerationError, match="meanwhile"):
        list(late)


def test_results_stay_what_they_were() -> None:
    session = FakeSession(1, 60)
    generation = Generation(session, [[1, 2]], GenerateOptions(3))
    list(generation)
    before = generation.results
    run(session, [[4]], append=True)
    session.reset()
    assert generation.results == before


def test_a_generation_is_iterated_piece_by_piece() -> None:
    generation = Generation(FakeSession(2, 40), [[1, 2], [3]], GenerateOptions(max_new_tokens=4))
    pieces = list(generation)
    assert [piece.token for piece in pieces if piece.row == 0] == greedy_run([1, 2], 4)
    assert [result.reason for result in generation.results] == ["length", "length"]
    assert list(generation) == []  # each comes once
