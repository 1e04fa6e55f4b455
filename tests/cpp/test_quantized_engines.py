"""Engines of quantized packages in the C++ library: they run as any other, and say what their weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwenport import engines, exporter
from qwenport.contract import ONNXRUNTIME
from qwenport.engines import OnnxRuntimeSession
from qwenport.validate import keep_proof

from .builds import ROOT
from .runtime import Library

BUNDLED = ROOT / "examples" / "quantized"
WORDS = {
    "awq": b"4 bits in groups of 32, asymmetric",
    "gptq-act-order": b"4 bits in groups of 32, symmetric",
    "gptq-mixture": b"4 bits in groups of 32, symmetric",
    "w8a16": b"8 bits per row, symmetric",
    "fp8-dynamic": b"FP8 per row, dynamic activations",
}
"""Bundled checkpoint -> what its engine says of its weights."""
PROMPTS = [list(range(100, 170)), [7], list(range(300, 333))]
KERNELS = 0.02
"""Of logits: without prepacked weights onnxruntime multiplies with other kernels, whose activations stay in fp32."""


@pytest.fixture(scope="module")
def library(release: Path) -> Library:
    """The real library, not the stand-in's."""
    return Library(release / "runtime" / "libqwenport.so")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], engines.Engine]:
    """Bundled checkpoint -> an engine that carries a proof."""
    folder, known = tmp_path_factory.mktemp("quantized"), dict[str, engines.Engine]()

    def make(scheme: str) -> engines.Engine:
        if scheme not in known:
            package = exporter.export(BUNDLED / scheme, folder / f"{scheme}.package")
            keep_proof(package)
            known[scheme] = engines.build(
                package.path, folder / f"{scheme}.engine", target=ONNXRUNTIME, max_batch=3
            )
        return known[scheme]

    return make


@pytest.mark.parametrize("scheme", WORDS)
def test_an_engine_says_what_its_weights_are(
    scheme: str, made: Callable[[str], engines.Engine], library: Library, onnxruntime_library: Path
) -> None:
    engine = library.load(made(scheme).path, onnxruntime=onnxruntime_library)
    info = engine.info()
    activations = b"fp8" if scheme == "fp8-dynamic" else b"int8"
    assert (info.dtype, info.weights, info.activations) == (b"fp32", WORDS[scheme], activations)


@pytest.mark.parametrize("scheme", WORDS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("mode", "tolerance"), [("fast_steps", 0), ("fast_start", KERNELS)])
def test_the_same_logits_as_python(
    scheme: str,
    threads: int,
    mode: str,
    tolerance: float,
    made: Callable[[str], engines.Engine],
    library: Library,
    onnxruntime_library: Path,
) -> None:
    engine = made(scheme)
    options = {"threads": threads, "onnxruntime": onnxruntime_library, "load": mode}
    session = library.load(engine.path, **options).session(max_batch=3, capacity=150)
    theirs = OnnxRuntimeSession(engine, max_batch=3, capacity=150, threads=threads)
    found = [np.stack(session.prefill(PROMPTS))]
    wanted = [np.stack([rows[-1] for rows in theirs.prefill(PROMPTS)])]
    for step in range(20):
        tokens = [step + 10, step, 4 * step]
        found.append(np.stack(session.decode(tokens)))
        wanted.append(np.stack(theirs.decode(tokens)))
    ours, right = np.concatenate(found), np.concatenate(wanted)
    assert np.linalg.norm(ours - right) <= tolerance * np.linalg.norm(right)


@pytest.mark.parametrize("scheme", WORDS)
@pytest.mark.parametrize("mode", ["fast_steps", "fast_start"])
def test_the_self_test_passes(
    scheme: str,
    mode: str,
    made: Callable[[str], engines.Engine],
    library: Library,
    onnxruntime_library: Path,
    passes: Path,
) -> None:
    engine = library.load(made(scheme).path, onnxruntime=onnxruntime_library, load=mode)
    report = engine.self_test()
    assert report.passed and report.marks > 20
