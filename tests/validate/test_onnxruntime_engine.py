"""Engines for onnxruntime are judged in every way in which they run, and their weights one by one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from command_line import Capture, refused
from random_model import make_checkpoint
from safetensors.torch import load_file

from qwenport.contract import ENGINE_WEIGHTS, MANIFEST, MODEL
from qwenport.engines import build
from qwenport.exporter import export, read_safetensors_header
from qwenport.validate import validate
from qwenport.validate.identity import check_identity
from qwenport.validate.target import open_target

from .bundled import DENSE, MIXTURE, failing, row, status

HIDDEN = {"embedding"}


@pytest.fixture(scope="module")
def engine_of(
    package_of: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Path]:
    """A bundled checkpoint's engine; tests must not change it."""
    made: dict[Path, Path] = {}

    def make(checkpoint: Path) -> Path:
        if checkpoint not in made:
            folder = tmp_path_factory.mktemp(checkpoint.name) / "engine"
            made[checkpoint] = build(package_of(checkpoint), folder, target="onnxruntime").path
        return made[checkpoint]

    return make


@pytest.mark.parametrize(
    "checkpoint", [DENSE, pytest.param(MIXTURE, marks=pytest.mark.slow)], ids=lambda p: p.name
)
def test_a_bundled_engine_passes_every_row_that_it_shows(
    checkpoint: Path, engine_of: Callable[[Path], Path]
) -> None:
    report = validate(engine_of(checkpoint), checkpoint, budget="quick")
    assert report.passed, report.failures
    found = status(report)
    left = {name for name, what in found.items() if what == "not run"}
    hidden = HIDDEN | ({"routing"} if checkpoint == MIXTURE else set())
    assert left == hidden | {"past original context"}
    assert len([name for name in found if name.startswith("cache of ")]) >= 2
    assert (report.judged_as, report.target_dtype, report.compute_dtype) == (
        "engine",
        "bf16",
        "fp32",
    )
    assert report.coverage is not None and report.coverage.widest_step == 512
    assert not any("tensorrt" in name for name in report.environment)
    metrics = row(report, "whole context").metrics
    assert metrics is not None and metrics.rel_l2 < 1e-5


def identity(engine: Path, checkpoint: Path) -> dict[str, str]:
    found = check_identity(open_target(engine), checkpoint)
    return {result.name: result.status for result in found.rows}


PASSES = {"weights": "passed", "graph": "passed", "files": "passed"}


@pytest.mark.parametrize(
    ("dtype", "mode"), [("bf16", "link"), ("fp16", "link"), ("fp32", "link"), ("bf16", "pack")]
)
def test_the_weights_of_experts_are_compared_whatever_the_package_was(
    dtype: str, mode: str, tmp_path: Path
) -> None:
    package = export(MIXTURE, tmp_path / "package", dtype=dtype, weights=mode)
    engine = build(package.path, tmp_path / "engine", target="onnxruntime")
    assert identity(engine.path, MIXTURE) == PASSES


def test_weights_that_the_package_rounded_are_compared_with_the_rounded_ones(
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype=torch.float32)
    package = export(checkpoint, tmp_path / "package", dtype="bf16")
    engine = build(package.path, tmp_path / "engine", target="onnxruntime")
    stored = load_file(engine.path / ENGINE_WEIGHTS)["model.embed_tokens.weight"]
    exact = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(stored, exact)
    assert identity(engine.path, checkpoint) == PASSES


def test_one_changed_value_is_found_and_named(
    engine_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """A value's last bit; headers and sizes stay the same, so the engine opens."""
    engine = Path(shutil.copytree(engine_of(DENSE), tmp_path / "engine"))
    _, entries = read_safetensors_header(engine / ENGINE_WEIGHTS)
    entry = next(entry for entry in entries if entry.name.endswith("2.self_attn.v_proj.weight"))
    with (engine / ENGINE_WEIGHTS).open("r+b") as stream:
        stream.seek(entry.offset + 400)
        byte = stream.read(1)
        stream.seek(entry.offset + 400)
        stream.write(bytes([byte[0] ^ 1]))
    found = check_identity(open_target(engine), DENSE)
    (weights,) = [result for result in found.rows if result.name == "weights"]
    assert weights.status == "failed"
    where = weights.checks[0].where
    assert where is not None and entry.name in where and "1 of" in where


def test_a_changed_node_is_found_and_named(
    engine_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """With a manifest that fits it, so that the engine opens."""
    engine = Path(shutil.copytree(engine_of(DENSE), tmp_path / "engine"))
    model = onnx.load(engine / MODEL, load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f *= 1.5
    onnx.save(model, engine / MODEL)
    manifest = json.loads((engine / MANIFEST).read_text())
    content = (engine / MODEL).read_bytes()
    manifest["files"][MODEL] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (engine / MANIFEST).write_text(json.dumps(manifest))
    found = check_identity(open_target(engine), DENSE)
    (graph,) = [result for result in found.rows if result.name == "graph"]
    assert graph.status == "failed"
    assert norm.name in str(graph.checks[0].where) and "epsilon" in str(graph.checks[0].where)


def test_a_shorter_engine_has_the_expected_graph(tmp_path: Path) -> None:
    package = export(DENSE, tmp_path / "package")
    engine = build(package.path, tmp_path / "engine", target="onnxruntime", max_seq_len=100)
    assert identity(engine.path, DENSE) == PASSES


def test_a_changed_table_fails_the_report(
    engine_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(engine_of(DENSE), tmp_path / "engine"))
    _, entries = read_safetensors_header(engine / ENGINE_WEIGHTS)
    entry = next(entry for entry in entries if entry.name == "rope.cos")
    with (engine / ENGINE_WEIGHTS).open("r+b") as stream:
        stream.seek(entry.offset + entry.length - 4)
        stream.write(b"\0\0\0\0")
    report = validate(engine, DENSE, budget="quick")
    assert "rope tables" in failing(report)
    assert not report.passed


@pytest.mark.parametrize("options", [["--stream"], ["--layers", "1"]])
def test_an_engine_is_not_streamed(
    options: list[str], engine_of: Callable[[Path], Path], capsys: Capture
) -> None:
    line = refused(capsys, "validate", engine_of(DENSE), "--reference", DENSE, *options)
    assert "only packages can be streamed" in line


def test_another_checkpoint_is_refused(engine_of: Callable[[Path], Path], capsys: Capture) -> None:
    line = refused(capsys, "validate", engine_of(DENSE), "--reference", MIXTURE)
    assert "was not made from" in line
