"""Self-tests of dual chunk attention: what they cross, that the oracle agrees, and the mistakes that they find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from chunked import CHUNK, ORIGINAL, POSITIONS, make_chunked
from defects.chunks import CHUNK_DEFECTS
from defects.tools import seed

from qwenport import engines, exporter
from qwenport.contract import INPUT_IDS, POSITION_IDS, REQUEST_LENGTHS, WRITE_INDICES
from qwenport.engines import run_proof
from qwenport.engines.self_test import IN_FP32
from qwenport.validate import keep_proof, open_target
from qwenport.validate.reference import Reference, Text

from .session_faults import Feeds, Step, inject

LAYERS = 2


@dataclass(frozen=True)
class Chunked:
    """A checkpoint with its package, proof and engine, of three rows."""

    checkpoint: Path
    package: exporter.Package
    proof: engines.Proof
    engine: engines.Engine


def _make(folder: Path, **settings: Any) -> Chunked:
    checkpoint = make_chunked(folder / "checkpoint", **settings)
    package = exporter.export(checkpoint, folder / "package", weights="copy", max_batch=3)
    proof = keep_proof(package).proof
    assert proof is not None
    engine = engines.build(package.path, folder / "engine", target="onnxruntime")
    return Chunked(checkpoint, package, proof, engine)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Chunked:
    return _make(tmp_path_factory.mktemp("scaled"))


@pytest.fixture(scope="module")
def unscaled(tmp_path_factory: pytest.TempPathFactory) -> Chunked:
    return _make(tmp_path_factory.mktemp("unscaled"), original_max_position_embeddings=0)


def _session(engine: engines.Engine) -> engines.OnnxRuntimeSession:
    return engines.OnnxRuntimeSession(engine, max_batch=3, threads=1)


@pytest.mark.parametrize("name", ["scaled", "unscaled"])
def test_an_engine_passes_its_self_test(name: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(name)
    found = run_proof(_session(made.engine), made.proof, IN_FP32)
    assert found.passed and found.left_out == 0 and found.worst < 0.5
    assert found.cases == len(made.proof.cases)


def test_the_cases_cross_the_borders(scaled: Chunked, unscaled: Chunked) -> None:
    for made in (scaled, unscaled):
        assert {"first border of chunks", "second border of chunks"} <= set(made.proof.cases)
    assert f"borders of chunks up to {POSITIONS - CHUNK}" in unscaled.proof.cases
    for border in (1, 2, 3, POSITIONS // CHUNK - 1):
        for around in (0, 1):
            assert [0, border * CHUNK + around] in unscaled.proof.marks.tolist()
    told = " ".join(scaled.proof.cases)
    for case in ("in pieces, scaled by length", "full cache, scaled by length", "beside another"):
        assert case in told


@pytest.mark.parametrize("name", ["scaled", "unscaled"])
def test_the_oracle_agrees_with_every_mark(name: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(name)
    proof, original = made.proof, made.package.config.dual_chunk.original_max_position_embeddings
    prompts = _prompts(proof)
    reference = Reference(open_target(made.package.path), made.checkpoint)
    for index, (sequence, n) in enumerate(proof.marks.tolist()):
        requests: tuple[int, ...] = ()
        if original is not None:
            prompt = prompts.get(sequence, n)
            requests = (prompt,) * prompt + tuple(range(prompt + 1, n + 1))
        text = tuple(proof.sequence(sequence)[:n].tolist())
        (right,) = reference.logits([Text(text, (n - 1,), 0, requests[:n])])
        (error,) = proof.fingerprints.errors([index], right)
        assert error < 1e-5, (sequence, n)


def _prompts(proof: engines.Proof) -> dict[int, int]:
    """Sequences of scaled requests -> tokens of the prompt, as their cases' names have it."""
    found = {}
    for number, name in enumerate(proof.cases):
        if name.endswith("more, scaled by length"):
            fed = [o.sequence for o in proof.operations if o.case == number and o.sequence >= 0]
            found[fed[0]] = int(name.split()[2])
    return found


@pytest.mark.parametrize("change", CHUNK_DEFECTS, ids=lambda change: change.__name__)
def test_a_mistake_in_the_graph_fails(
    change: Callable[[ir.Model], None], scaled: Chunked, tmp_path: Path
) -> None:
    faulty = seed(scaled.package.path, tmp_path / "faulty", change)
    (faulty / "proof.safetensors").unlink()
    engine = engines.build(faulty, tmp_path / "engine", target="onnxruntime")
    found = run_proof(_session(engine), scaled.proof, IN_FP32)
    assert not found.passed and found.worst > 2


def lengths_of_pieces(session: Any, step: Step, feeds: Feeds) -> Any:
    """A piece of a prompt is taken for the whole."""
    reached = feeds[POSITION_IDS][:, -1] + 1
    return step({**feeds, REQUEST_LENGTHS: np.maximum(reached, ORIGINAL)})


def lengths_of_the_longest(session: Any, step: Step, feeds: Feeds) -> Any:
    lengths = feeds[REQUEST_LENGTHS]
    return step({**feeds, REQUEST_LENGTHS: np.full_like(lengths, lengths.max())})


def keys_scaled_after_storing(session: Any, step: Step, feeds: Feeds) -> Any:
    """As sglang's decode does: the step attends to a scaled key, the next ones to the stored one."""
    logits = step(feeds)
    if feeds[INPUT_IDS].shape[1] == 1:
        times = np.log(feeds[REQUEST_LENGTHS] / ORIGINAL)
        for row, start in enumerate(feeds[WRITE_INDICES].tolist()):
            for layer in range(LAYERS):
                keys = session._values(f"{layer}.key")[row, :, start].view(np.float32)
                keys /= np.float32(max(1, 0.1 * times[row] + 1))
    return logits


@pytest.mark.parametrize(
    "fault",
    [
        lengths_of_pieces,
        lengths_of_the_longest,
        keys_scaled_after_storing,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_mistake_in_the_length_fails(fault: Any, scaled: Chunked) -> None:
    session = _session(scaled.engine)
    inject(session, fault)
    found = run_proof(session, scaled.proof, IN_FP32)
    assert not found.passed and found.worst > 2
    assert any("scaled" in failure.case for failure in found.failures)
