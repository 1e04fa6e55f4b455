"""A proof covers what it says, fits its size, and its bounds hold for correct programs: no false alarm."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import healthy_models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport import cli, engines, exporter
from qwenport.contract import DTYPES, PROOF
from qwenport.engines import Kind, OnnxRuntimeSession, Proof, read_proof, run_proof, write_proof
from qwenport.engines.memory import poison, poison_slots
from qwenport.engines.self_test import IN_FP32, IN_PACKAGE_DTYPE
from qwenport.exporter import sha256
from qwenport.validate import keep_proof, make_proof, open_target
from qwenport.validate.candidate import Candidate
from qwenport.validate.proof_cases import (
    MAIN,
    make_cases,
    make_sequences,
    operations,
    span_edges,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = "tiny-qwen2.5", "tiny-qwen2-moe"


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """checkpoint -> its package and proof."""
    folder, made = tmp_path_factory.mktemp("proofs"), {}

    def make(checkpoint: str) -> Any:
        if checkpoint not in made:
            package = exporter.export(EXAMPLES / checkpoint, folder / checkpoint, weights="copy")
            made[checkpoint] = package, make_proof(package)
        return made[checkpoint]

    return make


def _reread(proof: Proof, folder: Path) -> Proof:
    """The proof after the strict reader, which also runs its operations."""
    write_proof(folder / PROOF, proof)
    return read_proof(folder / PROOF, proof.package_sha256)


def test_span_edges_are_those_of_sessions() -> None:
    """The spans that a session of 64 slots' multiple binds, found by asking each length, are among the edges."""
    assert span_edges(600)[:9] == [64, 128, 192, 256, 320, 384, 448, 512, 576]
    assert {256, 512, 768, 1024} <= set(span_edges(1024))


@given(st.integers(1, 1026), st.integers(1, 80), st.booleans())
def test_cases_are_runs_that_sessions_can_make(context: int, batch: int, whole: bool) -> None:
    cases = make_cases(context, batch, whole=whole)
    sequences = make_sequences(64, context, experts=False)
    assert all(case.slots <= context and case.rows <= max(batch, 1) for case in cases)
    for case in cases:
        for sequence, n in case.marks:
            assert 1 <= n <= len(sequences[sequence])
    assert max(case.rows for case in cases) == min(batch, 64) or context < 16
    for edge in span_edges(context):
        assert any((MAIN, edge) in case.marks for case in cases)
        assert edge == context or any((MAIN, edge + 1) in case.marks for case in cases)
        # an engine with so many slots is tested to its own end, by a whole prompt and by a single token
        if edge.bit_count() == 1:
            (own,) = [c for c in cases if (MAIN, edge) in c.marks and c.name.endswith(f"to {edge}")]
            assert own.slots == edge
    numbers = [o.call for o in operations(cases)]
    assert numbers == sorted(numbers) and set(numbers) == set(range(max(numbers) + 1))


@pytest.mark.parametrize("checkpoint", [DENSE, MIXTURE])
def test_proof_of_a_bundled_checkpoint(
    checkpoint: str, proven: Callable[[str], Any], tmp_path: Path
) -> None:
    package, made = proven(checkpoint)
    proof = _reread(made, tmp_path)
    size = (tmp_path / PROOF).stat().st_size
    assert size <= 0.01 * package.manifest["weights"]["bytes"]
    cases = {proof.cases[o.case]: o for o in proof.operations if o.kind is Kind.BEGIN}
    assert cases["8 ragged rows"].row == package.max_batch
    assert cases["full cache"].end == package.max_seq_len
    marks = set(map(tuple, proof.marks.tolist()))
    for edge in span_edges(512):
        assert (0, edge) in marks and (edge == 512 or (0, edge + 1) in marks)
    if checkpoint == MIXTURE:
        assert proof.experts == (36, 36)  # three sparse layers of twelve
    # fp32 bounds are tight wherever no expert is in doubt
    assert np.median(proof.bounds[:, IN_FP32]) <= 2e-5
    assert np.median(proof.bounds[:, IN_PACKAGE_DTYPE]) <= 0.1


