"""Engines of quantized packages, whose products round activations to int8: proven, judged, and caught when wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized import write_pack_quantized

from qwenport import engines, exporter
from qwenport.contract import ENGINE_WEIGHTS, INT8
from qwenport.engines import open_session, run_proof, self_test
from qwenport.engines.self_test import IN_FP32, IN_PACKAGE_DTYPE, WITH_ROUNDED_ACTIVATIONS
from qwenport.exporter import read_safetensors_header
from qwenport.validate import keep_proof, validate
from qwenport.validate.identity import check_identity
from qwenport.validate.proof_making import make_proof
from qwenport.validate.target import open_target

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = "tiny-qwen2.5", "tiny-qwen2-moe"
ROUTERS = (r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
SCHEMES: dict[str, dict[str, Any]] = {
    DENSE: {"group": 16, "symmetric": False},
    MIXTURE: {"bits": 8, "group": 32, "ignore": ("lm_head", *ROUTERS)},
}


@dataclass(frozen=True)
class Made:
    """A quantized checkpoint, its package and an engine of it."""

    checkpoint: Path
    package: exporter.Package
    engine: engines.Engine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Bundled checkpoint -> what is made of it. Tests must not change it."""
    folder, known = tmp_path_factory.mktemp("quantized"), dict[str, Made]()

    def make(name: str) -> Made:
        if name not in known:
            path = folder / name
            checkpoint = write_pack_quantized(EXAMPLES / name, path, **SCHEMES[name])
            package = exporter.export(checkpoint, folder / f"{name}.package")
            keep_proof(package)
            engine = engines.build(
                package.path, folder / f"{name}.engine", target="onnxruntime", max_batch=4
            )
            known[name] = Made(checkpoint, package, engine)
        return known[name]

    return make


@pytest.mark.parametrize("name", SCHEMES)
def test_engines_reproduce_their_proof_with_activations_in_int8(
    name: str, made: Callable[[str], Made]
) -> None:
    engine = made(name).engine
    assert engine.activations == INT8 and engine.manifest["dtype"] == "fp32"
    found = self_test(engine.path)
    assert found.passed and found.marks > 20
    assert 0.1 < found.worst < 0.6, "neither loose nor tight"
    # the bound for fp32 is not for such engines
    proof = engines.read_proof(
        engine.path / "proof.safetensors", engine.manifest["package"]["manifest_sha256"]
    )
    session = open_session(engine.path, capacity=engine.manifest["max_seq_len"])
    assert not run_proof(session, proof, IN_FP32).passed
    assert (proof.bounds[:, WITH_ROUNDED_ACTIVATIONS] > proof.bounds[:, IN_FP32]).all()


def test_a_streamed_proof_has_the_same_bounds(made: Callable[[str], Made]) -> None:
    package = made(DENSE).package
    whole, streamed = make_proof(package), make_proof(package, streamed=True)
    np.testing.assert_allclose(streamed.bounds, whole.bounds, rtol=0.05)


def test_without_quantized_weights_the_third_bound_is_the_second(tmp_path: Path) -> None:
    package = exporter.export(EXAMPLES / DENSE, tmp_path / "package")
    bounds = make_proof(package).bounds
    assert np.array_equal(bounds[:, WITH_ROUNDED_ACTIVATIONS], bounds[:, IN_PACKAGE_DTYPE])


@pytest.mark.parametrize("name", SCHEMES)
def test_engines_are_judged_by_transformers_rounding_so(
    name: str, made: Callable[[str], Made]
) -> None:
    found = made(name)
    report = validate(found.engine.path, found.checkpoint, budget="quick")
    assert report.passed and report.compute_dtype == INT8
    ratios = [s.metrics.own_ratio for s in report.scenarios if s.metrics is not None]
    assert 0.7 < float(np.median([r for r in ratios if r is not None])) < 1.4
    assert "arithmetic" not in report.verdict


def _nibbles_swapped(data: np.ndarray) -> np.ndarray:
    return (data >> 4) | (data << 4)


def _up_by_one(data: np.ndarray) -> np.ndarray:
    low, high = (data + 1) & 15, ((data >> 4) + 1) & 15
    return low | (high << 4)


def _of_the_neighbour(data: np.ndarray) -> np.ndarray:
    return np.roll(data.view(np.float32), 1).view(np.uint8)


FAULTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "nibbles swapped": ("codes", _nibbles_swapped),
    "zero points off by one": ("zeros", _up_by_one),
    "scales of the neighbour": ("scales", _of_the_neighbour),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_weight_is_caught(
    fault: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    part, change = FAULTS[fault]
    source, engine = made(DENSE), tmp_path / "engine"
    shutil.copytree(source.engine.path, engine)
    name = f"model.layers.1.mlp.up_proj.weight.{part}"
    _, entries = read_safetensors_header(engine / ENGINE_WEIGHTS)
    (entry,) = [e for e in entries if e.name == name]
    with (engine / ENGINE_WEIGHTS).open("r+b") as file:
        file.seek(entry.offset)
        data = np.frombuffer(file.read(entry.length), np.uint8)
        file.seek(entry.offset)
        file.write(change(data).tobytes())
    assert not self_test(engine).passed
    (row, *_) = check_identity(open_target(engine), source.checkpoint).rows
    # a small fault in a single weight may hide in int8's rounding of the logits
    assert row.name == "weights" and row.status == "failed"
    (told,) = row.failures
    assert "model.layers.1.mlp.up_proj.weight.codes" in told and "values differ" in told
    if fault == "scales of the neighbour":
        report = validate(engine, source.checkpoint, budget="quick")
        assert not report.passed and f"weights: {told}" in report.failures
