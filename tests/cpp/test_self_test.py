"""`Engine::self_test` through the C API: engines in onnxruntime, healthy and faulty, and what a report says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from qwenport import engines, exporter
from qwenport.contract import MANIFEST, MODEL, ONNXRUNTIME
from qwenport.engines import OnnxRuntimeSession
from qwenport.validate import keep_proof

from . import proofs
from .builds import ROOT
from .proofs import change, toy_with
from .runtime import Engine, Error, Library

pytestmark = pytest.mark.usefixtures("passes")
every_checkpoint = pytest.mark.parametrize("name", ["tiny-qwen2.5", "tiny-qwen2-moe"])


@pytest.fixture(scope="module")
def directory_of(
    tmp_path_factory, package_of: Callable[[str], exporter.Package]
) -> Callable[[str], Path]:
    """Name of a bundled checkpoint -> its engine with a small proof, whose logits are those of Python's session."""
    folder, made = tmp_path_factory.mktemp("onnxruntime"), dict[str, Path]()

    def make(name: str) -> Path:
        if name not in made:
            made[name] = path = folder / name
            engines.build(package_of(name).path, path, target=ONNXRUNTIME)
            session = OnnxRuntimeSession(package_of(name), threads=1)

            def logits(tokens: list[int]) -> Any:
                session.reset()
                return session.prefill([tokens])[0][-1]

            draw = np.random.default_rng(1)
            vocab = package_of(name).manifest["model"]["vocab_size"]
            texts = [draw.integers(0, vocab, n).tolist() for n in (140, 20, 20)]
            cases = proofs.small_cases(texts)
            tensors = proofs.tensors_of(logits, texts, cases, 1e-4)
            metadata = proofs.metadata_of(cases, vocab, proofs.package_of(path))
            proofs.put_proof(path, proofs.write(tensors, metadata))
        return made[name]

    return make


@pytest.fixture(scope="module")
def load(release: Path, onnxruntime_library: Path) -> Callable[..., Engine]:
    library = Library(release / "runtime" / "libqwenport.so")

    def make(directory: Path, **options) -> Engine:
        return library.load(directory, threads=1, onnxruntime=onnxruntime_library, **options)

    return make


@every_checkpoint
@pytest.mark.parametrize("mode", ["fast_steps", "fast_start"])
def test_a_healthy_engine_passes(load, directory_of, name: str, mode: str) -> None:
    engine = load(directory_of(name), load=mode)
    assert engine.info().has_proof == 1
    report = engine.self_test()
    assert report.passed == 1, report.summary
    assert (report.cases, report.skipped, report.steps, report.marks) == (4, 1, 19, 24)
    assert report.summary.startswith(b"self-test passed: 4 cases (1 left out), 24 rows of logits")


def _wrong_scale(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.op_type == "Attention")
    next(a for a in node.attribute if a.name == "scale").f *= 1.05


def _reads_past_the_length(graph: onnx.GraphProto) -> None:
    index, mask = next((i, n) for i, n in enumerate(graph.node) if n.op_type == "LessOrEqual")
    graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.INT64, [], [1]))
    graph.node.insert(index, helper.make_node("Add", [mask.input[1], "one"], ["later"]))
    graph.node[index + 1].input[1] = "later"


def _keys_for_values(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.op_type == "Attention")
    node.input[2] = node.input[1]


def _wrong_epsilon(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.op_type == "RMSNormalization")
    next(a for a in node.attribute if a.name == "epsilon").f = 0.01


def _missing_bias(graph: onnx.GraphProto) -> None:
    at = next(i for i, n in enumerate(graph.node) if n.output[0].endswith("q_proj.Add"))
    bias = graph.node[at]
    graph.node[at].CopyFrom(helper.make_node("Identity", [bias.input[0]], list(bias.output)))


FAULTS = [_wrong_scale, _reads_past_the_length, _keys_for_values, _wrong_epsilon, _missing_bias]


