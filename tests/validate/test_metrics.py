"""The one metric function against plain arithmetic, and what a report makes of its numbers."""

from __future__ import annotations

import html
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.validate import Check, Fault, Report, ScenarioResult, ValidationError
from qwenport.validate.coverage import Coverage, Experts
from qwenport.validate.judge import checks_of
from qwenport.validate.metrics import BLOCK, Metrics, compare
from qwenport.validate.report import RouterBand
from qwenport.validate.thresholds import fp32_thresholds


def expected(
    candidate: np.ndarray, reference: np.ndarray, near_ties: list[float]
) -> dict[str, float]:
    """The metrics in Python floats, one number at a time.

    Args:
        near_ties: the margin of each position.
    """
    c, r = candidate.tolist(), reference.tolist()
    pairs = [
        (x, y) for row_c, row_r in zip(c, r, strict=True) for x, y in zip(row_c, row_r, strict=True)
    ]
    norm = math.sqrt(math.fsum(y * y for _, y in pairs))
    cosines, divergences, same, margins, overlaps = [], [], [], [], []
    for row_c, row_r in zip(c, r, strict=True):
        size = math.hypot(*row_c) * math.hypot(*row_r)
        dot = math.fsum(x * y for x, y in zip(row_c, row_r, strict=True))
        cosines.append(dot / size)
        log_c, log_r = (
            [x - max(row) - math.log(math.fsum(math.exp(y - max(row)) for y in row)) for x in row]
            for row in (row_c, row_r)
        )
        divergences.append(
            math.fsum(math.exp(q) * (q - p) for p, q in zip(log_c, log_r, strict=True))
        )
        same.append(row_c.index(max(row_c)) == row_r.index(max(row_r)))
        second, first = sorted(row_r)[-2:]
        margins.append(first - second)
        best_c, best_r = (
            set(sorted(range(len(row)), key=row.__getitem__)[-5:]) for row in (row_c, row_r)
        )
        overlaps.append(len(best_c & best_r) / len(best_r))
    clear = [s for s, m, tie in zip(same, margins, near_ties, strict=True) if m >= tie]
    return {
        "max_abs": max(abs(x - y) for x, y in pairs),
        "mean_abs": math.fsum(abs(x - y) for x, y in pairs) / len(pairs),
        "rel_l2": math.sqrt(math.fsum((x - y) ** 2 for x, y in pairs)) / norm,
        "kl_mean": math.fsum(divergences) / len(divergences),
        "cosine_p5": _percentile(cosines, 5),
        "kl_p99": _percentile(divergences, 99),
        "top1": sum(same) / len(same),
        "top1_clear": sum(clear) / len(clear) if clear else 1.0,
        "top5_overlap": math.fsum(overlaps) / len(overlaps),
        "near_ties": len(same) - len(clear),
        "smallest_margin": min(margins),
    }


def _percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (place - below)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    positions=st.integers(1, 2 * BLOCK + 3),
    vocab=st.integers(2, 40),
    size=st.floats(0.1, 30),
    noise=st.sampled_from([0.0, 1e-4, 0.3, 5.0]),
    near_tie=st.sampled_from([0.0, 0.5, 100.0]),
)
def test_metrics_equal_plain_arithmetic(
    seed: int, positions: int, vocab: int, size: float, noise: float, near_tie: float
) -> None:
    rng = np.random.default_rng(seed)
    reference = (rng.standard_normal((positions, vocab)) * size).astype(np.float32)
    candidate = reference + (rng.standard_normal((positions, vocab)) * noise).astype(np.float32)
    found = compare(candidate, reference, near_tie_margin=near_tie)
    for name, value in expected(candidate, reference, [near_tie] * positions).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-13), name
    assert found.near_tie_margin == near_tie
    lengths = np.linalg.norm((candidate - reference).astype(np.float64), axis=1)
    assert found.by_position.difference == pytest.approx(lengths, rel=1e-5, abs=1e-13)
    assert (found.positions, found.vocab, found.nonfinite) == (positions, vocab, 0)
    assert found.worst_rel_l2 >= found.rel_l2 * (1 - 1e-9)
    assert found.by_position.rel_l2[found.worst_position] == found.worst_rel_l2
    assert max(found.by_position.rel_l2) == found.worst_rel_l2
    assert (len(found.by_position.rel_l2), len(found.by_position.kl)) == (positions, positions)
    for row in range(positions):
        one = compare(candidate[row : row + 1], reference[row : row + 1], near_tie_margin=0)
        assert found.by_position.rel_l2[row] == pytest.approx(one.rel_l2, rel=1e-9)
        assert found.by_position.kl[row] == pytest.approx(one.kl_mean, rel=1e-9, abs=1e-13)
    wrong = [row for row in range(positions) if reference[row].argmax() != candidate[row].argmax()]
    assert found.first_disagreement == (wrong[0] if wrong else None)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), positions=st.integers(1, 2 * BLOCK + 3))
