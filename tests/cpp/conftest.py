"""The runtime's release build, and packages and engines of the bundled checkpoints."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenport import engines, exporter
from qwenport.contract import MANIFEST

from . import proofs
from .builds import ROOT, built
from .runtime import Library
from .toy import VOCAB, toy_directory, toy_logits


@pytest.fixture(scope="session")
def release() -> Path:
    """The release build."""
    return built("release")


@pytest.fixture(scope="session")
def library(release: Path) -> Library:
    """The runtime on the stand-in."""
    return Library(release / "libqwenport_stand_in.so")


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    """The library in the wheel of the Python environment."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    (found,) = (Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")
    return found


@pytest.fixture(scope="session")
def package_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], exporter.Package]:
    """Name of a bundled checkpoint -> its fp32 package."""
    folder, made = tmp_path_factory.mktemp("packages"), {}

    def make(name: str) -> exporter.Package:
        if name not in made:
            made[name] = exporter.export(ROOT / "examples" / name, folder / name, dtype="fp32")
        return made[name]

    return make


@pytest.fixture(scope="session")
def engine_of(
    tmp_path_factory: pytest.TempPathFactory, package_of: Callable[[str], exporter.Package]
) -> Callable[[str], engines.Engine]:
    """Name of a bundled checkpoint -> a TensorRT-RTX engine of its fp32 package."""
    folder, made = tmp_path_factory.mktemp("engines"), {}

    def make(name: str) -> engines.Engine:
        if name not in made:
            made[name] = engines.build(
                package_of(name).path, folder / name, target="tensorrt-rtx", max_batch=3
            )
        return made[name]

    return make


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where self-tests that passed are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwenport" / "self-tests"


@pytest.fixture(scope="session")
def toy_proof(library: Library, tmp_path_factory) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a proof of the toy network."""
    manifest = (toy_directory(library, tmp_path_factory.mktemp("toy")) / MANIFEST).read_text()
    cases = proofs.small_cases(proofs.TOY_TEXTS)
    tensors = proofs.tensors_of(
        lambda tokens: toy_logits(library, manifest, tokens), proofs.TOY_TEXTS, cases, 1e-6
    )
    return tensors, proofs.metadata_of(cases, VOCAB, proofs.PACKAGE)


@pytest.fixture
def toy(library: Library, toy_proof, tmp_path: Path) -> Path:
    """A toy engine that carries its proof."""
    return proofs.toy_with(library, tmp_path / "toy", proofs.write(*toy_proof))


@pytest.fixture
def time_limit() -> Iterator[None]:
    """Interrupts a system call that waits for 30 seconds."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
