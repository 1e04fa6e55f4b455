"""Intervals of ratios, means and shares against plain resampling, the normal law, and the binomial law itself."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.validate import Check
from qwenport.validate.metrics import Interval, mean_interval, ratio_interval, share_interval

errors = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)


def resampled(count: int, draws: int, seed: int) -> list[list[int]]:
    """Draws of `count` positions with replacement, one index at a time."""
    rng = random.Random(seed)
    return [[rng.randrange(count) for _ in range(count)] for _ in range(draws)]


def ends(values: list[float], confidence: float) -> tuple[float, float]:
    """Quantiles between the two nearest ranks."""
    ranked = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ranked) - 1)
        below, rest = int(place), place - int(place)
        above = ranked[min(below + 1, len(ranked) - 1)]
        return ranked[below] * (1 - rest) + above * rest

    return at((1 - confidence) / 2), at((1 + confidence) / 2)


def test_the_interval_of_a_ratio_is_what_plain_resampling_finds() -> None:
    rng = np.random.default_rng(3)
    made, own = rng.lognormal(0.2, 0.5, 60), rng.lognormal(0, 0.5, 60)
    ratios = [
        math.sqrt(math.fsum(made[i] ** 2 for i in draw) / math.fsum(own[i] ** 2 for i in draw))
        for draw in resampled(60, 4000, 1)
    ]
    low, high = ends(ratios, 0.9)
    found = ratio_interval(made, own, 0.9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.03)
    assert found.confidence == 0.9
    assert found.low < np.linalg.norm(made) / np.linalg.norm(own) < found.high


def test_the_interval_of_a_mean_is_what_plain_resampling_finds() -> None:
    values = np.random.default_rng(4).lognormal(0, 1, 60)
    means = [math.fsum(values[i] for i in draw) / 60 for draw in resampled(60, 4000, 2)]
    low, high = ends(means, 0.9)
    found = mean_interval(values, 0.9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.03)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_interval_of_a_mean_of_many_is_the_normal_one(confidence: float) -> None:
    values = np.random.default_rng(6).standard_normal(2000) + 10
    half = NormalDist().inv_cdf((1 + confidence) / 2) * values.std() / math.sqrt(2000)
    found = mean_interval(values, confidence)
    assert found.low == pytest.approx(values.mean() - half, abs=half / 8)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 8)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 200 samples of 64 positions: 90% is 180, and three standard deviations are 13."""
    rng = np.random.default_rng(8)
    means = ratios = 0
    for _ in range(200):
        made, own = rng.standard_normal((2, 64))
        mean = mean_interval(made, 0.9)
        means += mean.low <= 0 <= mean.high
        ratio = ratio_interval(np.abs(2 * made), np.abs(own), 0.9)
        ratios += ratio.low <= 2 <= ratio.high
    assert 160 <= means <= 195
    assert 155 <= ratios <= 195


@given(errors, st.floats(0.1, 10), st.sampled_from([0.9, 0.999]))
def test_a_constant_ratio_has_no_spread(own: list[float], times: float, confidence: float) -> None:
    sizes = np.array(own)
    found = ratio_interval(times * sizes, sizes, confidence)
    assert (found.low, found.high) == pytest.approx((times, times), rel=1e-9)


@given(errors, st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_intervals_scale_with_what_is_measured(own: list[float], seed: int, times: float) -> None:
    sizes = np.array(own)
    made = sizes * np.random.default_rng(seed).lognormal(0, 1, len(sizes))
    one, other = ratio_interval(made, sizes, 0.9), ratio_interval(times * made, sizes, 0.9)
    assert (other.low, other.high) == pytest.approx((times * one.low, times * one.high), rel=1e-9)
    one, other = mean_interval(made, 0.9), mean_interval(times * made, 0.9)
    assert (other.low, other.high) == pytest.approx((times * one.low, times * one.high), rel=1e-9)


@given(errors)
def test_a_surer_interval_is_wider_and_every_call_gives_the_same(values: list[float]) -> None:
    sizes = np.array(values)
    narrow, wide = mean_interval(sizes, 0.5), mean_interval(sizes, 0.999)
    assert wide.low <= narrow.low <= narrow.high <= wide.high
    assert min(values) * (1 - 1e-9) <= wide.low and wide.high <= max(values) * (1 + 1e-9)
    assert wide == mean_interval(sizes, 0.999)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_interval_of_what_is_not_finite_passes_no_check(bad: float) -> None:
    values = np.array([1.0, bad, 2.0])
    for found in (mean_interval(values, 0.9), ratio_interval(values, np.ones(3), 0.9)):
        assert math.isnan(found.low) and math.isnan(found.high)
        assert not Check("x", found.low, "<=", 1e9).passed
    zeros = ratio_interval(np.zeros(3), np.zeros(3), 0.9)
    assert math.isnan(zeros.low)


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.5, 5))
def test_the_interval_of_a_share_is_the_shares_that_the_score_test_keeps(
    hits: int, count: int, z: float
) -> None:
    """Wilson's: every p for which hits / count is at most z standard deviations of p from p (found by bisection)."""
    hits = min(hits, count)
    share = hits / count

    def kept(p: float) -> bool:
        return abs(share - p) <= z * math.sqrt(p * (1 - p) / count)

    def edge(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if kept(middle) else (inside, middle)
        return inside

    found = share_interval(hits, count, z, 0.999)
    assert found.low == pytest.approx(edge(share, 0.0), abs=1e-9)
    assert found.high == pytest.approx(edge(share, 1.0), abs=1e-9)
    assert 0 <= found.low <= share + 1e-12 and share - 1e-12 <= found.high <= 1
    assert found.confidence == 0.999


@pytest.mark.parametrize(("count", "share"), [(456, 0.992), (64, 0.99), (20, 0.5)])
def test_a_share_on_its_bound_is_seldom_refused(count: int, share: float) -> None:
    """By the binomial law, summed. Wilson's interval is bold near 1: 1 in 240 at 456 positions, not 1 in 2,000."""
    refused = math.fsum(
        math.comb(count, hits) * share**hits * (1 - share) ** (count - hits)
        for hits in range(count + 1)
        if share_interval(hits, count, 3.3, 0.999).high < share
    )
    assert refused < 0.005


def test_the_interval_of_no_positions_is_everything() -> None:
    assert share_interval(0, 0, 3.3, 0.999) == Interval(0.0, 1.0, 0.999)