def test_streamed_proof_is_the_same(proven: Callable[[str], Any]) -> None:
    package, whole = proven(DENSE)
    streamed = make_proof(package, streamed=True)
    assert streamed.operations == whole.operations
    assert np.array_equal(streamed.marks, whole.marks)
    for index in range(len(whole.marks)):
        ours, theirs = whole.fingerprints.take([index]), streamed.fingerprints.take([index])
        assert np.allclose(ours.projections, theirs.projections, rtol=1e-4, atol=1e-3)
    assert np.allclose(streamed.bounds, whole.bounds, rtol=0.2)


def test_a_package_keeps_its_proof_and_makes_it_once(
    proven: Callable[[str], Any], tmp_path: Path
) -> None:
    source, _ = proven(DENSE)
    shutil.copytree(source.path, tmp_path / "package")
    package = exporter.load_package(tmp_path / "package")
    kept = keep_proof(package, seconds=1e-9)
    assert kept.proof is None and kept.note is not None and "qwenport validate" in kept.note
    assert not (package.path / PROOF).exists()
    assert keep_proof(package).note is None
    before = sha256(package.path / PROOF)
    assert keep_proof(package).note is None
    assert sha256(package.path / PROOF) == before
    assert exporter.load_package(package.path) == package


def test_an_engine_carries_the_proof_of_a_package_that_cannot_keep_it(
    proven: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A package on a disk that is read-only."""
    source, proof = proven(DENSE)
    shutil.copytree(source.path, tmp_path / "package")

    def refuse(file: Path, proof: Proof) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), file)

    monkeypatch.setattr("qwenport.validate.proof_making.write_proof", refuse)
    args = [str(tmp_path / "package"), str(tmp_path / "engine"), "--target", "onnxruntime"]
    assert cli.main(["build", *args]) == 0
    assert "the package keeps no proof" in capsys.readouterr().err
    assert not (tmp_path / "package" / PROOF).exists()
    carried = engines.engine_proof(engines.load_engine(tmp_path / "engine"))
    assert carried is not None and carried.operations == proof.operations


@pytest.mark.parametrize("checkpoint", [DENSE, pytest.param(MIXTURE, marks=pytest.mark.slow)])
def test_half_precision_bounds_hold_for_tensorrts_network(
    checkpoint: str, proven: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another correct bf16 program: TensorRT's network of the package, with the roundings that it declares."""
    pytest.importorskip("tensorrt_rtx")
    package, proof = proven(checkpoint)
    target = open_target(package.path, judged_as="tensorrt-network")
    layers = target.config.num_hidden_layers
    candidate = Candidate(target, layers=layers, streamed=False).declared()
    (session,) = candidate.open([(package.max_batch, package.max_seq_len, lambda session: None)])

    def fill() -> None:
        for row, held in enumerate(session.lengths.tolist()):
            for memory in session._cache.values():
                bits = poison(DTYPES[package.dtype], held, memory.shape[2])
                poison_slots(memory, row, bits)

    session.poison = fill
    found = run_proof(session, proof, IN_PACKAGE_DTYPE)
    assert found.passed, found.failures
    assert 0.1 < found.worst < 0.9  # neither loose nor tight


def _false_alarm(model: healthy_models.HealthyModel, folder: Path) -> engines.SelfTest:
    """The self-test of an engine of a correct model, in fp32 and with the results rounded as the proof allows."""
    checkpoint = healthy_models.write(folder / "checkpoint", model)
    package = exporter.export(checkpoint, folder / "package", **model.export_arguments)
    proof = _reread(make_proof(package), folder)
    engine = engines.build(package.path, folder / "engine", target="onnxruntime")
    session = OnnxRuntimeSession(
        engine, max_batch=package.max_batch, capacity=package.max_seq_len, threads=1
    )
    return run_proof(session, proof, IN_FP32)


@settings(max_examples=10)
@given(model=healthy_models.healthy_models())
def test_no_false_alarm_on_10_healthy_models(
    model: healthy_models.HealthyModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = _false_alarm(model, tmp_path_factory.mktemp("healthy"))
    assert found.passed, found.failures
    assert found.cases >= 5 and found.left_out == 0


@pytest.mark.slow
@settings(max_examples=100)
@given(model=healthy_models.healthy_models())
def test_no_false_alarm_on_100_healthy_models(
    model: healthy_models.HealthyModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = _false_alarm(model, tmp_path_factory.mktemp("healthy"))
    assert found.passed, found.failures
