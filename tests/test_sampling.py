"""Processed scores equal transformers' own; the draw equals a scalar reading of its spec."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qwenport import QwenportError
from qwenport.engines import sampling
from qwenport.engines.sampling import Sampler, SamplingError, SamplingParams, process_scores

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

INF = float("inf")
MASK = (1 << 64) - 1


def transformers_scores(logits: np.ndarray, seen: list[int], params: SamplingParams) -> np.ndarray:
    """float32 [vocab] from the processors that generate() itself would set up, in its order."""
    model = transformers.GenerationMixin.__new__(transformers.GenerationMixin)
    model.config = SimpleNamespace(is_encoder_decoder=False)
    values = {k: v for k, v in vars(params).items() if k != "seed"}
    values["temperature"] = params.temperature or 1.0  # not used by a greedy search
    config = transformers.GenerationConfig(do_sample=not params.greedy, num_beams=1, **values)
    processors = model._get_logits_processor(config, input_ids_seq_length=len(seen))
    return processors(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])[0].numpy()


score = st.one_of(
    st.sampled_from([-3.5, -1.0, -0.0, 0.0, 0.25, 1.0, 1.0, 7.0, -INF]),
    st.floats(-60, 60, width=32),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[int], SamplingParams]:
    logits = np.array(draw(st.lists(score, min_size=1, max_size=40)), dtype=np.float32)
    assume(np.isfinite(logits).any())
    seen = draw(st.lists(st.integers(0, logits.size + 3), min_size=1, max_size=12))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9])),
        top_k=draw(st.one_of(st.sampled_from([0, 1, 2, 60]), st.integers(0, 45))),
        top_p=draw(st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.9, 1.0]), st.floats(0, 1))),
        repetition_penalty=draw(st.sampled_from([1.0, 1.05, 1.3, 0.7])),
    )
    return logits, seen, params


def compare(logits: np.ndarray, seen: list[int], params: SamplingParams) -> tuple[int, int]:
    """Bitwise equal, but for tokens whose cumulative probability is the threshold to 1e-5.

    Returns how many tokens are kept, and how many would be without top-p.
    """
    before = logits.copy()
    got = process_scores(logits, seen, params)
    np.testing.assert_array_equal(logits, before)
    with mock.patch.object(torch, "sort", partial(torch.sort, stable=True)):
        want = transformers_scores(logits, seen, params)
    unfiltered = process_scores(logits, seen, replace(params, top_p=1.0))
    assert got.dtype == np.float32
    differ = np.flatnonzero(got.view(np.int32) != want.view(np.int32))
    if differ.size:
        x = unfiltered.astype(np.float64)
        order = np.argsort(x, kind="stable")
        weights = np.exp(x[order] - x.max())
        cumulative = np.empty_like(x)
        cumulative[order] = np.cumsum(weights) / weights.sum()
        np.testing.assert_allclose(cumulative[differ], 1 - params.top_p, rtol=1e-5)
        np.testing.assert_array_equal(np.maximum(got, want)[differ], unfiltered[differ])
    return int(np.isfinite(got).sum()), int(np.isfinite(unfiltered).sum())


@given(cases())
@settings(max_examples=400, deadline=None)
@example((np.zeros(7, np.float32), [0], SamplingParams(temperature=1.0, top_k=2)))
@example((np.float32([1, 2, 2, 3]), [3], SamplingParams(temperature=0.5, top_k=2, top_p=0.9)))
@example((np.float32([-INF, 2, -INF]), [1], SamplingParams(temperature=0.5, top_k=2, top_p=0.1)))
def test_processed_scores_equal_transformers(case):
    compare(*case)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 10, 16, 20, 100, 1000])
def test_top_p_threshold_among_equal_scores(n):
    """No rounding tolerance where torch's softmax is exact, and torch's own unstable sort."""
    logits = np.full(n, 1.5, np.float32)
    for top_p in [i / 20 for i in range(21)] + [1 - k / n for k in range(n)]:
        params = SamplingParams(temperature=1.0, top_p=top_p)
        got = process_scores(logits, [], params)
        want = transformers_scores(logits, [0], params)
        assert np.isfinite(got).sum() == np.isfinite(want).sum(), top_p
        kept = np.flatnonzero(np.isfinite(got))
        np.testing.assert_array_equal(kept, np.arange(n - kept.size, n))  # lowest ids go first
        if n <= 16:  # torch.sort is an insertion sort up to there
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("top_k", [0, 20, 5000])
@pytest.mark.parametrize(("scale", "decimals"), [(0.05, 2), (3.0, 1), (3.0, 9), (40.0, 9)])
def test_processed_scores_equal_transformers_on_a_real_vocabulary(top_k, scale, decimals):
    random = np.random.default_rng(top_k)  # few decimals: thousands of equal scores
    logits = np.round(random.standard_normal(151936) * scale, decimals).astype(np.float32)
    seen = random.integers(0, logits.size, 500).tolist()
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=0.8, repetition_penalty=1.05)
    kept, kept_by_top_k = compare(logits, seen, params)
    assert 0 < kept < kept_by_top_k


def test_hand_computed_scores():
    logits = np.float32([2.0, -2.0, 1.0, 0.5])
    params = SamplingParams(temperature=0.5, top_k=2, repetition_penalty=4.0)
    # Seen 0 and 1, 0 twice: 2/4 = 0.5, -2*4 = -8; over 0.5 doubles; the 2nd highest is 1.0, tied.
    np.testing.assert_array_equal(
        process_scores(logits, [0, 1, 0, 99], params), np.float32([1.0, -INF, 2.0, 1.0])
    )
    logits = np.float32([0, 3, 3, 1, 3])  # greedy takes the lowest of equal scores
    assert Sampler(SamplingParams()).sample(logits) == 1
    assert Sampler(SamplingParams(repetition_penalty=1.1)).sample(logits, [1]) == 2


@given(cases())
@settings(max_examples=150, deadline=None)
def test_greedy_is_argmax_of_transformers_scores(case):
    logits, seen, params = case
    params = replace(params, temperature=0.0)
    want = transformers_scores(logits, seen, params)
    assert Sampler(params).sample(logits, seen) == int(torch.argmax(torch.from_numpy(want)))


# --- the draw -------------------------------------------------------------------------------------


def test_generators_give_the_published_values():
    mix = sampling.SplitMix64(1234567)  # rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    assert [mix.next(), mix.next()] == [6457827717110365317, 3203168211198807973]
    xoshiro = sampling.Xoshiro256StarStar([1, 2, 3, 4])  # as in Rust's rand_xoshiro
    assert [xoshiro.next() for _ in range(4)] == [11520, 0, 1509978240, 1215971899390074240]


class ScalarTwin:
    """The module docstring's specification, scalar and without numpy: what a C++ twin would do."""

    def __init__(self, seed: int, row: int) -> None:
        state = [seed]
        state = [(self._splitmix(state) + row) & MASK]
        self.s = [self._splitmix(state) for _ in range(4)]

    def _splitmix(self, state: list[int]) -> int:
        state[0] = z = (state[0] + 0x9E3779B97F4A7C15) & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        return z ^ z >> 31

    def _next(self) -> int:
        a, b, c, d = self.s
        c, d, five = c ^ a, d ^ b, b * 5 & MASK
        self.s = [a ^ d, b ^ c, c ^ (b << 17 & MASK), (d << 45 | d >> 19) & MASK]
        return ((five << 7 | five >> 57) & MASK) * 9 & MASK

    @staticmethod
    def exp(x: float) -> float:
        if x < -708.0:
            return 0.0
        k = round(x * 1.4426950408889634)  # half to even
        r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
        p = 1.0 / math.factorial(13)
        for n in range(12, -1, -1):
            p = p * r + 1.0 / math.factorial(n)
        return math.ldexp(p, k)

    def draw(self, processed: np.ndarray) -> int:
        top = np.float32(max(processed))
        cumulative, total = [], 0.0
        for s in processed:
            total += self.exp(float(np.float32(s) - top))
            cumulative.append(total)
        target = (self._next() >> 11) * 2.0**-53 * total
        return next(i for i, c in enumerate(cumulative) if c > target)


