"""Dual chunk attention in C++: an engine for onnxruntime says what Python's session says, and the oracle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunked import POSITIONS, make_chunked, pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import VOCAB

from qwenport import engines, exporter
from qwenport.contract import INPUT_IDS, MANIFEST, ONNXRUNTIME
from qwenport.engines import SessionError
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession
from qwenport.validate import make_proof, open_target
from qwenport.validate.reference import Reference, Text

from .builds import ROOT, built
from .runtime import Engine, Error, Library

BUNDLED = ROOT / "examples" / "tiny-qwen2.5-1m"
CHUNK, ORIGINAL, ROWS = 32, 70, 3
SETTINGS = {
    "chunk_size": 48,
    "local_size": 48 - CHUNK,
    "original_max_position_embeddings": ORIGINAL,
}
LONG = ORIGINAL + 60
AGREE = 1e-5  # rel-L2 of logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chunked(tmp_path_factory.mktemp("chunked") / "checkpoint", **SETTINGS)


@pytest.fixture(scope="module")
def package(checkpoint: Path) -> exporter.Package:
    return exporter.export(checkpoint, checkpoint.parent / "package", max_batch=ROWS)


@pytest.fixture(scope="module")
def directory(package: exporter.Package) -> Path:
    """Its engine."""
    return engines.build(package.path, package.path.parent / "engine", target=ONNXRUNTIME).path


@pytest.fixture(scope="module")
def changed_manifest(directory: Path, tmp_path_factory) -> Callable[..., Path]:
    """A copy of the engine whose manifest another function has changed."""

    def make(change: Callable[[Any], None]) -> Path:
        path = shutil.copytree(directory, tmp_path_factory.mktemp("changed") / "engine")
        manifest = json.loads((path / MANIFEST).read_text())
        change(manifest)
        (path / MANIFEST).write_text(json.dumps(manifest))
        return path

    return make


@pytest.fixture(scope="module")
def load(release: Path, onnxruntime_library: Path) -> Callable[[Path], Engine]:
    library = Library(release / "runtime" / "libqwenport.so")
    return lambda path: library.load(path, threads=1, onnxruntime=onnxruntime_library)


@pytest.fixture(scope="module")
def ours(load: Any, directory: Path) -> Engine:
    return load(directory)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, package: exporter.Package) -> Reference:
    return Reference(open_target(package.path), checkpoint)


def python(directory: Path, **options: Any) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(engines.load_engine(directory), threads=1, **options)


def tokens(count: int, stream: int = 0) -> list[int]:
    return np.random.default_rng(stream).integers(0, VOCAB, count).tolist()


@given(
    lengths=st.lists(st.integers(1, 6 * CHUNK), min_size=1, max_size=ROWS),
    piece=st.integers(8, 90),
    decodes=st.integers(0, 4),
)
@settings(max_examples=15, deadline=None)
def test_ragged_prompts_in_pieces_and_decoding_are_python_s_and_agree_with_the_oracle(
    ours: Engine,
    directory: Path,
    reference: Reference,
    lengths: list[int],
    piece: int,
    decodes: int,
) -> None:
    session = ours.session(max_batch=len(lengths))
    theirs = python(directory, max_batch=len(lengths))
    texts = [tokens(length + decodes, row) for row, length in enumerate(lengths)]
    last: list[Any] = [None] * len(texts)

    def take(found: list[Any], expected: Any) -> None:
        for row, (logits, right) in enumerate(zip(found, expected, strict=True)):
            if logits is not None:
                np.testing.assert_array_equal(logits, right[-1] if right.ndim == 2 else right)
                last[row] = logits

    for fed in pieces(texts, lengths, piece):
        take(session.prefill(fed, lengths), theirs.prefill(fed, prompt_lengths=lengths))
    for step in range(decodes):
        given = [text[n + step] for text, n in zip(texts, lengths, strict=True)]
        take(session.decode(given), theirs.decode(given))
    for text, n, found in zip(texts, lengths, last, strict=True):
        requests = (n,) * n + tuple(range(n + 1, n + decodes + 1))
        (right,) = reference.logits([Text(tuple(text), (len(text) - 1,), 0, requests)])
        assert np.linalg.norm(found - right[0]) < AGREE * np.linalg.norm(right[0])


@pytest.mark.parametrize("widest", [16, 256])
def test_generations_are_python_s(
    load: Any, changed_manifest: Any, directory: Path, widest: int
) -> None:
    def narrow(manifest: Any) -> None:
        manifest["profiles"][0][INPUT_IDS]["max"][1] = widest

    session = load(changed_manifest(narrow)).session(max_batch=ROWS)
    theirs = python(directory, max_batch=ROWS)
    theirs.max_step_tokens = widest
    prompts = [tokens(LONG), tokens(9), tokens(ORIGINAL - 3)]  # the last one's reply crosses it
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "seed": 4}
    expected = engines.generate(theirs, prompts, engines.GenerateOptions(**options))
    assert session.generate(prompts, **options) == expected


def test_the_bundled_checkpoint_continues_a_long_text_as_in_python(
    load: Any, tmp_path: Path
) -> None:
    package = exporter.export(BUNDLED, tmp_path / "package", max_batch=1)
    directory = engines.build(package.path, tmp_path / "engine", target=ONNXRUNTIME).path
    text = (BUNDLED.parent / "long_tale.txt").read_text(encoding="utf-8").removesuffix("\n")
    prompts = [engines.Tokenizer(BUNDLED).encode(text)]
    options: dict[str, Any] = {"max_new_tokens": 60}
    expected = engines.generate(python(directory), prompts, engines.GenerateOptions(**options))
    assert len(prompts[0]) == 400 and len(expected[0].tokens) == 60
    assert load(directory).session().generate(prompts, **options) == expected


def test_what_python_refuses_is_refused_in_its_words(ours: Engine, directory: Path) -> None:
    text = tokens(LONG)
    session, theirs = ours.session(max_batch=2), python(directory, max_batch=2)

    def refused(rows: list[list[int]], lengths: list[int] | None) -> None:
        with pytest.raises(SessionError) as expected:
            theirs.prefill(rows, prompt_lengths=lengths)
        with pytest.raises(Error) as error:
            session.prefill(rows, lengths)
        assert error.value.kind == "invalid argument"
        assert str(error.value) == str(expected.value)
        assert session.lengths == theirs.lengths.tolist()

    for lengths in ([4, 9], [5, POSITIONS + 1], [0, 9], [-1, 9]):
        refused([text[:5], text[:6]], lengths)
    session.prefill([text])
    theirs.prefill([text])
    for length in (LONG, 50):
        session.truncate(length)
        theirs.truncate(length)
        refused([[5, 6], [7]], None)
        refused([[], [7]], [3, 0])
    session.prefill([text[50:], [7]])  # the same request again, and one of its own
    assert session.lengths == [LONG, 1]
    with pytest.raises(Error, match="reset the row"):
        session.generate([[5]], append=1)


def test_a_snapshot_keeps_the_lengths(ours: Engine) -> None:
    session, other = ours.session(), ours.session(capacity=LONG + 9)
    session.prefill([tokens(LONG)])
    other.restore(session.save())
    np.testing.assert_array_equal(session.decode([9])[0], other.decode([9])[0])
    with pytest.raises(Error, match=f"for a request of {LONG} positions, and this request has"):
        other.prefill([[5]])


def test_narrow_steps_give_the_same_logits(
    load: Any, changed_manifest: Any, directory: Path
) -> None:
    """Of so many heads the scores of a few tokens take the memory that they may take."""

    def many_heads(manifest: Any) -> None:
        manifest["model"]["num_attention_heads"] = 1 << 16

    session = load(changed_manifest(many_heads)).session()
    text = tokens(LONG)
    (made,) = session.prefill([text])
    (right,) = python(directory).prefill([text])
    np.testing.assert_allclose(made, right[0], rtol=0, atol=1e-4)


def test_without_an_original_length_nothing_is_scaled_or_refused(load: Any, tmp_path: Path) -> None:
    plain = {**SETTINGS, "original_max_position_embeddings": 0}
    package = exporter.export(make_chunked(tmp_path / "checkpoint", **plain), tmp_path / "package")
    engine = engines.build(package.path, tmp_path / "engine", target=ONNXRUNTIME).path
    session, text = load(engine).session(), tokens(200)
    session.prefill([text[:150]])
    (made,) = session.prefill([text[150:]])
    theirs = python(engine)
    theirs.prefill([text[:150]])
    np.testing.assert_array_equal(made, theirs.prefill([text[150:]])[0][0])


@pytest.mark.usefixtures("passes")
def test_an_engine_reproduces_its_proof(
    load: Any, package: exporter.Package, tmp_path: Path
) -> None:
    path = tmp_path / "engine"
    engines.build(package.path, path, target=ONNXRUNTIME, make_proof=make_proof)
    report = load(path).self_test()
    assert report.passed and report.marks > 0, report.summary


@pytest.mark.parametrize("sanitizer", ["release", "address", "thread"])
def test_sessions_are_clean_under(
    sanitizer: str, directory: Path, onnxruntime_library: Path
) -> None:
    cases = "a truncated row*,a restored session*,logits of rows*,sessions of one engine*,pieces*"
    suppressions = Path(__file__).parent / "suppressions" / "threads.txt"
    done = subprocess.run(
        [built(sanitizer) / "onnxruntime_sessions", f"--test-case={cases}"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "QWENPORT_ONNXRUNTIME": str(onnxruntime_library),
            "QWENPORT_TEST_ENGINE": str(directory),
            "TSAN_OPTIONS": f"suppressions={suppressions}",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
