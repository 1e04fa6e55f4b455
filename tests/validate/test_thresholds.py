"""Bounds: how they follow transformers' own error, and what a user's own do to a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Capture
from defects import norms_and_weights
from defects.tools import seed
from hypothesis import given
from hypothesis import strategies as st

from qwenport import cli
from qwenport.validate import ValidationError, parse_overrides, validate
from qwenport.validate.metrics import Metrics, compare
from qwenport.validate.thresholds import (
    FP32_REL_L2,
    FP32_REL_L2_LEAST,
    FP32_REL_L2_MOST,
    HALF_KL_MEAN,
    HALF_NEAR_TIE_MARGIN,
    HALF_TOP1,
    NAMES,
    Thresholds,
    fp32_thresholds,
    half_thresholds,
    override,
)

AT_MOST_1 = ("top1", "router_agreement")
errors = st.floats(0, 10)
shares = st.floats(0, 1)
names = st.sampled_from(NAMES)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def metrics(**changes: float) -> Metrics:
    row = np.ones((1, 3), np.float32)
    return replace(compare(row, row, near_tie_margin=0.0), **changes)


# ours


def test_fp32_bound_follows_the_models_own_rounding_between_its_limits() -> None:
    def bound(own: float) -> float | None:
        return fp32_thresholds(own).rel_l2

    assert bound(0.0) == FP32_REL_L2_LEAST
    assert bound(2.4e-7) == pytest.approx(2.4e-6)
    assert bound(1.5e-6) == bound(2e-6) == FP32_REL_L2
    assert bound(1e-5) == pytest.approx(5e-5)
    assert bound(1e-3) == FP32_REL_L2_MOST


@given(errors, errors, st.booleans())
def test_fp32_bounds_are_bounded_and_grow_with_the_models_own_rounding(
    one: float, other: float, greedy: bool
) -> None:
    less, more = (fp32_thresholds(own, greedy=greedy) for own in sorted((one, other)))
    assert less.rel_l2 is not None and more.rel_l2 is not None
    assert FP32_REL_L2_LEAST <= less.rel_l2 <= more.rel_l2 <= FP32_REL_L2_MOST
    for bounds in (less, more):
        assert bounds.top1 == bounds.router_agreement == 1
        assert bounds.near_tie_margin == (0 if greedy else bounds.near_tie_margin)
        assert (bounds.near_tie_margin == 0) == greedy
        assert bounds.times_own is bounds.kl_mean is None


@given(errors, errors, errors, errors, shares, shares, st.integers(1, 10**5), st.integers(1, 10**5))
def test_half_bounds_are_bounded_and_grow_with_transformers_own_error(
    kl: float,
    more_kl: float,
    largest: float,
    more_largest: float,
    one: float,
    other: float,
    positions: int,
    hidden_size: int,
) -> None:
    little, much = sorted((kl, more_kl)), sorted((largest, more_largest))
    disagreeing, agreeing = sorted((one, other))

    def bounds_of(index: int, agreement: float) -> Thresholds:
        own = metrics(
            kl_mean=little[index],
            max_abs=much[index],
            positions=positions,
            effective_positions=positions,
            vocab=hidden_size,
        )
        return half_thresholds(own, hidden_size, agreement)

    less, more = bounds_of(0, agreeing), bounds_of(1, disagreeing)
    assert less.kl_mean is not None and more.kl_mean is not None
    assert HALF_KL_MEAN <= less.kl_mean <= more.kl_mean
    assert HALF_NEAR_TIE_MARGIN <= less.near_tie_margin <= more.near_tie_margin
    assert more.near_tie_margin in (HALF_NEAR_TIE_MARGIN, much[1])
    assert more.router_agreement <= less.router_agreement <= HALF_TOP1
    assert less.times_own == more.times_own and less.times_own is not None
    assert 1.25 < less.times_own <= 1.25 * 5  # the most for a single number
    for bounds in (less, more):
        assert (bounds.rel_l2, bounds.top1) == (None, HALF_TOP1)


@given(st.integers(1, 10**4), st.integers(1, 10**4), st.integers(1, 10**4), st.integers(1, 10**4))
def test_the_more_numbers_are_compared_the_less_is_left_to_chance(
    few: int, more: int, hidden: int, wider: int
) -> None:
    few, more = sorted((few, more))
    hidden, wider = sorted((hidden, wider))
    least = half_thresholds(
        metrics(positions=more, effective_positions=more, vocab=10**5, kl_mean=1.0), wider
    )
    most = half_thresholds(
        metrics(positions=few, effective_positions=few, vocab=10**5, kl_mean=1.0), hidden
    )
    assert least.times_own is not None and most.times_own is not None
    assert least.kl_mean is not None and most.kl_mean is not None
    assert 1.25 < least.times_own <= most.times_own
    assert 1.25**2 < least.kl_mean <= most.kl_mean


def test_half_precision_is_bound_by_transformers_own_error_in_it() -> None:
    """As many positions as leave nothing to chance."""
    many = {"positions": 10**12, "effective_positions": 10**12}
    own = metrics(rel_l2=0.01, kl_mean=1e-3, max_abs=0.3, vocab=100, **many)
    bounds = half_thresholds(own, 64, 0.9)
    assert bounds.times_own == pytest.approx(1.25)
    assert bounds.kl_mean == pytest.approx(1.5625e-3, rel=1e-5)
    assert bounds.near_tie_margin == 0.3
    assert bounds.router_agreement == pytest.approx(0.875)
    quiet = half_thresholds(metrics(kl_mean=1e-9), 64)
    assert (quiet.kl_mean, quiet.router_agreement) == (HALF_KL_MEAN, HALF_TOP1)


# the user's


@given(st.dictionaries(names, shares))
def test_overrides_are_read_as_they_are_written(values: dict[str, float]) -> None:
    assert parse_overrides(f"{name}={value!r}" for name, value in values.items()) == values


@given(names, st.floats(allow_nan=True, allow_infinity=True))
def test_what_can_be_no_bound_is_refused(name: str, value: float) -> None:
    most = 1.0 if name in AT_MOST_1 else 1.7976931348623157e308
    if 0 <= value <= most:
        assert parse_overrides([f"{name}={value!r}"]) == {name: value}
    else:
        with pytest.raises(ValidationError, match=rf"threshold {name}: .* is outside 0\.\."):
            parse_overrides([f"{name}={value!r}"])


@pytest.mark.parametrize("text", ["", "=", "rel_l2", "rel_L2=1", "rel_l2 =1", "1=rel_l2", "x=1"])
def test_a_name_that_is_no_threshold_is_refused_with_the_names_there_are(text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_overrides([text])
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("value", ["", "1,5", "one", "0x1", "1e", "--1"])
def test_a_value_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ValidationError, match="is not a number"):
        parse_overrides([f"rel_l2={value}"])


@given(
    st.builds(
        Thresholds,
        errors, shares, st.none() | errors, st.none() | errors, st.none() | errors, errors, shares,
    ),
    st.dictionaries(names, shares),
)  # fmt: skip
def test_an_override_changes_its_own_bounds_and_a_looser_one_is_told(
    ours: Thresholds, values: dict[str, float]
) -> None:
    bounds, told = override(ours, values)
    assert asdict(bounds) == asdict(ours) | values
    looser = {
        name
        for name, value in values.items()
        if asdict(ours)[name] is not None
        and (value < asdict(ours)[name] if name in AT_MOST_1 else value > asdict(ours)[name])
    }
    assert {line.split()[0] for line in told} == looser and len(told) == len(looser)


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        ("rel_l2=1e-12", "rel-L2"),
        ("times_own=0.001", "rel-L2 over transformers' own in fp32"),
        ("kl_mean=1e-30", "mean KL"),
    ],
)
def test_a_healthy_target_fails_a_bound_that_is_tightened_beyond_rounding(
    threshold: str, words: str, tiny_package: Path, tiny_checkpoint: Path
) -> None:
    report = validate(tiny_package, tiny_checkpoint, thresholds=parse_overrides([threshold]))
    assert not report.passed and not report.loosened
    bound = float(threshold.partition("=")[2])
    for scenario in report.scenarios:
        if scenario.metrics is not None:
            (failure,) = scenario.failures
            assert failure.startswith(words) and f"must be <= {bound:g}" in failure
    assert report.fault is None, "no operator is worse than rounding"


def test_a_loosened_bound_is_told_wherever_the_verdict_is(
    tiny_package: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    change = norms_and_weights.wrong_epsilon_in_one_norm
    faulty = seed(tiny_package, tmp_path / "faulty", change)
    strict = ["validate", str(faulty), "--reference", str(tiny_checkpoint)]
    assert cli.main(strict) == 1
    out = capsys.readouterr().out
    assert "loosened" not in out and "must be <=" in out
    loose = [*strict, "--threshold", "rel_l2=1", "--threshold", "near_tie_margin=9"]
    assert cli.main([*loose, "--report", str(tmp_path / "report")]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("threshold loosened: ")]
    assert any("rel_l2 1, where ours is " in line for line in told)
    assert "threshold loosened: near_tie_margin 9, where ours is 0.001" in told
    assert len(told) == len(set(told))
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Parity holds, by loosened bounds" in page and "near_tie_margin 9" in page
