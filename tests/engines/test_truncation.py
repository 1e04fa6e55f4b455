"""Rows cut short, and logits of chosen tokens: the session's own bookkeeping, and a package that is run so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from validate.sessions import Diary, signature

from qwenport import engines
from qwenport.engines import CapacityError, OnnxRuntimeSession, SessionError
from qwenport.exporter import Package

CAPACITY = 80
TEXT = np.random.default_rng(8).integers(0, 2048, 200).tolist()


def close(got: Any, want: Any) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


# ---- of any session

rows = st.lists(st.lists(st.integers(0, 49), max_size=10), min_size=1, max_size=3)
cuts = st.lists(st.integers(0, 10), min_size=3, max_size=3)


@given(rows, cuts, rows, st.booleans())
@settings(max_examples=100)
def test_what_follows_a_truncation_sees_what_is_left(
    first: list[list[int]], keep: list[int], then: list[list[int]], every: bool
) -> None:
    session = Diary(3, 24, max_step_tokens=5)
    session.prefill(first)
    held = [list(row) for row in first] + [[]] * (3 - len(first))
    for row, length in enumerate(keep):
        length = min(length, len(held[row]))
        session.truncate(length, row)
        held[row] = held[row][:length]
    assert session.lengths.tolist() == [len(row) for row in held]
    made = session.prefill(then, all_logits=every)
    for row, new in enumerate(then):
        text = held[row] + new
        ends = range(len(held[row]) + 1, len(text) + 1) if every else [len(text)] if new else []
        assert made[row][:, 1].tolist() == [signature(text[:end]) for end in ends]


@given(st.integers(1, 3), st.integers(1, 6), st.data())
@settings(max_examples=100)
def test_chosen_logits_are_those_of_all(count: int, width: int, data: st.DataObject) -> None:
    """Rows of different lengths before, as many new tokens for each."""
    before = data.draw(st.lists(st.lists(st.integers(0, 49), max_size=7), min_size=3, max_size=3))
    new = [
        data.draw(st.lists(st.integers(0, 49), min_size=width, max_size=width))
        for _ in range(count)
    ]
    number = data.draw(st.integers(1, min(4, width)))
    indices = st.lists(st.integers(0, width - 1), min_size=number, max_size=number)
    wanted = [data.draw(indices) for _ in range(count)]
    chosen, whole = (Diary(3, 20, max_step_logits=limit) for limit in (4, 20))
    for session in (chosen, whole):
        session.prefill(before)
    made = chosen.prefill_choosing(new, wanted)
    every = whole.prefill(new, all_logits=True)
    for row in range(count):
        assert np.array_equal(made[row], every[row][wanted[row]])
    assert chosen.lengths.tolist() == whole.lengths.tolist()
    # and both go on alike
    assert np.array_equal(chosen.decode([1, 2, 3]), whole.decode([1, 2, 3]))


@pytest.mark.parametrize(
    ("length", "row", "words"),
    [
        (4, 0, "row 0 holds 3 tokens; it cannot keep 4"),
        (-1, 0, "it cannot keep -1"),
        (1, 1, "row 1 holds 0 tokens"),
        (0, 2, "row 2 of a session of 2"),
        (0, -1, "row -1 of a session of 2"),
    ],
)
def test_a_truncation_that_makes_no_sense_is_refused(length: int, row: int, words: str) -> None:
    session = Diary(2, 8)
    session.prefill([[1, 2, 3]])
    with pytest.raises(SessionError, match=words):
        session.truncate(length, row)
    assert session.lengths.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("tokens", "wanted", "error", "words"),
    [
        ([[1, 2], [1]], [[0], [0]], SessionError, "rows of one length, 1 to 2"),
        ([[]], [[0]], SessionError, "rows of one length, 1 to 2"),
        ([[1] * 3], [[0]], SessionError, "rows of one length, 1 to 2"),
        ([[1, 2]], [[0], [1]], SessionError, "1 to 1 logits a row"),
        ([[1, 2]], [[]], SessionError, "1 to 1 logits a row"),
        ([[1, 2]], [[0, 1]], SessionError, "1 to 1 logits a row"),
        ([[1, 2]], [[2]], SessionError, r"outside 0\.\.1"),
        ([[1, 2]], [[-1]], SessionError, r"outside 0\.\.1"),
        ([[1, 99]], [[0]], SessionError, "outside the vocabulary"),
        ([[1, 2]] * 3, [[0]] * 3, SessionError, "3 rows given to a session of 2"),
        ([[1, 2, 3, 4]], [[0]], CapacityError, "row 0 holds 5 tokens and is given 4 more"),
    ],
)
def test_choices_that_make_no_sense_are_refused_and_write_nothing(
    tokens: Any, wanted: Any, error: type[Exception], words: str
) -> None:
    session = Diary(2, 8, max_step_tokens=2, max_step_logits=1)
    session.prefill([[1, 2, 3, 4, 5]])
    before = session.cache.copy()
    with pytest.raises(error, match=words):
        session.prefill_choosing(tokens, wanted)
    assert (session.cache == before).all() and session.lengths.tolist() == [5, 0]


# ---- of a package


@pytest.fixture(scope="module")
def loaded(package_of: Any) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(package_of("bf16"), max_batch=2, capacity=CAPACITY)


def fresh(loaded: OnnxRuntimeSession, text: list[int], **options: Any) -> Any:
    session = loaded.beside(max_batch=1, capacity=CAPACITY)
    return session.prefill([text], **options)[0]


@pytest.mark.parametrize("keep", [0, 1, 30, 63, 64, 70])
def test_other_tokens_after_a_truncation_are_a_fresh_text(
    loaded: OnnxRuntimeSession, keep: int
) -> None:
    """The cache is full of the old text behind; the other row goes on undisturbed."""
    loaded.reset()
    loaded.prefill([TEXT[:CAPACITY], TEXT[100:120]])
    loaded.truncate(keep)
    made = loaded.prefill([TEXT[90:99], []])[0]
    close(made, fresh(loaded, TEXT[:keep] + TEXT[90:99]))
    both = loaded.decode([5, 6])
    close(both[:1], fresh(loaded, [*TEXT[:keep], *TEXT[90:99], 5]))
    close(both[1:], fresh(loaded, [*TEXT[100:120], 6]))


def test_chosen_logits_of_a_package_are_those_of_all(loaded: OnnxRuntimeSession) -> None:
    loaded.reset()
    wanted = [[0, 17, 30], [3, 3, 29]]
    made = loaded.prefill_choosing([TEXT[:31], TEXT[40:71]], wanted)
    for row, text in enumerate((TEXT[:31], TEXT[40:71])):
        close(made[row], fresh(loaded, text, all_logits=True)[wanted[row]])
    assert loaded.lengths.tolist() == [31, 31]


# ---- sessions over one loaded model


def test_sessions_beside_each_other_share_weights_and_no_cache(
    loaded: OnnxRuntimeSession, package_of: Any
) -> None:
    other = loaded.beside(max_batch=3, capacity=50)
    assert other._session is loaded._session
    assert (other.max_batch, other.capacity, other.device) == (3, 50, loaded.device)
    addresses, theirs = loaded.cache_addresses(), other.cache_addresses()
    assert addresses.keys() == theirs.keys()
    assert not set(addresses.values()) & set(theirs.values())
    loaded.reset()
    loaded.prefill([TEXT[:20]])
    other.prefill([TEXT[50:70], TEXT[3:9], [7]])
    assert loaded.lengths.tolist() == [20, 0] and other.lengths.tolist() == [20, 6, 1]
    close(loaded.decode([TEXT[20]]), fresh(loaded, TEXT[:21]))
    close(other.decode([TEXT[70], None, None])[:1], fresh(loaded, TEXT[50:71]))
    package: Package = package_of("bf16")
    with pytest.raises(engines.SessionError, match="capacity"):
        loaded.beside(max_batch=1, capacity=package.max_seq_len + 1)
    with pytest.raises(engines.SessionError, match="rows"):
        loaded.beside(max_batch=package.max_batch + 1, capacity=4)


def test_what_a_session_observes_the_one_beside_it_observes(package_of: Any) -> None:
    names = ("model.embedding", "model.layers.1.residual_2")
    first = OnnxRuntimeSession(package_of("bf16"), capacity=8, observe=names)
    other = first.beside(max_batch=2, capacity=16)
    for session, rows in ((first, 1), (other, 2)):
        session.prefill([[5, 6, 7]] * rows)
        assert {name: value.shape for name, value in session.observed.items()} == dict.fromkeys(
            names, (rows, 3, 192)
        )
