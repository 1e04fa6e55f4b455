"""Half precision operator by operator: what chance leaves, what a worse operator shows, and a healthy package."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import mini, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.exporter import export
from qwenport.validate import rounding, validate
from qwenport.validate.candidate import Candidate
from qwenport.validate.localisation import WHOLE_LAYER
from qwenport.validate.reference import Reference
from qwenport.validate.rounding import END, RoundingError, Spread, judge_rounding, worst
from qwenport.validate.sites import sites
from qwenport.validate.target import open_target
from qwenport.validate.thresholds import (
    ROUNDING_LEAST,
    ROUNDING_QUANTILES,
    ROUNDING_SYSTEMATIC_TIMES_OWN,
    ROUNDING_TIMES_OWN,
    ROUNDING_Z,
)

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {"bf16": "bfloat16", "fp16": "float16"}
EXAMPLES = Path(__file__).parents[2] / "examples"
POSITIONS, NUMBERS = 512, 64
UNIT = 2.0**-9  # half a unit in the last place of bf16

Array = Any
seeds = st.integers(0, 2**32 - 1)


# ---- intervals

# draws of a positive number, and its quantile
DISTRIBUTIONS: dict[
    str, tuple[Callable[[Any, tuple[int, int]], Array], Callable[[float], float]]
] = {
    "uniform": (lambda r, size: r.random(size), lambda q: q),
    "exponential": (lambda r, size: r.exponential(size=size), lambda q: -math.log(1 - q)),
    "heavy tail": (lambda r, size: 1 + r.pareto(1.5, size), lambda q: (1 - q) ** (-1 / 1.5)),
    "two values": (
        lambda r, size: 1.0 + (r.random(size) < 0.3),
        lambda q: 1.0 if q <= 0.7 else 2.0,
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("count", [512, 2048])
def test_intervals_contain_the_quantile_but_for_the_stated_rate(name: str, count: int) -> None:
    """One side may miss once in 200,000; of 1,500 draws none does."""
    draw, quantile_of = DISTRIBUTIONS[name]
    samples = draw(np.random.default_rng(7), (1500, count))
    for quantile in ROUNDING_QUANTILES:
        truth = quantile_of(quantile)
        ends = np.array([rounding._order(sample, quantile) for sample in samples])
        assert (ends[:, 0] <= ends[:, 1]).all() and (ends[:, 1] <= ends[:, 2]).all()
        assert ((ends[:, 0] <= truth) & (truth <= ends[:, 2])).all()


@pytest.mark.parametrize(("z", "inside"), [(1.0, 0.683), (1.96, 0.95), (2.576, 0.99)])
@pytest.mark.parametrize("quantile", ROUNDING_QUANTILES)
def test_intervals_are_no_wider_than_they_say(
    z: float, inside: float, quantile: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At fewer standard deviations they miss as often as a normal number does."""
    monkeypatch.setattr(rounding, "ROUNDING_Z", z)
    samples = np.random.default_rng(8).random((4000, 512))
    ends = np.array([rounding._order(sample, quantile) for sample in samples])
    share = ((ends[:, 0] <= quantile) & (quantile <= ends[:, 2])).mean()
    assert inside - 0.02 < share < inside + 0.06


def test_the_rate_of_false_alarms_is_what_a_large_model_needs() -> None:
    one_side = 0.5 * math.erfc(ROUNDING_Z / math.sqrt(2))
    places, numbers = 10_000, 4
    assert places * numbers * one_side < 0.25  # and a ratio needs both ends to miss at once


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.sampled_from(ROUNDING_QUANTILES))
def test_of_few_numbers_the_interval_ends_with_the_largest(
    values: list[float], quantile: float
) -> None:
    low, middle, high = rounding._order(np.array(values), quantile)
    assert min(values) <= low <= middle <= high <= max(values)
    if len(values) < 19:  # 4.4 standard deviations are more than there are
        assert high == max(values)


# ---- an operator whose error is known


def right(seed: int = 0, positions: int = POSITIONS) -> Array:
    return np.random.default_rng((seed, 0)).standard_normal((positions, NUMBERS)) * 5


def rounded(values: Array, seed: int, times: float = 1.0) -> Array:
    """With random roundings of some units in the last place of bf16."""
    noise = np.random.default_rng((seed, 1)).uniform(-1, 1, values.shape)
    return values + times * UNIT * noise * np.abs(values)