@given(cases(), st.integers(0, MASK), st.integers(0, 70))
@settings(max_examples=200, deadline=None)
def test_draws_equal_the_scalar_twin(case, seed, row):
    logits, seen, p = case
    params = replace(p, temperature=p.temperature or 1.0, seed=seed)
    sampler, twin = Sampler(params, row=row), ScalarTwin(seed, row)
    processed = process_scores(logits, seen, params)
    for _ in range(4):
        assert sampler.sample(logits, seen) == twin.draw(processed)


def test_pinned_draws():
    """These numbers are part of the format: a seed must mean the same in every release."""
    logits = np.float32([0.5, -1.0, 2.0, 0.0, 1.5, -INF, 1.0, 2.0])
    sampler = Sampler(SamplingParams(temperature=0.9, top_p=0.97, seed=2024), row=3)
    drawn = [sampler.sample(logits) for _ in range(16)]
    assert drawn == [2, 7, 2, 4, 7, 6, 3, 2, 2, 4, 2, 4, 7, 7, 7, 7]


def test_the_ends_of_the_unit_interval_draw_tokens_of_some_weight():
    logits = np.float32([-INF, -1000, 0, 0, -1000])  # exp(-1000) is 0, but the token is kept
    sampler = Sampler(SamplingParams(temperature=1.0))
    for u, token in ((0.0, 2), (0.5, 3), (1 - 2.0**-53, 3)):
        sampler._random = SimpleNamespace(uniform=lambda u=u: u)
        assert sampler.sample(logits) == token


