"""What is right passes: the bundled checkpoints in every way, with every row and key that a report has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from defects import ends
from defects.tools import seed

from qwenport.contract import CHUNK, SPAN_MULTIPLE
from qwenport.engines.spans import Spans
from qwenport.exporter import export, load_package
from qwenport.validate import Report, validate
from qwenport.validate.scenarios import SCENARIOS

from .bundled import DENSE, MIXTURE, WAYS, row, status, strict_json

REPORT_KEYS = {
    "schema_version", "passed", "verdict", "target", "judged_as", "target_dtype", "compute_dtype", "reference",
    "reference_mode", "reference_weights", "layers_judged", "layers", "complete", "prompts", "own_rounding", "cost",
    "coverage", "loosened", "scenarios", "layers_error", "rounding", "fault", "unexplained", "script", "routing",
    "replayed", "environment", "hashes", "weights_sha256",
}  # fmt: skip
SCENARIO_KEYS = {
    "name", "summary", "status", "checks", "metrics", "by_position", "reason", "seconds",
}  # fmt: skip
COVERAGE_KEYS = {
    "budget", "seed", "step_widths", "widest_step", "last_logits_steps", "all_logits_steps", "single_steps",
    "batches", "max_batch", "rows", "spans", "all_spans", "capacities", "all_capacities", "single_positions",
    "positions", "max_seq_len", "distance",
    "layer_distance", "token_ids", "embedded_ids", "vocab_size", "experts", "rounding", "left_out",
}  # fmt: skip


def expected(checkpoint: Path, judged_as: str, rounds: bool) -> dict[str, str]:
    """Every row of a model of that kind that passes."""
    names = ["weights", "graph", "files"]
    if judged_as != "package":
        names += ["parsed network", "constants"]
    names += ["rope tables", "embedding", *(scenario.name for scenario in SCENARIOS)]
    names += ["distance of layer 0"]
    if checkpoint == MIXTURE:  # whose second layer is dense
        names += ["distance of layer 1", "routing"]
    if rounds:
        names += ["rounding of layers", "rounding of operators", "in bf16"]
    return dict.fromkeys(names, "passed") | {"past original context": "not run"}


def some(way: str, checkpoint: Path, streamed: bool) -> Any:
    """What is judged in the fast tests: each way once."""
    fast = {("package", DENSE, False), ("network", MIXTURE, False), ("package", MIXTURE, True)}
    marks = () if (way, checkpoint, streamed) in fast else pytest.mark.slow
    name = f"{checkpoint.name}, {way}{', streamed' if streamed else ''}"
    return pytest.param(way, checkpoint, streamed, id=name, marks=marks)


@pytest.mark.parametrize(
    ("way", "checkpoint", "streamed"),
    [
        some(way, checkpoint, streamed)
        for way in WAYS
        for checkpoint in (DENSE, MIXTURE)
        for streamed in (False, True)
    ],
)
def test_bundled_checkpoint_passes_every_row(
    way: str,
    checkpoint: Path,
    streamed: bool,
    package_of: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    package = package_of(checkpoint)
    seen: list[tuple[str, int, int]] = []
    report = validate(
        package,
        checkpoint,
        **WAYS[way],
        streamed=streamed or None,
        budget="quick",
        progress=lambda *step: seen.append(step),
    )
    assert report.passed, report.failures
    rounds = way == "network"
    found = status(report)
    caches = [name for name in found if name.startswith("cache of ")]
    assert len(caches) >= 2 and {found.pop(name) for name in caches} == {"passed"}
    assert found == expected(checkpoint, report.judged_as, rounds)
    assert report.reference_weights == "fp32" and "text" in report.prompts
    assert report.reference_mode == ("streamed" if streamed else "whole")
    assert report.fault is None and report.unexplained is None and report.script is None
    assert report.complete and not report.loosened and report.compute_dtype == "fp32"
    assert len(report.layers_error) == report.layers + 1 == report.layers_judged + 1
    assert bool(report.rounding) == rounds
    assert bool(report.routing) == (checkpoint == MIXTURE)
    assert seen[-1] == ("done", 1, 1)
    is_network = report.judged_as == "tensorrt-network"
    assert ("; attention chunked, for sm80, sm86, " in report.verdict) == is_network
    spans = Spans(CHUNK if is_network else SPAN_MULTIPLE, 512)
    _assert_covered(report, spans=len(spans))
    _assert_written(report, tmp_path / "new" / "folder", package)


def _assert_covered(report: Report, *, spans: int) -> None:
    coverage = report.coverage
    assert coverage is not None
    assert report.verdict.startswith("parity holds: ")
    assert report.verdict.endswith(f"; judged: {coverage}")
    assert coverage.step_widths[0] == 1 and coverage.step_widths[-1] == coverage.widest_step == 512
    assert coverage.rows == tuple(range(8)) and len(coverage.spans) == coverage.all_spans == spans
    assert coverage.embedded_ids == coverage.vocab_size == 2048
    assert not any(layer.without_tokens for layer in coverage.experts)
    said = " ".join(coverage.left_out)
    assert ("the rounding of bf16" in said) == (not report.rounding)
    assert coverage.rounding == (512 if report.rounding else 0)


def _assert_written(report: Report, folder: Path, package: Path) -> None:
    report.write(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    data = strict_json((folder / "report.json").read_text(encoding="utf-8"))
    assert data.keys() == REPORT_KEYS and data["coverage"].keys() == COVERAGE_KEYS
    assert (data["schema_version"], data["passed"]) == (4, True)
    assert data["verdict"] == report.verdict
    for scenario in data["scenarios"]:
        assert scenario.keys() == SCENARIO_KEYS
        assert all(check["passed"] for check in scenario["checks"])
        if scenario["metrics"] is not None:
            count = scenario["metrics"]["positions"]
            assert [len(scenario["by_position"][name]) for name in ("rel_l2", "kl")] == [count] * 2
            worst = scenario["metrics"]["worst_position"]
            assert scenario["by_position"]["rel_l2"][worst] == scenario["metrics"]["worst_rel_l2"]
    source = load_package(package).manifest["source"]
    assert data["hashes"]["source config.json"] == source["config_sha256"]
    assert "model.safetensors" in data["weights_sha256"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Parity holds" in page and str(package) in page


@pytest.mark.parametrize(
    ("dtype", "way"),
    [
        ("fp32", "package"),
        ("fp16", "network"),
        pytest.param("fp16", "package", marks=pytest.mark.slow),
        pytest.param("fp32", "network", marks=pytest.mark.slow),
    ],
)
def test_other_dtypes_of_the_bundled_checkpoint_pass(dtype: str, way: str, tmp_path: Path) -> None:
    made = export(DENSE, tmp_path / "package", dtype=dtype, max_seq_len=128, max_batch=3)
    report = validate(made.path, DENSE, **WAYS[way], budget="quick")
    assert report.passed, report.failures
    assert report.reference_weights == f"fp32, weights rounded to {dtype} first"
    assert (report.target_dtype, report.compute_dtype) == (dtype, "fp32")
    assert bool(report.rounding) == (dtype == "fp16" and way == "network")
    assert report.coverage is not None
    unjudged = "the range and rounding of fp16" in " ".join(report.coverage.left_out)
    assert unjudged == (dtype == "fp16" and way == "package")


def test_a_target_of_nan_is_a_strict_report(tmp_path: Path) -> None:
    made = export(DENSE, tmp_path / "package", weights="copy", max_seq_len=64, max_batch=1)
    report = validate(seed(made.path, tmp_path / "nan", ends.one_nan), DENSE, budget="quick")
    assert row(report, "prefill").metrics is not None
    report.write(tmp_path / "report")
    data = strict_json((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert data["passed"] is False
    (first,) = [s for s in data["scenarios"] if s["name"] == "prefill"]
    assert first["metrics"]["rel_l2"] == "NaN" and first["metrics"]["nonfinite"] == 64
    assert first["by_position"]["kl"] == ["NaN"] * 64
    assert "NaN" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