def judged(made: Array, *own: Array, values: Array, unit: float = UNIT) -> RoundingError:
    errors = rounding._Errors()
    half = len(values) // 2
    for part in (slice(0, half), slice(half, None)):
        errors.add(values[part], made[part])
        errors.add_own(values[part], *(theirs[part] for theirs in own))
    return errors.result(3, "some operator", unit)


@given(seeds)
@settings(max_examples=15)
def test_one_operator_fails_at_two_and_a_half_times_and_passes_at_one_and_a_half(seed: int) -> None:
    values = right(seed)
    own = rounded(values, seed + 1)
    for times, passes in ((0.3, True), (1.0, True), (1.4, True), (2.5, False), (10.0, False)):
        error = judged(rounded(values, seed + 2, times), own, values=values)
        assert (error.excess <= 1) == passes, (times, str(error))
        for spread in error.relative:
            assert spread.least < times < 1.25 * spread.times_own
            assert spread.times_own == pytest.approx(times, rel=0.12)


@given(seeds, st.floats(0.25, 4.0))
@settings(max_examples=15)
def test_either_of_transformers_attentions_passes_beside_the_other(seed: int, ratio: float) -> None:
    values = right(seed)
    eager, sdpa = rounded(values, seed + 1), rounded(values, seed + 2, ratio)
    for made in (rounded(values, seed + 3), rounded(values, seed + 4, ratio)):
        error = judged(made, eager, sdpa, values=values)
        assert error.excess <= 1
        assert all(s.own >= max(1, ratio) * 0.7 * UNIT / math.sqrt(3) for s in error.relative)


def test_right_operators_raise_no_alarm_in_many_trials() -> None:
    """400 operators: each number of each below its bound, at 1.4 times as well."""
    most = 0.0
    for seed in range(200):
        values = right(seed, 128)
        own = rounded(values, 1000 + seed)
        for times in (1.0, 1.4):
            made = rounded(values, 2000 + seed, times)
            most = max(most, judged(made, own, values=values).excess)
    assert most < 0.9


def test_a_statistic_that_was_rounded_shows_in_the_systematic_part_alone() -> None:
    """Each position scaled by its own factor, of one unit at most, as each number has."""
    values = right()
    own = rounded(values, 1)
    factors = 1 + UNIT * np.random.default_rng(2).uniform(-1, 1, (POSITIONS, 1))
    error = judged(rounded(values, 3) * factors, own, values=values)
    assert all(s.least <= ROUNDING_TIMES_OWN for s in error.relative)
    assert max(s.least for s in error.systematic) > ROUNDING_SYSTEMATIC_TIMES_OWN
    assert error.excess > 1 and "systematic error" in str(error)


def test_a_few_bad_positions_show_at_the_high_quantile() -> None:
    """A tenth of all positions, at which transformers is right: the median does not see them."""
    values = right()
    own, made = rounded(values, 1), rounded(values, 2)
    bad = np.arange(POSITIONS) % 10 == 0
    made[bad] = rounded(values, 3, 6.0)[bad]
    error = judged(made, own, values=values)
    middle, high = error.relative
    assert middle.least < 1 and high.least > ROUNDING_TIMES_OWN and error.excess > 1


def test_where_transformers_is_exact_a_little_is_allowed() -> None:
    """A sum that happens to be exact; another order of it is off by about an eighth of half a unit."""
    values = right()
    least = ROUNDING_LEAST * UNIT
    noise = np.random.default_rng(3).standard_normal(values.shape)
    noise *= np.linalg.norm(values, axis=1, keepdims=True) / np.linalg.norm(
        noise, axis=1, keepdims=True
    )
    for times, passes in ((1.5, True), (2.1, False)):
        error = judged(values + times * least * noise, values, values=values)
        assert (error.excess <= 1) == passes
        assert {spread.own for spread in error.relative} == {least}


# ---- numbers that are none


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_counted_by_position(value: float) -> None:
    values = right()
    made = rounded(values, 1)
    made[[3, 300], 5] = value
    made[300, 6] = value
    error = judged(made, rounded(values, 2), values=values)
    assert (error.nonfinite, error.positions) == (2, POSITIONS)
    assert error.excess == math.inf
    assert str(error) == "layer 3, some operator: NaN or infinity at 2 of 512 positions"


def test_where_fp32_is_not_finite_either_nothing_is_said() -> None:
    values = right()
    values[7, 7] = np.inf
    made = rounded(right(), 1)
    made[7] = np.nan
    error = judged(made, rounded(right(), 2), values=values)
    assert (error.nonfinite, error.positions) == (0, POSITIONS - 1)


