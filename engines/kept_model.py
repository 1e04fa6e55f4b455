"""The lowered model of a package, kept in the cache: a package then opens as fast as an engine for onnxruntime.

An entry is the graph and the weights that `build --target onnxruntime` would write. Of an fp32 package it is the graph
alone, and the weights stay in the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenport.contract import ENGINE_WEIGHTS, FP32, MANIFEST, MODEL, ONNXRUNTIME, Progress
from qwenport.engines import onnxruntime_builder
from qwenport.engines.cache import (
    CacheError,
    cache_key,
    cached,
    file_state,
    keep,
)
from qwenport.engines.onnxruntime_builder import lower_for_onnxruntime, write_lowered
from qwenport.engines.onnxruntime_session import check_onnxruntime, start_onnxruntime
from qwenport.exporter import ExportError, Note, Package, sha256

_CODE = (Path(onnxruntime_builder.__file__), Path(__file__).parent / "lowering")


def load_kept(
    package: Package, progress: Progress, note: Note, threads: int | None = None
) -> Any | None:
    """The onnxruntime session of a package's lowered model on the CPU; the first time, the model is written.

    The graph is compared with the package then (`Package.check_graph`). Later it needs no comparison: the key of the
    entry has a hash of every file of the package except the weights, whose headers the manifest has.

    Returns:
        None if the model cannot be kept, or is not: an engine's products by codes round activations to int8, and a
        package's do not.

    Raises:
        PackageError, LoweringError: the package is damaged.
        MissingExtraError, SessionError: there is no usable onnxruntime.
    """
    quantization = package.config.quantization
    if quantization is not None and quantization.has_integers:
        note(
            f"{package.path} is dequantized each time it is opened; an engine multiplies by its codes: "
            f"qwenport build {package.path} ENGINE --target {ONNXRUNTIME}"
        )
        return None
    check_onnxruntime("cpu")  # otherwise it would look like damage of the entry
    key, by_reference = _key(package), package.dtype == FP32.name

    def start(entry: Path) -> Any:
        folder = package.path if by_reference else entry
        return start_onnxruntime((entry / MODEL).read_bytes(), folder, threads=threads)

    session = cached(key, start)
    if session is not None:
        return session
    package.check_graph()
    file = None if by_reference else ENGINE_WEIGHTS
    model, weights = lower_for_onnxruntime(package, package.max_seq_len, file)
    needed = sum(weight.entry.length for weight in weights) + 2 * package.model.stat().st_size
    try:
        keep(
            key,
            lambda folder: write_lowered(package, folder, model, weights, progress),
            of=str(package.path.absolute()),
            size_bytes=needed,
        )
    except (CacheError, ExportError, OSError) as error:
        session = cached(key, start)  # another process may have been faster
        if session is None:
            why = (
                f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            )
            note(
                f"{package.path} will open as slowly next time, its lowered model cannot be kept: {why}"
            )
        return session
    return cached(key, start)


def _key(package: Package) -> str:
    """A key that changes with the package, and with the code that lowers it.

    The manifest has a hash of every file but the weight files, of which it knows the headers only. Those are
    recognised by their inodes and times.
    """
    weights = [
        (name, *file_state(package.path / name))
        for name in sorted(package.manifest["weights"]["files"])
    ]
    return cache_key("model", sha256(package.path / MANIFEST), weights, code=_CODE)
