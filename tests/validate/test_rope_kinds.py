"""Every rope kind passes, from a config.json and asked for at the export; other factors and weights do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from defects import tables
from defects.tools import seed
from random_model import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from qwenport.contract import MANIFEST
from qwenport.exporter import (
    as_json,
    export,
    load_package,
    parse_config,
    read_config_json,
    write_json,
)
from qwenport.validate import Report, open_target, validate
from qwenport.validate.reference import Reference

from .bundled import failing, row, status

HEAD_DIM = 16
LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.01 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 0.3 * i for i in range(HEAD_DIM // 2)],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
slow = pytest.mark.slow


def judge(package: Path, checkpoint: Path, **options: Any) -> Report:
    return validate(package, checkpoint, budget="quick", **options)


@pytest.mark.parametrize(
    ("rope", "checkpoint", "request_"),
    [
        pytest.param({"rope_type": "linear", "factor": 2.0}, {}, {}, id="linear"),
        pytest.param({"rope_type": "dynamic", "factor": 2.0}, {}, {}, id="dynamic"),
        pytest.param(YARN, {}, {"max_batch": 2}, id="yarn-from-the-model-card"),
        pytest.param(LLAMA3, {"family": LlamaConfig}, {"max_batch": 1}, id="llama3"),
        pytest.param(LONGROPE, {"positions": 128}, {"max_batch": 3}, id="longrope-long"),
        pytest.param(
            LONGROPE, {"positions": 128}, {"max_seq_len": 64}, id="longrope-short", marks=slow
        ),
        pytest.param(None, {}, {"rope_scaling": "linear:2"}, id="ask-linear", marks=slow),
        pytest.param(None, {}, {"rope_scaling": "dynamic:2"}, id="ask-dynamic", marks=slow),
        pytest.param(
            None,
            {"family": LlamaConfig},
            {"rope_scaling": "yarn:4"},
            id="ask-yarn-llama",
            marks=slow,
        ),
        pytest.param(
            None,
            {"family": LlamaConfig, "attention_bias": True, "mlp_bias": True},
            {"max_seq_len": 1},
            id="llama-with-biases-and-one-slot",
        ),
    ],
)
def test_rope_kind_passes(
    rope: dict[str, Any] | None,
    checkpoint: dict[str, Any],
    request_: dict[str, Any],
    tmp_path: Path,
) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", rope, **checkpoint)
    made = export(source, tmp_path / "package", **request_)
    report = judge(made.path, source)
    assert report.passed, report.failures
    if made.max_batch == 1:
        for name in ("batches", "wide batch"):
            assert status(report)[name] == "not run"
            assert "one row" in (row(report, name).reason or "")
    if made.config.rope.depends_on_length and made.max_seq_len > 64:
        _assert_pinning_matters(made.path, source)


def _assert_pinning_matters(path: Path, source: Path) -> None:
    """Without the pin, transformers would use the frequencies of a short text here."""
    target = open_target(path)
    pinned = Reference(target, source).rope_tables(0, 8)
    other = Reference(replace(target, rope_length=8), source).rope_tables(0, 8)
    assert np.abs(pinned[0] - other[0]).max() > 1e-3


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, package): positions 512 to 2047 exist by the request alone."""
    folder = tmp_path_factory.mktemp("extended")
    source = make_checkpoint(folder / "checkpoint", positions=512)
    made = export(source, folder / "package", rope_scaling="yarn:4", weights="copy", max_batch=2)
    return source, made.path


def test_yarn_asked_for_on_a_plain_checkpoint_passes_to_its_end(
    extended: tuple[Path, Path],
) -> None:
    source, package = extended
    report = judge(package, source)
    assert report.passed, report.failures
    assert report.coverage is not None and report.coverage.max_seq_len == 2048
    assert report.coverage.positions[-1][1] == 2047
    assert sum(last - first + 1 for first, last in report.coverage.positions) < 1024
    assert any("positions by the whole model" in said for said in report.coverage.left_out)
    assert status(report)["past original context"] == "passed"


def test_the_last_row_of_a_table_is_seen_where_no_text_fills_the_cache(
    extended: tuple[Path, Path], tmp_path: Path
) -> None:
    source, package = extended
    report = judge(seed(package, tmp_path / "end", tables.wrong_last_rope_row), source)
    assert failing(report) == {"rope tables", "end of context"}
    assert "2047" in row(report, "rope tables").failures[0]


def test_another_factor_than_the_manifest_claims_fails(
    extended: tuple[Path, Path], tmp_path: Path
) -> None:
    source, package = extended
    other = shutil.copytree(package, tmp_path / "package")
    manifest = json.loads((other / MANIFEST).read_text(encoding="utf-8"))
    claims = as_json(asdict(parse_config(read_config_json(other), "yarn:5")))
    write_json(other / MANIFEST, {**manifest, "rope_scaling": "yarn:5", "model": claims})
    report = judge(other, source)
    assert not report.passed
    assert {"rope tables", "prefill"} <= failing(report)


def test_weights_rounded_by_the_export_are_rounded_in_the_oracle(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True)
    made = export(source, tmp_path / "package", dtype="bf16")
    report = judge(made.path, source)
    assert report.passed, report.failures
    assert report.reference_weights == "fp32, weights rounded to bf16 first"
    assert "random token ids" in report.prompts


def test_other_values_under_the_same_header_fail(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint")
    package = export(source, tmp_path / "package", weights="copy").path
    for name in load_package(package).manifest["weights"]["files"]:
        _change_one_weight(package / name)
    report = judge(package, source)
    assert {"weights", "prefill", "decode"} <= failing(report)
    assert "graph" not in failing(report)
    assert report.fault is not None
    assert (report.fault.layer, report.fault.operator) == (1, "mlp.down_proj")
    told = row(report, "weights").failures
    assert any("model.layers.1.mlp.down_proj.weight" in line for line in told)


def _change_one_weight(file: Path) -> None:
    tensors = load_file(file)
    before = file.stat().st_size
    tensors["model.layers.1.mlp.down_proj.weight"][3] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == before