def test_another_shape_is_no_number_at_any_position() -> None:
    values = right()
    error = judged(np.zeros((POSITIONS, NUMBERS + 1)), rounded(values, 1), values=values)
    assert error.nonfinite == POSITIONS and error.excess == math.inf


def test_an_operator_that_is_zero_everywhere_is_no_failure() -> None:
    zeros = np.zeros((POSITIONS, NUMBERS))
    error = judged(zeros, zeros, values=zeros)
    assert error.excess == 0 and worst([error]) is error
    assert str(error) == "layer 3, some operator: zero everywhere"


def test_the_worst_is_the_first_nan_else_the_furthest_beyond_its_bound() -> None:
    def error(name: str, least: float, nonfinite: int = 0) -> RoundingError:
        spread = Spread(0.5, least * UNIT, UNIT, least, least)
        return RoundingError(0, name, 512, nonfinite, (spread,), ())

    a, b, c, d = error("a", 0.1), error("b", 3.0), error("c", 0.2, 1), error("d", 0.1, 9)
    assert worst([]) is None
    assert worst([a, b]) is b
    assert worst([a, b, c, d]) is c
    assert str(b).startswith(
        "layer 0, b: relative error 0.0059 at quantile 0.5 of 512 positions, 3 x"
    )


# ---- the bundled models


def errors_of(
    name: str, dtype: str, folder: Path, layers: int | None = None
) -> list[RoundingError]:
    package = export(EXAMPLES / name, folder / "package", dtype=dtype).path
    target = open_target(package, judged_as="tensorrt-network")
    count = target.config.num_hidden_layers if layers is None else layers
    reference = Reference(target, EXAMPLES / name, layers=layers, streamed=layers is not None)
    candidate = Candidate(target, layers=count, streamed=False).declared()
    tokens = np.random.default_rng(6).integers(0, 2048, 512).tolist()
    told: list[int] = []
    found = list(
        judge_rounding(
            candidate, reference, target.config, dtype, [tokens[:300], tokens[300:]],
            lambda what, done, total: told.append(done),
        )
    )  # fmt: skip
    assert told == list(range(1, count + 2))
    expected = [
        (layer, name)
        for layer in range(count)
        for name in (*(site.name for site in sites(target.config, layer)), WHOLE_LAYER)
    ]
    assert [(e.layer, e.operator) for e in found[:-1]] == expected
    assert (found[-1].layer, found[-1].operator) == (None, END)
    assert all(e.positions == 512 and e.nonfinite == 0 for e in found)
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "layers"),
    [
        ("tiny-qwen2.5", "bf16", 1),
        pytest.param("tiny-qwen2.5", "bf16", None, marks=pytest.mark.slow),
        pytest.param("tiny-qwen2.5", "fp16", None, marks=pytest.mark.slow),
        pytest.param("tiny-qwen2-moe", "bf16", None, marks=pytest.mark.slow),
        pytest.param("tiny-qwen2-moe", "fp16", None, marks=pytest.mark.slow),
    ],
)
def test_every_operator_of_a_healthy_package_is_below_its_bound(
    name: str, dtype: str, layers: int | None, tmp_path: Path
) -> None:
    found = errors_of(name, dtype, tmp_path, layers)
    bad = [str(error) for error in found if error.excess > 0.9]
    assert not bad
    # and it is rounding that is judged: most operators are as good as transformers' own
    middle = [error.relative[0].times_own for error in found]
    assert 0.8 < float(np.median(middle)) < 1.2


@pytest.mark.parametrize(
    ("family", "head_dim", "dtype"), [("qwen2", 12, "bf16"), ("llama", 28, "fp16")]
)
def test_a_root_of_the_scale_that_the_dtype_has_not_is_the_parser_s_doing(
    family: str, head_dim: int, dtype: str, tmp_path: Path
) -> None:
    """It is rounded into queries and keys, and what comes of it is systematic."""
    root = torch.tensor(head_dim**-0.5).sqrt()
    assert root.to(TYPES[dtype]) != root
    raw = mini(family, head_dim=head_dim, max_position_embeddings=256, torch_dtype=NAMES[dtype])
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, dtype=TYPES[dtype])
    export(checkpoint, tmp_path / "package")
    report = validate(
        tmp_path / "package", checkpoint, judged_as="tensorrt-network", budget="quick"
    )
    assert report.passed, report.failures
    assert report.rounding and max(error.excess for error in report.rounding) < 0.9
