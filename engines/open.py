"""One function to run either artefact: a package on onnxruntime, an engine on what it was built for."""

from __future__ import annotations

from pathlib import Path

from qwenport.contract import ONNXRUNTIME
from qwenport.engines.engine import load_engine
from qwenport.engines.onnxruntime_session import OnnxRuntimeSession
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.tensorrt_session import TensorRTSession
from qwenport.exporter import kind_of, load_package


def open_session(
    target: Path | str,
    *,
    max_batch: int = 1,
    capacity: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> SavedSession:
    """Open a session on a package or an engine directory.

    Args:
        target: a directory written by `export` or `build`.
        max_batch: rows.
        capacity: cache slots per row; the target's max_seq_len by default.
        device: where a package runs, "cpu" or "cuda". Engines run where they were built for.
        threads: onnxruntime: CPU threads of a step; by default its own choice. Ignored for TensorRT.

    Raises:
        PackageError, EngineError: the directory does not match its manifest, or cannot run here.
        MissingExtraError: onnxruntime or the engine's TensorRT is not installed.
        SessionError: more rows or slots than the target has.
    """
    target = Path(target)
    if kind_of(target) == "engine":
        engine = load_engine(target)
        if engine.flavour == ONNXRUNTIME:
            return OnnxRuntimeSession(
                engine, max_batch=max_batch, capacity=capacity, threads=threads
            )
        return TensorRTSession(engine, max_batch=max_batch, capacity=capacity)
    package = load_package(target)
    package.check_graph()
    return OnnxRuntimeSession(
        package, max_batch=max_batch, capacity=capacity, device=device, threads=threads
    )
