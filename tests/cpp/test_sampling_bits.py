"""The C++ sampler draws the tokens that engines/sampling.py draws: same logits, same seed, every time."""

from __future__ import annotations

import ctypes as c

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qwenport.engines import sampling
from qwenport.engines.sampling import Sampler, SamplingError, SamplingParams, process_scores

from .runtime import ERRORS, Library

INF = float("inf")


def drawn(
    library: Library,
    logits: np.ndarray,
    seen: list[int],
    params: SamplingParams,
    row: int,
    draws: int,
) -> tuple[str, list[int], float, str]:
    """What the C++ sampler says: its error or "", tokens, the sum of their weights, the error's text."""
    tokens = (c.c_int64 * draws)()
    total, message = c.c_double(), c.create_string_buffer(1024)
    code = library.c.test_sample(
        c.c_void_p(logits.ctypes.data),
        len(logits),
        (c.c_int64 * max(len(seen), 1))(*seen),
        c.c_size_t(len(seen)),
        (c.c_double * 3)(params.temperature, params.top_p, params.repetition_penalty),
        c.c_int64(params.top_k),
        c.c_uint64(params.seed or 0),
        c.c_uint64(row),
        c.c_size_t(draws),
        tokens,
        c.byref(total),
        message,
    )
    return ERRORS.get(code, ""), list(tokens), total.value, message.value.decode()


def check(library, logits, seen, params, row, draws) -> None:
    error, tokens, total, text = drawn(library, logits, seen, params, row, draws)
    sampler = Sampler(params, row=row)
    theirs: str | None = None
    try:
        expected = [sampler.sample(logits, seen) for _ in range(draws)]
    except SamplingError as refusal:
        theirs = str(refusal)
    if theirs is not None:
        assert (error, text) == ("sampling", theirs)
    else:
        assert (error, tokens) == ("", expected)
        if not params.greedy:
            scores = process_scores(logits, seen, params)
            weights = sampling._weights(scores[scores > -INF])
            assert total == np.cumsum(weights)[-1]


score = st.one_of(
    st.sampled_from([-3.5, -1.0, -0.0, 0.0, 0.25, 1.0, 1.0, 7.0, -INF]),
    st.floats(-90, 90, width=32),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
)
params = st.builds(
    SamplingParams,
    temperature=st.one_of(
        st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9, 1e-30, 1e30]), st.floats(0.01, 5)
    ),
    top_k=st.one_of(st.sampled_from([0, 1, 2, 60, 2**62]), st.integers(0, 45)),
    top_p=st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.9, 1.0]), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.sampled_from([1.0, 1.05, 1.3, 0.7]), st.floats(0.1, 9)),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=400)
@given(
    logits=st.lists(score, min_size=1, max_size=40).map(lambda row: np.array(row, np.float32)),
    seen=st.lists(st.one_of(st.integers(0, 43), st.integers(0, 3)), max_size=12),
    params=params,
    row=st.integers(0, 2**64 - 1),
)
@example(np.full(7, 2.5, np.float32), [], SamplingParams(temperature=1.0, top_p=0.5), 0)
@example(np.zeros(1, np.float32), [0], SamplingParams(temperature=1.0, top_p=0.0), 1)
def test_any_logits(library: Library, logits, seen, params, row) -> None:
    check(library, logits, seen, params, row, draws=3)


@settings(max_examples=300)
@given(
    count=st.integers(2, 3000),
    share=st.integers(1, 3000),
    nudge=st.sampled_from([-INF, None, INF]),
    score=st.sampled_from([0.0, 1.5]),
)
def test_top_p_on_the_edge_of_a_sum(library: Library, count, share, nudge, score) -> None:
    """Equal scores and a threshold that is a sum of their probabilities, or the next number to it."""
    top_p = min(share / count, 1.0)
    top_p = top_p if nudge is None else min(max(float(np.nextafter(top_p, nudge)), 0.0), 1.0)
    logits = np.full(count, score, np.float32)
    check(library, logits, [], SamplingParams(temperature=1.0, top_p=top_p), row=0, draws=3)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.5, 3.0, 12.0, 200.0]),
    digits=st.sampled_from([0, 1, 6]),
    vocab=st.sampled_from([2048, 32000, 151936]),
    params=params,
)
def test_rows_of_real_sizes(library: Library, seed, scale, digits, vocab, params) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(vocab) * scale).round(digits).astype(np.float32)
    seen = random.integers(0, vocab, 50).tolist()
    assume(params.temperature == 0 or params.temperature > 1e-6)
    check(library, logits, seen, params, row=3, draws=2)


@settings(max_examples=300)
@given(
    logits=st.one_of(
        st.lists(score, min_size=1, max_size=600).map(lambda row: np.array(row, np.float32)),
        st.tuples(st.integers(0, 99), st.sampled_from([0.1, 3, 30])).map(
            lambda at: np.random.default_rng(at[0]).normal(0, at[1], 32_000).astype(np.float32)
        ),
    ),
    data=st.data(),
)
def test_log_probabilities(library: Library, logits, data) -> None:
    assume(np.isfinite(logits.max()))
    token = data.draw(st.integers(0, len(logits) - 1))
    top = data.draw(st.integers(0, min(len(logits), 40)))
    drawn, ids, likely = (c.c_float * 1)(), (c.c_int64 * top)(), (c.c_float * top)()
    library.c.test_log_probabilities(
        c.c_void_p(logits.ctypes.data), c.c_size_t(len(logits)), c.c_int64(token), c.c_size_t(top),
        drawn, ids, likely,
    )  # fmt: skip
    found = drawn[0], list(zip(ids, likely, strict=True))
    assert found == sampling.log_probabilities(logits, token, top)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", 1e-31),
        ("top_k", -1),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", INF),
    ],
)
def test_a_parameter_outside_its_range_is_named(library: Library, name: str, value: float) -> None:
    params = SamplingParams()
    object.__setattr__(params, name, value)
    error, _, _, text = drawn(library, np.zeros(4, np.float32), [], params, 0, 1)
    assert error == "invalid argument"
    assert name in text
