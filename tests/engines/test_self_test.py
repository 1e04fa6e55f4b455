"""The self-test as a whole: what it runs, what it remembers, and what it says on the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Capture, refused

from qwenport import cli, engines, exporter
from qwenport.contract import BF16, DTYPES, FP16, FP32, MANIFEST, PROOF
from qwenport.engines import has_passed, open_session, run_proof, self_test
from qwenport.engines.memory import poison, poison_slots
from qwenport.engines.self_test import IN_FP32
from qwenport.validate import make_proof

from . import stand_in_tensorrt
from .proofs import DENSE, Proven
from .proofs import proven as proven
from .session_faults import inject, lost_write, one_infinite_logit, stale_graph

Proofs = Callable[[str], Proven]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that remembers nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwenport" / "self-tests"


@pytest.fixture
def unproven(proven: Proofs, tmp_path: Path) -> Path:
    """An engine without a proof."""
    package = tmp_path / "package"
    shutil.copytree(proven(DENSE).package.path, package)
    (package / PROOF).unlink()
    return engines.build(package, tmp_path / "engine", target="onnxruntime").path


@pytest.fixture
def faulty(proven: Proofs, tmp_path: Path) -> Path:
    """An engine that has another weight than its package: the value of one element, which no hash covers."""
    engine = tmp_path / "faulty"
    shutil.copytree(proven(DENSE).engine.path, engine)
    file = engine / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-4 << 16 : -2 << 16] = bytes(2 << 16)
    file.write_bytes(data)
    return engine


def test_a_pass_is_remembered_for_this_engine_and_required_by_a_session(
    proven: Proofs, faulty: Path, cache: Path
) -> None:
    engine = proven(DENSE).engine
    with pytest.raises(
        engines.EngineError, match="has not passed its self-test here; run qwenport"
    ):
        open_session(engine.path, require_self_test=True)
    assert self_test(engine.path).passed
    assert has_passed(engine)
    assert open_session(engine.path, require_self_test=True).vocab_size == 2048
    (file,) = cache.iterdir()
    stored = json.loads(file.read_text())
    assert stored["cases"] == len(proven(DENSE).proof.cases)
    # as docs/reference/proof.md says, computed by another program
    import hashlib

    import onnxruntime

    digest = hashlib.sha256((engine.path / MANIFEST).read_bytes()).hexdigest()
    version = f"onnxruntime {onnxruntime.__version__}"
    lines = ["qwenport-self-test 1", digest, "cpu", "-", version]
    assert stored["key"] == lines
    name = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    assert file.name == f"{name}.json"


def test_a_failure_forgets_an_earlier_pass(proven: Proofs, faulty: Path, cache: Path) -> None:
    engine = engines.load_engine(faulty)  # its manifest is the healthy engine's
    assert self_test(proven(DENSE).engine.path).passed
    assert has_passed(engine)
    assert not self_test(faulty).passed
    assert not has_passed(engine)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "qwenport-self-test"}', "\0", "[" * 100_000]
)
def test_a_damaged_memory_is_no_pass(proven: Proofs, cache: Path, content: str) -> None:
    engine = proven(DENSE).engine
    assert self_test(engine.path).passed
    (file,) = cache.iterdir()
    file.write_text(content)
    assert not has_passed(engine)


def test_a_pass_that_cannot_be_written_down_is_said_to_be_none(
    proven: Proofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    engine = proven(DENSE).engine
    assert cli.main(["selftest", str(engine.path), "--json"]) == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert facts["passed"] and not facts["remembered"] and not has_passed(engine)
    assert "note: the pass could not be written down" in shown.err


def test_another_runtime_needs_another_pass(
    proven: Proofs, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = proven(DENSE).engine
    assert self_test(engine.path).passed
    monkeypatch.setattr("onnxruntime.__version__", "1.99.0")
    assert not has_passed(engine)


def test_cases_without_room_are_left_out_and_counted(
    proven: Proofs, tmp_path: Path, cache: Path, capsys: Capture
) -> None:
    package = proven(DENSE).package.path
    small = engines.build(
        package, tmp_path / "small", target="onnxruntime", max_seq_len=128, max_batch=2
    )
    found = self_test(small.path)
    names = [
        n for n in proven(DENSE).proof.cases if not re.search(r"full|up to [25]..|[348] rag", n)
    ]
    assert found.passed
    assert (found.cases, found.cases + found.left_out) == (
        len(names),
        len(proven(DENSE).proof.cases),
    )
    assert cli.main(["inspect", str(small.path), "--brief"]) == 0
    assert f"cases, {found.cases} of which fit its batch" in capsys.readouterr().out


def test_an_engine_with_room_for_no_case_is_refused(proven: Proofs, tmp_path: Path) -> None:
    tiny = engines.build(
        proven(DENSE).package.path, tmp_path / "tiny", target="onnxruntime", max_seq_len=2
    )
    with pytest.raises(
        engines.ProofError, match="no case of its proof fits a batch of 8 with 2 slots"
    ):
        self_test(tiny.path)


def test_command_passes_with_0_and_fails_with_1(
    proven: Proofs, faulty: Path, capsys: Capture, cache: Path
) -> None:
    engine = proven(DENSE).engine.path
    assert cli.main(["selftest", str(engine), "-q"]) == 0
    assert re.search(r"passed its self-test: \d+ cases, \d+ comparisons", capsys.readouterr().out)
    assert cli.main(["selftest", str(engine), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] and facts["failures"] == [] and facts["left_out"] == 0
    assert facts["remembered"]
    assert cli.main(["cache", "clear"]) == 0 and has_passed(engines.load_engine(engine))
    assert cli.main(["cache", "list", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out.partition("removed, 0 B\n")[2])["self_tests_passed"] == 1
    )
    assert cli.main(["selftest", str(faulty), "-q"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"FAILED   .*: call \d+, row 0, position \d+ of sequence 0, span 64: error", out
    )
    assert "FAILED its self-test" in out
    assert cli.main(["selftest", str(faulty), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["passed"] and len(facts["failures"]) >= 1
    assert facts["largest_error_of_bound"] > 1


def test_command_refuses_what_has_no_proof(unproven: Path, proven: Proofs, capsys: Capture) -> None:
    assert "carries no proof" in refused(capsys, "selftest", unproven)
    assert "is a package" in refused(capsys, "selftest", proven(DENSE).package.path)
    notes: list[str] = []
    open_session(unproven, note=notes.append)
    assert len(notes) == 1 and "carries no proof" in notes[0]
    assert cli.main(["inspect", str(unproven), "--brief"]) == 0
    assert "proof     none" in capsys.readouterr().out
    assert cli.main(["inspect", str(proven(DENSE).engine.path), "--brief"]) == 0
    assert re.search(r"proof     \d+ cases, \d+ fingerprints", capsys.readouterr().out)


def test_a_changed_proof_of_a_package_stops_a_build(proven: Proofs, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(proven(DENSE).package.path, package)
    manifest = json.loads((package / MANIFEST).read_text())
    exporter.write_json(package / MANIFEST, {**manifest, "qwenport_version": "0"})
    with pytest.raises(engines.ProofError, match="of another package"):
        engines.build(package, tmp_path / "engine", target="onnxruntime")
    assert not (tmp_path / "engine").exists()


def test_a_proof_that_an_engines_manifest_does_not_list_is_refused(
    unproven: Path, proven: Proofs
) -> None:
    shutil.copy(proven(DENSE).engine.path / PROOF, unproven / PROOF)
    with pytest.raises(engines.EngineError, match=r"proof\.safetensors is not in the manifest"):
        engines.load_engine(unproven)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_poison_is_finite_huge_and_of_both_signs(dtype: object) -> None:
    """By torch's own types; even slots are positive."""
    cache = torch.zeros((2, 3, 7, 4), dtype=dtype.torch)
    poison_slots(cache, 1, poison(dtype, 2, 7))
    size = 2.0**12 if dtype == FP16 else 2.0**100
    expected = torch.zeros(2, 3, 7, 4)
    for slot in range(2, 7):
        expected[1, :, slot] = size if slot % 2 == 0 else -size
    assert torch.equal(cache.float(), expected)


