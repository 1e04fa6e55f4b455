"""`Engine::self_test` through the C API: engines in onnxruntime, damaged proofs, and the memory of passes."""

from __future__ import annotations

import ctypes as c
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from qwenport import engines, exporter
from qwenport.contract import MANIFEST, MODEL, ONNXRUNTIME, PROOF
from qwenport.engines import OnnxRuntimeSession
from qwenport.validate import keep_proof

from . import proofs
from .builds import ROOT, built, run
from .runtime import Engine, Error, Library
from .toy import VOCAB, toy_directory, toy_logits

every_checkpoint = pytest.mark.parametrize("name", ["tiny-qwen2.5", "tiny-qwen2-moe"])
FUZZ_RUNS = 30_000
TOY_TEXTS = [[(3 + i * i) % VOCAB for i in range(140)], [*range(20)], [*range(40, 60)]]
PACKAGE = "a" * 64


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where passes are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwenport" / "self-tests"


@pytest.fixture(scope="module")
def toy_proof(library: Library, tmp_path_factory) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a proof of the toy network."""
    manifest = (toy_directory(library, tmp_path_factory.mktemp("toy")) / MANIFEST).read_text()
    cases = proofs.small_cases(TOY_TEXTS)
    tensors = proofs.tensors_of(
        lambda tokens: toy_logits(library, manifest, tokens), TOY_TEXTS, cases, 1e-6
    )
    return tensors, proofs.metadata_of(cases, VOCAB, PACKAGE)


@pytest.fixture
def toy(library: Library, toy_proof, tmp_path: Path) -> Path:
    """A toy engine that carries its proof."""
    return toy_with(library, tmp_path / "toy", proofs.write(*toy_proof))


def toy_with(library: Library, folder: Path, proof: bytes) -> Path:
    toy_directory(library, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["package"] = {"manifest_sha256": PACKAGE}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    proofs.put_proof(folder, proof)
    return folder


# Engines in onnxruntime


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
            assert keep_proof(package) is None
            made[name] = engines.build(package.path, folder / name, target=ONNXRUNTIME).path
        return made[name]

    return make


@every_checkpoint
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


def change(tensors: dict[str, Any], name: str, index: tuple[int, ...], by: float) -> dict[str, Any]:
    changed = tensors[name].copy()
    changed[index] += by
    return {**tensors, name: changed}


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


# Damaged proofs


def complaint(library: Library, directory: Path) -> str:
    with pytest.raises(Error) as error:
        library.load(directory).self_test()
    assert error.value.kind == "bad engine"
    assert "\n" not in str(error.value)
    return str(error.value)


OPERATIONS = ("case", "call", "kind", "row", "sequence", "end")


@pytest.mark.parametrize(
    ("tensor", "index", "value", "expected"),
    [
        ("tokens", (0,), VOCAB, "tokens is not inside the vocabulary of 97"),
        ("tokens", (0,), -1, "tokens is not inside"),
        ("sequences", (2, 1), 21, "sequences is not inside tokens"),
        ("sequences", (0, 0), -1, "sequences is not inside tokens"),
        ("sequences", (1, 1), 0, "sequences is not inside tokens"),
        ("marks", (0, 0), 3, "marks is not inside sequences"),
        ("marks", (0, 1), 0, "marks is not inside sequences"),
        ("marks", (0, 1), 2, "marks is not without a pair that occurs twice"),
        ("top_ids", (0, 0), VOCAB, "top_ids is not inside the vocabulary"),
        ("top_values", (0, 0), np.inf, "top_values is not finite"),
        ("norms", (0,), -1, "norms is not finite and large enough"),
        ("projections", (0, 0), np.nan, "projections is not finite"),
        ("bounds", (0, 1), 0, "bounds is not finite and large enough"),
        ("operations", (0, 2), 1, "operations: a case that is not the next"),
        ("operations", (0, 3), 0, "operations: a case without rows or slots"),
        ("operations", (1, 0), 1, "operations: a case that is not the next"),
        ("operations", (1, 1), 0, "operations: a call that is not the next"),
        ("operations", (1, 2), 5, "operations: no such kind"),
        ("operations", (1, 3), 1, "operations: a row of another case"),
        ("operations", (1, 4), 3, "operations: no such sequence"),
        ("operations", (1, 5), 13, "operations: an end outside the row"),
        ("operations", (2, 4), 1, "a sequence that does not begin with what its row holds"),
    ],
)
def test_what_is_wrong_in_a_proof_is_said(
    library: Library, toy_proof, tmp_path: Path, tensor: str, index, value, expected: str
) -> None:
    tensors, metadata = toy_proof
    changed = tensors[tensor].copy()
    changed[index] = value
    proof = proofs.write({**tensors, tensor: changed}, metadata)
    toy = toy_with(library, tmp_path / "toy", proof)
    assert expected in complaint(library, toy)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("format", "other", "format is not qwenport-proof"),
        ("format_version", "2", "qwenport-proof format version 2, this runtime reads 1; build"),
        ("vocab_size", "98", "vocab_size is not 97"),
        ("dtype", "int8", "dtype is not one that a package has"),
        ("cases", "[]", "cases is not a list of names"),
        ("cases", '["a", "b\\n", "c", "d", "e"]', "cases is not a list of names"),
        ("cases", '["a"]', "cases is not a name for each case"),
        ("package_sha256", "b" * 64, "of another package; build the engine again"),
        ("made_by", None, "no made_by in __metadata__"),
        ("more", "", "__metadata__ has keys of another format"),
    ],
)
def test_what_is_wrong_in_the_metadata_is_said(
    library: Library, toy_proof, tmp_path: Path, key: str, value: str | None, expected: str
) -> None:
    tensors, metadata = toy_proof
    metadata = {k: v for k, v in {**metadata, key: value}.items() if v is not None}
    toy = toy_with(library, tmp_path / "toy", proofs.write(tensors, metadata))
    assert expected in complaint(library, toy)


def test_tensors_must_be_those_of_the_format(library: Library, toy_proof, tmp_path: Path) -> None:
    tensors, metadata = toy_proof
    without = {name: tensor for name, tensor in tensors.items() if name != "norms"}
    for changed, expected in (
        (without, "no norms"),
        ({**tensors, "more": np.zeros(3, np.float32)}, "tensors that do not belong there"),
        ({**tensors, "norms": tensors["norms"].astype(np.float64)}, "norms is not of dtype F32"),
        ({**tensors, "norms": tensors["norms"][:, None]}, "norms is not of one dimension"),
        ({**tensors, "top_ids": tensors["top_ids"][:, 1:]}, "top_ids is not of 32 columns"),
        ({**tensors, "bounds": tensors["bounds"][1:]}, "its marks differ in number"),
    ):
        toy = toy_with(library, tmp_path / "toy", proofs.write(changed, metadata))
        assert expected in complaint(library, toy)


@given(data=st.data())
def test_any_cut_or_byte_that_differs_is_refused(
    library: Library, toy_proof, tmp_path_factory, data
) -> None:
    """By the manifest's hash; and if that is right, too, the header is read with care."""
    proof = proofs.write(*toy_proof)
    at = data.draw(st.integers(0, len(proof) - 1))
    damaged = proof[:at] + data.draw(
        st.sampled_from([b"", bytes([proof[at] ^ 1]) + proof[at + 1 :]])
    )
    folder = tmp_path_factory.mktemp("damaged")
    toy = toy_with(library, folder, proof)
    (toy / PROOF).write_bytes(damaged)
    text = complaint(library, toy)
    assert f"{PROOF}: " in text and ("changed since" in text or "the manifest says" in text)
    if len(damaged) < len(proof):
        proofs.put_proof(toy, damaged)
        assert "damaged: " in complaint(library, toy)