def test_portable_exp_is_accurate_and_has_the_scalar_bits():
    x = -np.concatenate([np.logspace(-300, 2.85, 4000), np.linspace(0, 708, 4001), [0.0]])
    got = sampling.portable_exp(x)
    assert got.tolist() == [ScalarTwin.exp(v) for v in x.tolist()]
    want = np.exp(x.astype(np.longdouble))
    assert float((abs(got - want) / np.spacing(want.astype(np.float64))).max()) < 1.5
    assert sampling.portable_exp(np.array([-708.5, -INF, 0.0])).tolist() == [0, 0, 1]


def test_portable_log_is_accurate():
    x = np.concatenate(
        [np.linspace(1, 3, 4001), np.logspace(0, 300, 4000), 1 + np.logspace(-15, 0)]
    )
    got = np.array([sampling.portable_log(value) for value in x.tolist()])
    want = np.log(x.astype(np.longdouble))
    assert float((abs(got - want) / np.spacing(want.astype(np.float64))).max()) < 3
    assert sampling.portable_log(1.0) == 0.0


@given(
    logits=st.one_of(
        st.lists(score, min_size=1, max_size=40),
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
        st.tuples(st.integers(0, 9), st.sampled_from([0, 1, 6])).map(
            lambda at: np.random.default_rng(at[0]).normal(0, 8, 151_936).round(at[1]).tolist()
        ),
    ).map(lambda row: np.array(row, np.float32)),
    data=st.data(),
)
def test_log_probabilities_are_those_of_torch(logits, data):
    assume(np.isfinite(logits).any())
    token = data.draw(st.integers(0, logits.size - 1))
    top = data.draw(st.integers(0, min(logits.size, 50)))
    drawn, likely = sampling.log_probabilities(logits, token, top)
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), dim=0)
    ids = torch.sort(torch.from_numpy(logits), stable=True, descending=True).indices[:top]
    assert [pair.token for pair in likely] == ids.tolist()
    found = np.array([drawn, *(pair.logprob for pair in likely)])
    with np.errstate(over="ignore"):
        expected = wanted[[token, *ids.tolist()]].numpy().astype(np.float32)
    assert (found.astype(np.float32) == found).all()
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-12)


