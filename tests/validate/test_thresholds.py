"""Bounds: how they follow transformers' own error, and what a user's own do to a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import onnx_ir as ir
import pytest
import torch
from command_line import Capture
from defects.tools import node, seed
from hypothesis import given
from hypothesis import strategies as st

from qwenport import cli
from qwenport.exporter import export
from qwenport.validate import ValidationError, parse_overrides, validate
from qwenport.validate.metrics import Metrics, compare
from qwenport.validate.thresholds import (
    FP32_GREEDY_MARGIN,
    FP32_NEAR_TIE_MARGIN,
    FP32_REL_L2,
    FP32_REL_L2_LEAST,
    FP32_REL_L2_MOST,
    HALF_CLEAR_SIGMAS,
    HALF_KL_MEAN,
    HALF_TIMES_OWN,
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


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A package and its checkpoint."""
    folder = tmp_path_factory.mktemp("thresholds")
    raw = checkpoints.mini("llama", torch_dtype="float32")
    checkpoint = checkpoints.write_checkpoint(folder / "checkpoint", raw)
    return export(checkpoint, folder / "package", weights="copy").path, checkpoint


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
        assert bounds.near_tie_margin == (FP32_GREEDY_MARGIN if greedy else FP32_NEAR_TIE_MARGIN)
        assert bounds.times_own is bounds.kl_mean is None


@given(errors, errors, shares, shares)
def test_half_bounds_are_bounded_and_grow_with_transformers_own_error(
    kl: float, more_kl: float, one: float, other: float
) -> None:
    little, much = sorted((kl, more_kl))
    disagreeing, agreeing = sorted((one, other))
    less = half_thresholds(metrics(kl_mean=little), agreeing)
    more = half_thresholds(metrics(kl_mean=much), disagreeing)
    assert less.kl_mean is not None and more.kl_mean is not None
    assert HALF_KL_MEAN <= less.kl_mean <= more.kl_mean
    assert more.router_agreement <= less.router_agreement <= HALF_TOP1
    for bounds in (less, more):
        assert (bounds.rel_l2, bounds.top1, bounds.times_own) == (None, HALF_TOP1, HALF_TIMES_OWN)
        assert bounds.near_tie_margin == HALF_CLEAR_SIGMAS


def test_half_precision_is_bound_by_transformers_own_error_in_it() -> None:
    bounds = half_thresholds(metrics(rel_l2=0.01, kl_mean=1e-3), 0.9)
    assert bounds.times_own == 2
    assert bounds.kl_mean == pytest.approx(4e-3)
    assert bounds.router_agreement == pytest.approx(0.8)
    quiet = half_thresholds(metrics(kl_mean=1e-9))
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
    threshold: str, words: str, mini: tuple[Path, Path]
) -> None:
    package, checkpoint = mini
    overrides = parse_overrides([threshold])
    report = validate(package, checkpoint, thresholds=overrides, budget="quick")
    assert not report.passed and not report.loosened
    bound = float(threshold.partition("=")[2])
    for scenario in report.scenarios:
        if scenario.metrics is not None:
            (failure,) = scenario.failures
            assert failure.startswith(words) and f"must be <= {bound:g}" in failure
        else:
            assert scenario.status != "failed"
    assert report.fault is None, "no operator is worse than rounding"
    assert report.unexplained is not None


def test_a_loosened_bound_is_told_wherever_the_verdict_is(
    mini: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    def change(model: Any) -> None:
        norm = node(model, "model.norm.RMSNormalization")
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)

    package, checkpoint = mini
    faulty = seed(package, tmp_path / "faulty", change)
    strict = ["validate", str(faulty), "--reference", str(checkpoint), "--budget", "quick"]
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
    assert "by loosened bounds" in page and "near_tie_margin 9" in page