@pytest.mark.usefixtures("time_limit")
def test_a_proof_that_is_listed_must_be_a_file(library: Library, toy: Path) -> None:
    (toy / PROOF).rename(toy / "elsewhere")
    for make, expected in (
        (lambda: None, "cannot be read: No such file or directory"),
        (lambda: (toy / PROOF).symlink_to(toy / "elsewhere"), "a symbolic link; an engine"),
        (lambda: os.mkfifo(toy / PROOF), "not a regular file"),
    ):
        (toy / PROOF).unlink(missing_ok=True)
        make()
        with pytest.raises(Error, match=expected) as error:
            library.load(toy)
        assert error.value.kind == "bad engine"


def test_no_bytes_of_a_proof_do_harm(toy_proof, tmp_path: Path) -> None:
    """A short run of the fuzz target under ASan and UBSan; its inputs have no length before the header."""
    proof = proofs.write(*toy_proof)
    length = int.from_bytes(proof[:8], "little")
    file = tmp_path / "proof"
    file.write_bytes(proof[8 : 8 + length] + b"\n" + proof[8 + length :])
    done = run(built("address") / "fuzz_proof", FUZZ_RUNS, file)
    assert f"{FUZZ_RUNS} runs" in done.stdout


# Passes


def key_of(directory: Path) -> list[str]:
    """Of the toy engine on the stand-in, from docs/reference/proof.md."""
    manifest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    return ["qwenport-self-test 1", manifest, "GPU-stand-in", "1.0", "tensorrt 10.14.1.48"]


def file_of(memory: Path, key: list[str]) -> Path:
    name = hashlib.sha256("".join(f"{line}\n" for line in key).encode()).hexdigest()
    return memory / f"{name}.json"


def refusal(engine: Engine) -> str:
    with pytest.raises(Error) as error:
        engine.session()
    assert error.value.kind == "not proven"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_the_option_sessions_need_no_pass(library: Library, toy: Path) -> None:
    library.load(toy).session().prefill([[1]])