def test_each_position_may_have_a_near_tie_margin_of_its_own(seed: int, positions: int) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((positions, 9)).astype(np.float32)
    candidate = reference + rng.standard_normal((positions, 9)).astype(np.float32)
    margins = rng.choice([0.0, 0.3, 1.0, np.inf], positions)
    found = compare(candidate, reference, near_tie_margin=margins)
    for name, value in expected(candidate, reference, margins.tolist()).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-13), name
    assert found.near_tie_margin == margins.max()


def test_one_margin_for_all_is_an_array_of_it() -> None:
    rng = np.random.default_rng(5)
    reference, candidate = rng.standard_normal((2, 40, 9)).astype(np.float32)
    one = compare(candidate, reference, near_tie_margin=0.4)
    assert one == compare(candidate, reference, near_tie_margin=np.full(40, 0.4))
    assert 0 < one.near_ties < 40


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, BLOCK, BLOCK + 2])
def test_one_logit_that_is_not_finite_fails_every_check(bad: float, position: int) -> None:
    reference = np.random.default_rng(0).standard_normal((BLOCK + 3, 7)).astype(np.float32)
    candidate = reference.copy()
    candidate[position, 3] = bad
    metrics = compare(candidate, reference, near_tie_margin=0.0)
    assert metrics.nonfinite == 1
    assert metrics.worst_position == metrics.first_disagreement == position
    for value in (metrics.rel_l2, metrics.max_abs, metrics.cosine_p5, metrics.kl_mean):
        assert math.isnan(value)
        assert not Check("x", value, "<=", 1e9).passed
        assert not Check("x", value, ">=", -1e9).passed
    assert metrics.top1 < 1
    broken = [row for row, value in enumerate(metrics.by_position.rel_l2) if math.isnan(value)]
    assert broken == [position]
    checks = checks_of(
        metrics, fp32_thresholds(1e-7), [f"row {i}" for i in range(BLOCK + 3)], "fp32"
    )
    assert not any(check.passed for check in checks)
    assert all(f"row {position}" in str(check) for check in checks[1:])


def test_all_zero_logits_have_no_distance_from_each_other_and_any_from_others() -> None:
    zeros, ones = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    same = compare(zeros, zeros, near_tie_margin=0.0)
    assert (same.rel_l2, same.cosine_p5) == (0.0, 1.0)
    other = compare(ones, zeros, near_tie_margin=0.0)
    assert (other.rel_l2, other.cosine_p5) == (math.inf, 0.0)


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        (np.zeros((2, 3)), np.zeros((3, 3))),
        (np.zeros((0, 3)), np.zeros((0, 3))),
        (np.zeros(3), np.zeros(3)),
        (np.zeros((1, 3)), np.array([[0, np.nan, 0]])),
        (np.zeros((1, 3)), np.array([[0, np.inf, 0]])),
    ],
)
def test_what_cannot_be_compared_is_an_error(candidate: np.ndarray, reference: np.ndarray) -> None:
    with pytest.raises(ValidationError):
        compare(candidate.astype(np.float32), reference.astype(np.float32), near_tie_margin=0.0)


def _report(*scenarios: ScenarioResult, **facts: Any) -> Report:
    plain: dict[str, Any] = {
        "target": "package",
        "judged_as": "package",
        "target_dtype": "bf16",
        "compute_dtype": "fp32",
        "reference": "checkpoint",
        "reference_mode": "whole",
        "reference_weights": "fp32",
        "layers_judged": 2,
        "layers": 2,
        "complete": True,
        "prompts": "none",
        "own_rounding": 1e-7,
        "cost": None,
        "coverage": None,
        "loosened": (),
        "layers_error": (),
        "rounding": (),
        "fault": None,
        "unexplained": None,
        "script": None,
        "routing": (),
        "replayed": 0,
        "environment": {},
        "hashes": {},
        "weights_sha256": {},
    }
    return Report(**(plain | facts), scenarios=scenarios)


def _metrics() -> Metrics:
    return compare(np.ones((1, 3), np.float32), np.ones((1, 3), np.float32), near_tie_margin=0.0)


def test_a_report_in_which_nothing_was_compared_does_not_pass() -> None:
    skipped = ScenarioResult("decode", "s", "not run", reason="why")
    tables = ScenarioResult("rope tables", "s", "passed", (Check("rows", 1, "==", 1),))
    assert not _report().passed
    assert not _report(skipped, tables).passed
    compared = ScenarioResult("prefill", "s", "passed", (), _metrics())
    assert _report(skipped, tables, compared).passed
    assert not _report(skipped, tables, compared, complete=False).passed
    assert not _report(compared, ScenarioResult("routing", "s", "failed", reason="why")).passed