def test_poison_fills_the_sessions_own_memory(proven: Proofs) -> None:
    found = proven(DENSE)
    session = found.session.beside(max_batch=2, capacity=9)
    session.prefill([[1, 2, 3], [4]])
    before = {name: session._values(name).copy() for name in session._cache_names()}
    session.poison()
    for name, (address, size) in session.cache_addresses().items():
        values = stand_in_tensorrt.read(address, (2, 2, 9, 32))
        assert values.nbytes == size
        old = before[name.split(".", 1)[1]].view(np.float32)
        for row, held in ((0, 3), (1, 1)):
            assert np.array_equal(values[row, :, :held], old[row, :, :held])
            assert np.all(np.abs(values[row, :, held:]) == 2.0**100)


@pytest.fixture(scope="module")
def on_stand_in(
    engine_of: Callable[[str], engines.Engine], package_of: Callable[[str], exporter.Package]
) -> tuple[engines.TensorRTSession, engines.Proof]:
    """An fp32 TensorRT session of three rows on the stand-in, and its package's proof."""
    package, engine = package_of("fp32"), engine_of("fp32")
    runtime = stand_in_tensorrt.stand_in(engine, package)
    session = engines.TensorRTSession(engine, max_batch=3, tensorrt=runtime, gpu=runtime.gpu)
    return session, make_proof(package, context=130)


def test_tensorrt_session_reproduces_the_proof_on_the_stand_in(
    on_stand_in: tuple[engines.TensorRTSession, engines.Proof],
) -> None:
    session, proof = on_stand_in
    found = run_proof(session, proof, IN_FP32)
    assert found.passed and found.cases >= 10 and found.left_out >= 1


def test_fault_of_a_tensorrt_session_is_caught(
    on_stand_in: tuple[engines.TensorRTSession, engines.Proof],
) -> None:
    session, proof = on_stand_in
    inject(session, stale_graph)
    try:
        assert not run_proof(session, proof, IN_FP32).passed
    finally:
        del session.__dict__["_step"]


def test_a_fault_between_two_runs_does_not_stay(proven: Proofs) -> None:
    """A session that failed is reset, and a healthy one beside it passes."""
    found = proven(DENSE)
    broken, healthy = found.new_session(), found.new_session()
    inject(broken, lost_write)
    assert not run_proof(broken, found.proof, IN_FP32).passed
    assert broken.lengths.sum() == 0 and broken.on_step is None
    assert run_proof(healthy, found.proof, IN_FP32).passed


def test_dtypes_have_a_poison() -> None:
    for dtype in DTYPES.values():
        assert len(poison(dtype, 3, 8)) == 5
        assert poison(dtype, 0, 2).dtype.itemsize == dtype.itemsize


def test_comparisons_whose_bound_proves_nothing_do_not_count(proven: Proofs) -> None:
    """They are made all the same: NaN fails."""
    found = proven(DENSE)
    loose = replace(found.proof, bounds=np.full_like(found.proof.bounds, 0.5))
    healthy = run_proof(found.new_session(), loose, IN_FP32)
    assert healthy.passed and healthy.marks == 0
    session = found.new_session()
    inject(session, one_infinite_logit)
    assert not run_proof(session, loose, IN_FP32).passed
