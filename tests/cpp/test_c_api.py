"""The C API, bound with ctypes: sessions are what the definition of the toy network says they are."""

from __future__ import annotations

import ctypes as c
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwenport.engines import Generated
from qwenport.engines.sampling import Sampler, SamplingParams

from .runtime import IDLE, Error, Library
from .toy import VOCAB, toy_directory, toy_logits, toy_manifest

ROWS, CAPACITY = 3, 70
token = st.integers(0, VOCAB - 1)


@pytest.fixture(scope="module")
def toy(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_directory(library, tmp_path_factory.mktemp("toy"))


def test_any_sequence_of_calls(library: Library, toy: Path) -> None:
    manifest = toy_manifest(library)
    engine = library.load(toy)

    class Calls(RuleBasedStateMachine):
        """A session, and the tokens that its rows must hold."""

        def __init__(self) -> None:
            super().__init__()
            self.session = engine.session(max_batch=ROWS, capacity=CAPACITY)
            self.held: list[list[int]] = [[] for _ in range(ROWS)]
            self.saved: tuple[bytes, list[list[int]]] | None = None

        def compare(self, fed: list[list[int]], logits: list) -> None:
            for row, new, found in zip(self.held, fed, logits, strict=False):
                row += new
                if new:
                    np.testing.assert_array_equal(found, toy_logits(library, manifest, row))
                else:
                    assert found is None

        @rule(rows=st.lists(st.lists(token, max_size=40), min_size=1, max_size=ROWS))
        def prefill(self, rows: list[list[int]]) -> None:
            if any(len(h) + len(r) > CAPACITY for h, r in zip(self.held, rows, strict=False)):
                with pytest.raises(Error, match="slots") as error:
                    self.session.prefill(rows)
                assert error.value.kind == "capacity"
            else:
                self.compare(rows, self.session.prefill(rows))

        @rule(tokens=st.lists(st.one_of(token, st.just(IDLE)), min_size=1, max_size=ROWS))
        def decode(self, tokens: list[int]) -> None:
            tokens = [
                IDLE if len(held) == CAPACITY else token
                for held, token in zip(self.held, tokens, strict=False)
            ]
            self.compare(
                [[] if token == IDLE else [token] for token in tokens], self.session.decode(tokens)
            )

        @rule(row=st.integers(0, ROWS - 1), length=st.integers(0, CAPACITY))
        def truncate(self, row: int, length: int) -> None:
            if length > len(self.held[row]):
                with pytest.raises(Error, match="cannot keep"):
                    self.session.truncate(length, row)
            else:
                self.session.truncate(length, row)
                del self.held[row][length:]

        @rule()
        def save(self) -> None:
            self.saved = self.session.save(), [list(row) for row in self.held]

        @precondition(lambda self: self.saved is not None)
        @rule(elsewhere=st.booleans())
        def restore(self, elsewhere: bool) -> None:
            assert self.saved is not None
            if elsewhere:
                self.session = engine.session(max_batch=ROWS, capacity=CAPACITY)
            self.session.restore(self.saved[0])
            self.held = [list(row) for row in self.saved[1]]

        @rule()
        def reset(self) -> None:
            self.session.reset()
            self.held = [[] for _ in range(ROWS)]

        @rule(
            prompts=st.lists(st.lists(token, min_size=1, max_size=30), min_size=1, max_size=ROWS),
            seed=st.integers(0, 2**64 - 1),
            stop_ids=st.lists(token, max_size=2),
            temperature=st.sampled_from([0.0, 0.9]),
            max_new_tokens=st.integers(1, 60),
            append=st.booleans(),
        )
        def generate(self, prompts, seed, stop_ids, temperature, max_new_tokens, append) -> None:
            params = SamplingParams(temperature=temperature, seed=seed)
            before = self.held if append else [[] for _ in range(ROWS)]
            if any(len(h) + len(p) > CAPACITY for h, p in zip(before, prompts, strict=False)):
                with pytest.raises(Error, match="the session has room for"):
                    self.session.generate(prompts, append=1)
                return
            found = self.session.generate(
                prompts,
                seed=seed,
                stop_tokens=stop_ids,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                append=append,
            )
            self.held = before
            for b, (prompt, result) in enumerate(zip(prompts, found, strict=True)):
                expected, held = plain(before[b], prompt, b, params, stop_ids, max_new_tokens)
                assert result == expected
                self.held[b] = held

        @invariant()
        def lengths_are_those_of_the_tokens(self) -> None:
            assert self.session.lengths == [len(row) for row in self.held]

    def plain(before, prompt, row, params, stop_ids, max_new) -> tuple[Generated, list[int]]:
        """Generation without a session, and the tokens that a session holds after it."""
        sampler, held, new = Sampler(params, row=row), [*before, *prompt], []
        while True:
            drawn = sampler.sample(toy_logits(library, manifest, held), held)
            if drawn in stop_ids:
                return Generated(new, "stop", drawn, [drawn]), held
            new.append(drawn)
            if len(new) == max_new:
                return Generated(new, "length", None, [drawn]), held
            if len(held) == CAPACITY:
                return Generated(new, "capacity", None, [drawn]), held
            held.append(drawn)

    Calls.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
    Calls.TestCase("runTest").runTest()


def test_an_engine_says_what_it_is_and_may_go_before_its_sessions(
    library: Library, toy: Path
) -> None:
    engine = library.load(toy)
    info = engine.info()
    assert (info.vocab_size, info.capacity, info.max_batch, info.max_step_tokens) == (
        97,
        160,
        4,
        24,
    )
    assert (info.dtype, info.flavour, info.gpus) == (b"fp32", b"tensorrt", b"sm80,sm90")
    assert info.cache_bytes_per_row == 4 * 2 * 160 * 4 * 4
    session = engine.session()
    del engine
    assert session.capacity == 160
    session.prefill([[1, 2, 3]])


def test_errors_are_codes_with_a_text_for_each_thread(library: Library, toy: Path) -> None:
    with pytest.raises(
        Error, match=r"nowhere: no qwenport\.json; not an engine directory"
    ) as error:
        library.load(Path("nowhere"))
    assert error.value.kind == "bad engine"
    session = library.load(toy).session()
    with pytest.raises(Error, match="outside the vocabulary of 97") as error:
        session.prefill([[97]])
    assert error.value.kind == "invalid argument"

    found = []
    thread = threading.Thread(target=lambda: found.append(library.c.qwenport_last_error()))
    thread.start()
    thread.join()
    assert found == [b""]
    assert b"vocabulary" in library.c.qwenport_last_error()


def test_a_callback_may_cancel_and_so_may_another_thread(library: Library, tmp_path: Path) -> None:
    engine = library.load(toy_directory(library, tmp_path, capacity=2000))
    cancellation = c.c_void_p(library.c.qwenport_cancellation_create())
    seen: list[int] = []

    def on_token(row: int, drawn: int) -> None:
        seen.append(drawn)
        if len(seen) == 5:
            thread = threading.Thread(
                target=library.c.qwenport_cancellation_request, args=(cancellation,)
            )
            thread.start()
            thread.join()

    (result,) = engine.session().generate(
        [[1]], max_new_tokens=1000, on_token=on_token, cancellation=cancellation
    )
    library.c.qwenport_cancellation_free(cancellation)
    assert result == Generated(seen, "cancelled", None, [seen[-1]])
    assert len(seen) == 5


def test_sessions_say_whether_they_use_graphs(library: Library, toy: Path) -> None:
    engine = library.load(toy)
    assert [engine.session(cuda_graphs=flag).cuda_graphs for flag in (0, 1)] == [False, True]