def test_the_verdict_says_what_was_judged_whatever_it_is() -> None:
    compared = ScenarioResult("prefill", "s", "passed", (), _metrics())
    raised = ScenarioResult("decode", "s", "failed", reason="why")
    assert _report().verdict == "parity does NOT hold: ; judged: nothing"
    coverage = Coverage(
        budget="quick",
        seed=0,
        step_widths=(1, 64),
        widest_step=512,
        last_logits_steps=1,
        all_logits_steps=1,
        single_steps=3,
        batches=(1,),
        max_batch=8,
        rows=(0,),
        spans=(64,),
        all_spans=8,
        single_positions=((64, 66),),
        capacities=(512,),
        all_capacities=8,
        positions=((0, 66),),
        max_seq_len=512,
        distance=66,
        layer_distance={"layer 0": 511},
        token_ids=40,
        embedded_ids=2048,
        vocab_size=2048,
        experts=(Experts(2, 12, (3, 4)),),
        rounding=0,
        left_out=(),
    )
    judged = (
        "judged: steps of 1 to 64 of 512 tokens (2 widths), batches of 1 of 8, rows 0, 1 of 8 spans, "
        "caches of 1 of 8 sizes, 67 of 512 positions, 3 of them token by token, attention over 512, "
        "40 of 2048 token ids (2048 in the embedding), 10 of 12 experts"
    )
    assert _report(compared, coverage=coverage).verdict == f"parity holds: 1 passed; {judged}"
    failed = _report(compared, raised, coverage=coverage, layers=9).verdict
    assert failed.startswith("parity does NOT hold for the first 2 of 9 layers: 1 passed, 1 failed")
    assert failed.endswith(judged)
    assert _report(compared, coverage=coverage).to_json()["verdict"].endswith(judged)


def test_a_failure_names_scenario_metric_value_bound_and_place(tmp_path: Path) -> None:
    check = Check("rel-L2", 0.5, "<=", 1e-5, "worst at row 0 position 3")
    report = _report(
        ScenarioResult("prefill", "s", "passed", (), _metrics()),
        ScenarioResult("decode", "s", "failed", (check, Check("n", 0, "==", 0)), _metrics()),
    )
    assert report.failures == ("decode: rel-L2 0.5, must be <= 1e-05 (worst at row 0 position 3)",)
    report.write(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Parity does not hold" in page and html.escape(str(check)) in page
    raised = ScenarioResult("decode", "s", "failed", reason="the target raised E: no")
    assert _report(raised).failures == ("decode: the target raised E: no",)


def test_json_is_strict_where_numbers_are_not_finite(tmp_path: Path) -> None:
    check = Check("rel-L2", math.nan, "<=", math.inf)
    fault = Fault("prefill", 1, "mlp", math.nan, 1.0, -math.inf, 0.0, "It starts there.")
    measured = ScenarioResult("decode", "s", "passed", (), replace(_metrics(), own_ratio=math.inf))
    report = _report(
        ScenarioResult("prefill", "s", "failed", (check,), None),
        measured,
        own_rounding=math.nan,
        fault=fault,
        routing=(RouterBand(0.1, math.inf, 3, 2),),
    )
    report.write(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=refuse)
    assert data["schema_version"] == 4 and data["passed"] is False
    (found,) = data["scenarios"][0]["checks"]
    assert (found["value"], found["bound"], found["passed"]) == ("NaN", "Infinity", False)
    assert data["own_rounding"] == "NaN" and data["routing"][0]["most"] == "Infinity"
    assert (data["fault"]["input_error"], data["fault"]["local_error"]) == ("NaN", "-Infinity")
    assert data["scenarios"][0]["by_position"] is data["scenarios"][0]["metrics"] is None
    assert data["scenarios"][1]["metrics"]["own_ratio"] == "Infinity"
    assert data["scenarios"][1]["by_position"] == {
        "rel_l2": [0.0],
        "kl": [0.0],
        "difference": [0.0],
    }
    assert "by_position" not in data["scenarios"][1]["metrics"]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20))
def test_an_error_is_spread_over_as_many_positions_as_make_it(sizes: list[float]) -> None:
    """Participation ratio: n for n equal errors, near 1 where one position makes all of it."""
    reference = np.ones((len(sizes), 4), np.float32)
    candidate = reference + np.array(sizes, np.float32)[:, None]
    found = compare(candidate, reference, near_tie_margin=0.0).effective_positions
    squares = np.array(sizes, np.float32).astype(float) ** 2
    assert found == pytest.approx(squares.sum() ** 2 / (squares**2).sum(), rel=1e-4)
    assert 1 - 1e-9 <= found <= len(sizes) * (1 + 1e-9)
    alone = reference.copy()
    alone[0] += 3
    one = compare(alone, reference, near_tie_margin=0.0).effective_positions
    assert one == pytest.approx(1.0)
    none = compare(reference, reference, near_tie_margin=0.0).effective_positions
    assert none == len(sizes)