@every_checkpoint
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_graph_is_caught(load, directory_of, tmp_path: Path, name: str, fault) -> None:
    path = Path(shutil.copytree(directory_of(name), tmp_path / "engine"))
    model = onnx.load(path / MODEL, load_external_data=False)
    fault(model.graph)
    data = model.SerializeToString()
    (path / MODEL).write_bytes(data)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][MODEL] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))
    engine = load(path, require_self_test=True)
    report = engine.self_test()
    assert report.passed == 0
    assert not report.error <= report.bound  # it may be infinite
    assert report.summary.startswith(b"self-test failed in case")
    with pytest.raises(
        Error, match=r"engine: failed its self-test, and .*require_self_test is set$"
    ):
        engine.session()


@pytest.fixture(scope="module")
def proven_of(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a bundled checkpoint -> its engine with the proof that Python makes."""
    folder, made = tmp_path_factory.mktemp("proven"), dict[str, Path]()

    def make(name: str) -> Path:
        if name not in made:
            package = exporter.export(ROOT / "examples" / name, folder / f"{name}.package")
            assert keep_proof(package).note is None
            made[name] = engines.build(package.path, folder / name, target=ONNXRUNTIME).path
        return made[name]

    return make


@pytest.mark.parametrize("name", ["tiny-qwen2.5", "tiny-qwen2-moe", "tiny-qwen2.5-1m"])
def test_what_python_makes_passes_as_in_python(load, proven_of, name: str) -> None:
    """The same cases and rows of logits; a pass here is a pass there, and the other way round."""
    path = proven_of(name)
    with pytest.raises(engines.EngineError, match="has not passed its self-test here"):
        engines.open_session(path, require_self_test=True)
    report = load(path).self_test()
    assert report.passed == 1, report.summary
    engines.open_session(path, require_self_test=True)

    theirs = engines.self_test(path)
    assert (report.cases, report.skipped, report.marks) == (
        theirs.cases,
        theirs.left_out,
        theirs.marks,
    )


def test_a_pass_of_python_counts(load, proven_of) -> None:
    path = proven_of("tiny-qwen2.5")
    with pytest.raises(Error, match="has not passed its self-test on this machine"):
        load(path, require_self_test=True).session()
    engines.self_test(path)
    load(path, require_self_test=True).session()


# What a proof says is what is compared


@pytest.mark.parametrize(
    ("tensor", "index", "by"),
    [
        ("top_values", (7, 31), 0.01),
        ("projections", (3, 63), 0.5),
        ("norms", (0,), 0.0),
        ("tokens", (2,), 1),
    ],
)
def test_a_number_that_differs_is_found(
    library: Library, toy_proof, tmp_path: Path, tensor: str, index, by
) -> None:
    tensors, metadata = toy_proof
    changed = proofs.write(change(tensors, tensor, index, by), metadata)
    report = library.load(toy_with(library, tmp_path / "toy", changed)).self_test()
    assert report.passed == (by == 0)


def test_a_failure_is_located(library: Library, toy_proof, tmp_path: Path) -> None:
    tensors, metadata = toy_proof
    mark = tensors["marks"].tolist().index([2, 2])  # of "ragged rows", after 2 + 4 + 5 + ... calls
    changed = proofs.write(change(tensors, "top_values", (mark, 0), 1.0), metadata)
    report = library.load(toy_with(library, tmp_path / "toy", changed)).self_test()
    operations = tensors["operations"].tolist()
    (call,) = (o[1] for o in operations if o[2] == proofs.FEED and o[4:] == [2, 2])
    assert (report.passed, report.case_name) == (0, b"ragged rows")
    assert (report.call, report.row, report.position, report.span) == (call, 2, 1, 64)
    values = tensors["top_values"][mark].astype(float)
    values[0] += 1
    assert report.error == pytest.approx(1 / np.linalg.norm(values), rel=1e-5)
    assert report.bound == pytest.approx(1e-6)
    assert report.summary.decode() == (
        f'self-test failed in case "ragged rows", call {call}: row 2, position 1, span 64: '
        f"error {report.error:.3g}, allowed is 1e-06"
    )
