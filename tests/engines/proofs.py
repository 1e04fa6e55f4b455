"""Proofs of the bundled checkpoints and engines that carry them, made once a test session and only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwenport import engines, exporter
from qwenport.validate import keep_proof

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = "tiny-qwen2.5", "tiny-qwen2-moe"


@dataclass(frozen=True)
class Proven:
    """A package with a proof, and an onnxruntime engine that carries it."""

    package: exporter.Package
    engine: engines.Engine
    proof: engines.Proof
    session: engines.OnnxRuntimeSession

    def new_session(self) -> engines.OnnxRuntimeSession:
        """A session over the loaded engine, with as much room as it has."""
        manifest = self.engine.manifest
        return self.session.beside(
            max_batch=manifest["max_batch"], capacity=manifest["max_seq_len"]
        )


@pytest.fixture(scope="session")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Proven]:
    """checkpoint -> its package, engine and proof. Tests must not change them."""
    folder, made = tmp_path_factory.mktemp("proven"), {}

    def make(checkpoint: str) -> Proven:
        if checkpoint not in made:
            package = exporter.export(
                EXAMPLES / checkpoint, folder / f"{checkpoint}.package", weights="copy"
            )
            assert keep_proof(package).note is None
            engine = engines.build(
                package.path, folder / f"{checkpoint}.engine", target="onnxruntime"
            )
            proof = engines.engine_proof(engine)
            assert proof is not None
            session = engines.OnnxRuntimeSession(engine, capacity=1, threads=1)
            made[checkpoint] = Proven(package, engine, proof, session)
        return made[checkpoint]

    return make