def test_draws_follow_the_distribution():
    logits = np.float32([0, 0.3, -1, 1.2, 2.0, 0.7, -0.4, 1.0, 0.2, 0.9, -INF])
    sampler = Sampler(SamplingParams(temperature=0.8, seed=7))
    draws = 8000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=11)

    def chi_square(temperature: float) -> float:
        p = np.exp(logits[:10].astype(np.float64) / temperature)
        expected = draws * p / p.sum()
        return float(((counts[:10] - expected) ** 2 / expected).sum())

    assert counts[10] == 0
    assert chi_square(0.8) < 27.88  # 9 degrees of freedom, p = 0.001
    assert chi_square(0.9) > 27.88  # the test has the power to see a wrong temperature


def test_seeds_and_rows_give_reproducible_and_distinct_streams():
    logits = np.zeros(1000, np.float32)

    def stream(seed: int | None, row: int) -> tuple[int, ...]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), row=row)
        return tuple(sampler.sample(logits) for _ in range(20))

    assert stream(5, 1) == stream(5, 1)
    assert len({stream(seed, row) for seed in range(8) for row in range(8)}) == 64
    assert stream(None, 0) != stream(None, 0)
    fresh = Sampler(SamplingParams(temperature=1.0, seed=None))
    assert stream(fresh.seed, 0) == tuple(fresh.sample(logits) for _ in range(20))


REFUSED = {
    "temperature": (-0.1, math.nan, INF, 1e-31, "1", True),
    "top_k": (-1, 2.0, True),
    "top_p": (1.01, -0.01, math.nan, None),
    "repetition_penalty": (0.0, -1.0, math.nan, 1e31),
    "seed": (-1, 1 << 64, 0.5),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in REFUSED.items() for v in vs])
def test_bad_parameters_are_refused_and_named(name, value):
    with pytest.raises(sampling.SamplingParamsError, match=name) as error:
        SamplingParams(**{name: value})
    assert isinstance(error.value, QwenportError)


def test_the_range_of_temperatures_begins_at_0() -> None:
    with pytest.raises(sampling.SamplingParamsError, match=r"0 or in \[1e-30, 1e\+30\], got -1"):
        SamplingParams(temperature=-1)


def test_numpy_scalars_are_accepted_as_python_numbers():
    params = SamplingParams(np.float32(0.5), np.int64(3), np.float64(0.9), 1, np.uint64(9))
    assert params == SamplingParams(0.5, 3, 0.9, 1.0, 9)
    assert [type(v) for v in vars(params).values()] == [float, int, float, float, int]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_from_which_nothing_can_be_chosen(temperature):
    sampler = Sampler(SamplingParams(temperature=temperature, repetition_penalty=2.0))
    for values in ([1, math.nan, 2], [1, INF, 2], [-INF, -INF], [-3e38, -INF]):
        with pytest.raises(SamplingError, match="no token can be chosen"):
            sampler.sample(np.float32(values), [0])  # the penalty makes an infinity of -3e38
    for logits in (np.float32([[1, 2]]), np.float32([]), np.float64([1, 2])):
        with pytest.raises(SamplingError, match=r"float32 \[vocab\]"):
            sampler.sample(logits)
    with pytest.raises(SamplingError, match="negative"):
        sampler.sample(np.float32([1, 2]), [-1])


def test_importing_brings_neither_torch_nor_tokenizers(tmp_path):
    code = (
        "import sys, qwenport.engines.sampling, qwenport.engines.generation;"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert out.strip() == "[]"
