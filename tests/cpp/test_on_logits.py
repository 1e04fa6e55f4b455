"""The logits hook, log-probabilities and stop sequences through the C API, on real engines: Python's, bit by bit."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport import engines, exporter
from qwenport.contract import ONNXRUNTIME
from qwenport.engines import GenerateOptions, SamplingError, Session
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession

from . import runtime
from .runtime import Error, Library

NAMES = ["tiny-qwen2.5", "tiny-qwen2-moe"]
Sessions = Callable[[str], tuple[runtime.Session, Session]]


@pytest.fixture(scope="module")
def sessions(
    release: Path,
    package_of: Callable[[str], exporter.Package],
    onnxruntime_library: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Sessions:
    """Name of a bundled checkpoint -> a session in C++ and one in Python."""
    folder, made = tmp_path_factory.mktemp("engines"), {}

    def make(name: str) -> tuple[runtime.Session, Session]:
        if name not in made:
            engines.build(package_of(name).path, folder / name, target=ONNXRUNTIME)
            library = Library(release / "runtime" / "libqwenport.so")
            engine = library.load(folder / name, threads=1, onnxruntime=onnxruntime_library)
            theirs = OnnxRuntimeSession(package_of(name), max_batch=3, threads=1)
            made[name] = engine.session(max_batch=3), theirs
        return made[name]

    return make


def both(
    pair: tuple[runtime.Session, Session], prompts: list[list[int]], edit: Any, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Results and each row's calls, in C++ and in Python."""
    found = []
    for session in pair:
        calls: list[list[Any]] = [[] for _ in prompts]

        def on_token(row: int, token: int, calls=calls) -> None:
            calls[row].append(token)

        def on_logits(row: int, logits: np.ndarray, drawn: tuple[int, ...], calls=calls) -> None:
            calls[row].append((drawn, logits.tobytes()))
            edit(row, logits, drawn)

        if isinstance(session, runtime.Session):
            results = session.generate(prompts, on_token=on_token, on_logits=on_logits, **options)
        else:
            wanted = GenerateOptions(**options, on_logits=on_logits)
            results = engines.generate(session, prompts, wanted, on_token)
        found.append([results, calls])
    return found[0], found[1]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_generations_are_pythons_bit_by_bit(sessions: Sessions, data: st.DataObject) -> None:
    """Results with log-probabilities, the logits that hooks get, and the order of all calls; then the next turn."""
    pair = sessions("tiny-qwen2.5")
    vocab = pair[1].vocab_size
    token = st.integers(0, vocab - 1)
    prompts = data.draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=3))
    options: dict[str, Any] = {
        "max_new_tokens": data.draw(st.integers(1, 16)),
        "temperature": data.draw(st.sampled_from([0.0, 0.9])),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3])),
        "seed": data.draw(st.integers(0, 2**64 - 1)),
    }
    modulus = data.draw(st.integers(1, 5))

    def edit(row: int, logits: np.ndarray, drawn: tuple[int, ...]) -> None:
        logits[len(drawn) % modulus :: modulus] += np.float32(1.5)
        logits[np.arange(vocab) % (modulus + 1) == 1] = -np.inf

    whole = both(pair, prompts, edit, **options)[1][0]
    starts = st.integers(0, 15).flatmap(lambda i: st.tuples(st.just(i), st.integers(1, 4)))
    pieces = st.tuples(st.sampled_from(whole), starts).map(
        lambda at: at[0].tokens[at[1][0] : sum(at[1])]
    )
    sequences = data.draw(st.lists(pieces, max_size=3))
    sequences += [[*piece, 0] for piece in sequences]  # these fail at their end
    options |= {
        "stop_sequences": [sequence for sequence in sequences if sequence],
        "stop_tokens": data.draw(st.lists(token, max_size=1)),
        "logprobs": data.draw(st.sampled_from([None, 0, 1, 20])),
    }
    ours, theirs = both(pair, prompts, edit, **options)
    assert ours == theirs
    turn = [[*result.pending, 7, 8] for result in ours[0]]
    ours, theirs = both(pair, turn, edit, append=True, **options)
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}])
def test_a_grammar_of_digits_writes_what_transformers_writes(
    sessions: Sessions, name: str, sampling: dict[str, Any]
) -> None:
    allowed = list(digits.digit_tokens(name))

    def digits_only(row: int, logits: np.ndarray, drawn: tuple[int, ...]) -> None:
        kept = logits[allowed]
        logits[:] = -np.inf
        logits[allowed] = kept

    ours, theirs = both(sessions(name), digits.PROMPTS, digits_only, max_new_tokens=30, **sampling)
    assert ours == theirs
    for b, (prompt, result) in enumerate(zip(digits.PROMPTS, ours[0], strict=True)):
        assert result.tokens == digits.by_transformers(name, prompt, 30, b, **sampling)
        assert digits.tokenizer(name).decode(result.tokens).isdecimal()


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_a_hook_that_leaves_nothing_to_draw_is_blamed_as_in_python(
    sessions: Sessions, value: float
) -> None:
    ours, theirs = sessions("tiny-qwen2.5")

    def fill(row: int, logits: np.ndarray, drawn: tuple[int, ...]) -> None:
        if len(drawn) == 2:
            logits[:] = value

    with pytest.raises(SamplingError, match="on_logits") as expected:
        engines.generate(theirs, [[1]], GenerateOptions(9, on_logits=fill))
    with pytest.raises(Error) as error:
        ours.generate([[1]], max_new_tokens=9, on_logits=fill)
    assert (error.value.kind, str(error.value)) == ("sampling", str(expected.value))