def test_sessions_are_refused_until_a_pass(library: Library, toy: Path, memory: Path) -> None:
    engine = library.load(toy, require_self_test=True)
    assert refusal(engine) == (
        f"{toy}: has not passed its self-test on this machine, and EngineOptions::require_self_test is "
        "set; call Engine::self_test, or run `qwenport selftest`"
    )
    report = engine.self_test()
    assert (report.passed, report.remembered) == (1, 1)
    engine.session().prefill([[1]])
    library.load(toy, require_self_test=True).session()  # remembered, for other processes too
    (file,) = memory.iterdir()
    assert file == file_of(memory, key_of(toy))
    assert json.loads(file.read_text()) == {
        "format": "qwenport-self-test",
        "format_version": 1,
        "key": key_of(toy),
        "cases": 4,
        "left_out": 1,
        "marks": 24,
    }


def test_a_pass_is_for_one_engine(library: Library, toy: Path, toy_proof, tmp_path: Path) -> None:
    library.load(toy).self_test()
    tensors, metadata = toy_proof
    bounds = {**tensors, "bounds": tensors["bounds"] * 2}
    other = toy_with(library, tmp_path / "other", proofs.write(bounds, metadata))
    assert "has not passed its self-test" in refusal(library.load(other, require_self_test=True))


def test_a_failure_forgets_a_pass(
    library: Library, toy_proof, tmp_path: Path, memory: Path
) -> None:
    tensors, metadata = toy_proof
    wrong = proofs.write(change(tensors, "top_values", (0, 0), 1.0), metadata)
    toy = toy_with(library, tmp_path / "toy", wrong)
    file = file_of(memory, key_of(toy))
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(pass_of(key_of(toy))))
    engine = library.load(toy, require_self_test=True)
    engine.session()
    assert engine.self_test().passed == 0
    assert not file.exists()
    assert "failed its self-test" in refusal(engine)
    assert "has not passed" in refusal(library.load(toy, require_self_test=True))


def pass_of(key: list[str]) -> dict[str, Any]:
    return {
        "format": "qwenport-self-test",
        "format_version": 1,
        "key": key,
        "cases": 4,
        "left_out": 0,
        "marks": 10,
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"format": "other"},
        {"format_version": 2},
        {"format_version": "1"},
        {"key": ["a", "b", "c", "d", "e"]},
        {"key": []},
        {"cases": 0},
        {"cases": -1},
        {"cases": "4"},
        {"left_out": 1.5},
        {"marks": 0},
        {"marks": 2**40},
        {"more": 1},
    ],
)
def test_a_pass_that_is_not_exactly_one_does_not_count(
    library: Library, toy: Path, memory: Path, changed: dict[str, Any]
) -> None:
    file = file_of(memory, key_of(toy))
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(pass_of(key_of(toy)) | changed))
    refusal(library.load(toy, require_self_test=True))


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "link", "pipe", "directory"])
def test_no_file_in_a_pass_s_place_counts(
    library: Library, toy: Path, memory: Path, content: str
) -> None:
    file = file_of(memory, key_of(toy))
    file.parent.mkdir(parents=True)
    if content == "link":
        (memory / "elsewhere").write_text(json.dumps(pass_of(key_of(toy))))
        file.symlink_to(memory / "elsewhere")
    elif content == "pipe":
        os.mkfifo(file)
    elif content == "directory":
        file.mkdir()
    else:
        file.write_text(content)
    engine = library.load(toy, require_self_test=True)
    refusal(engine)
    assert engine.self_test().remembered == (content != "directory")
    engine.session()


@pytest.mark.parametrize("home", ["", "relative", "/proc/nowhere"])
def test_without_a_place_to_remember_it_a_pass_counts_for_its_engine(
    library: Library, toy: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", home)
    engine = library.load(toy, require_self_test=True)
    report = engine.self_test()
    assert (report.passed, report.remembered) == (1, 0)
    engine.session()
    refusal(library.load(toy, require_self_test=True))


def test_the_default_place_is_in_the_home_directory(
    library: Library, toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert library.load(toy).self_test().remembered == 1
    memory = tmp_path / "home" / ".cache" / "qwenport" / "self-tests"
    assert [*memory.iterdir()] == [file_of(memory, key_of(toy))]


def test_an_engine_without_a_proof_says_so(library: Library, tmp_path: Path) -> None:
    toy = toy_directory(library, tmp_path / "toy")
    engine = library.load(toy, require_self_test=True)
    assert engine.info().has_proof == 0
    advice = "run `qwenport validate` on its package and build it again"
    assert refusal(engine) == (
        f"{toy}: carries no proof, which EngineOptions::require_self_test needs; {advice}"
    )
    with pytest.raises(Error) as error:
        engine.self_test()
    assert error.value.kind == "not proven"
    assert str(error.value) == f"{toy}: carries no proof; {advice}"


def test_a_report_that_is_null_is_refused(library: Library, toy: Path) -> None:
    engine = library.load(toy)
    assert library.c.qwenport_engine_self_test(engine.handle, None) == 1
    assert library.c.qwenport_last_error() == b"report is NULL"
    assert library.c.qwenport_engine_self_test(None, c.create_string_buffer(1024)) == 1
