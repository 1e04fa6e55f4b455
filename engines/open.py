"""One function to run either artefact: a package on onnxruntime, an engine on what it was built for."""

from __future__ import annotations

from pathlib import Path

from qwenport.contract import ONNXRUNTIME, PROOF, Progress, no_progress
from qwenport.engines.engine import load_engine
from qwenport.engines.errors import EngineError, SessionError
from qwenport.engines.kept_model import load_kept
from qwenport.engines.onnxruntime_session import PROVIDERS, OnnxRuntimeSession
from qwenport.engines.saved_session import SavedSession
from qwenport.engines.self_test_passes import has_passed
from qwenport.engines.tensorrt_session import TensorRTSession
from qwenport.exporter import Note, kind_of, load_package


def open_session(
    target: Path | str,
    *,
    max_batch: int = 1,
    capacity: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    require_self_test: bool = False,
    progress: Progress = no_progress,
    note: Note = lambda text: None,
) -> SavedSession:
    """Open a session on a package or an engine directory.

    On the CPU, a package's lowered model is kept in the cache (see `cache_folder`), so that it opens faster next time.

    Args:
        target: a directory written by `export` or `build`.
        max_batch: rows.
        capacity: cache slots per row; the target's max_seq_len by default.
        device: where a package runs, "cpu" or "cuda". Engines run where they were built for.
        threads: onnxruntime: CPU threads of a step; by default its own choice. Ignored for TensorRT.
        require_self_test: refuse an engine that has not passed `qwenport selftest` on this device, driver and runtime.
        progress: called with (what, done, total) while the lowered model is written.
        note: called with a message if it cannot be kept, or if an engine carries no proof.

    Raises:
        PackageError, EngineError: the directory does not match its manifest, cannot run here, or has not passed the
            self-test that is required.
        MissingExtraError: onnxruntime or the engine's TensorRT is not installed.
        SessionError: more rows or slots than the target has.
    """
    target = Path(target)
    if device not in list(PROVIDERS):
        raise SessionError(f"device must be one of {', '.join(PROVIDERS)}, found {device!r:.60}")
    if kind_of(target) == "engine":
        engine = load_engine(target)
        if require_self_test and not has_passed(engine):
            raise EngineError(
                f"{target}: has not passed its self-test here; run qwenport selftest {target}"
            )
        if PROOF not in engine.manifest["files"]:
            note(f"{target} carries no proof: `qwenport selftest` cannot check it on this machine")
        if engine.flavour == ONNXRUNTIME:
            return OnnxRuntimeSession(
                engine, max_batch=max_batch, capacity=capacity, device=device, threads=threads
            )
        return TensorRTSession(engine, max_batch=max_batch, capacity=capacity)
    if require_self_test:
        raise SessionError(f"{target}: a package has no self-test; build an engine of it")
    package = load_package(target)
    if device != "cpu":
        package.check_graph()
        return OnnxRuntimeSession(
            package, max_batch=max_batch, capacity=capacity, device=device, threads=threads
        )
    return OnnxRuntimeSession(
        package,
        max_batch=max_batch,
        capacity=capacity,
        threads=threads,
        load=lambda: load_kept(package, progress, note, threads),
    )