def test_a_hook_may_cancel(sessions: Sessions) -> None:
    session = sessions("tiny-qwen2.5")[0]
    library = session.library.c
    cancellation = c.c_void_p(library.qwenport_cancellation_create())

    def on_logits(row: int, logits: np.ndarray, drawn: tuple[int, ...]) -> None:
        if len(drawn) == 4:
            library.qwenport_cancellation_request(cancellation)

    (result,) = session.generate([[1]], on_logits=on_logits, cancellation=cancellation)
    library.qwenport_cancellation_free(cancellation)
    assert (result.reason, len(result.tokens)) == ("cancelled", 5)


@pytest.mark.parametrize(
    ("wanted", "places", "complaint"),
    [
        (0, None, "there is no place for them"),
        (0, (0, 1, 1), "there is no place for them"),
        (2, (1, 0, 1), "there is no place for them"),
        (2, (1, 1, 0), "there is no place for them"),
        (-1, (1, 1, 1), "options.logprobs is -1"),
        (-2, None, "logprobs must be -1 or in"),
        (10**6, (1, 1, 1), "logprobs must be -1 or in"),
    ],
)
def test_places_for_log_probabilities_must_be_there(
    sessions: Sessions, wanted: int, places: tuple[int, ...] | None, complaint: str
) -> None:
    session = sessions("tiny-qwen2.5")[0]
    library = session.library
    before = session.lengths
    options = library.c.qwenport_generate_defaults()
    assert options.logprobs == -1
    options.max_new_tokens, options.logprobs = 1, wanted
    memory = np.zeros(16)
    given_places = runtime.Logprobs(*(memory.ctypes.data if p else None for p in places or ()))
    results, tokens = (runtime._Generated * 1)(), (c.c_int64 * 1)()
    code = library.c.qwenport_generate(
        session.handle, *runtime._rows([[1]]), c.c_size_t(1), c.byref(options), runtime.ON_TOKEN(),
        None, tokens, results, None if places is None else c.byref(given_places),
    )  # fmt: skip
    with pytest.raises(Error, match=complaint) as error:
        library.check(code)
    assert error.value.kind == "invalid argument"
    assert (session.lengths, memory.any()) == (before, False)
