"""Is the package what the exporter makes from this checkpoint? Compares bytes and nodes, before any arithmetic.

An exact comparison has no threshold: every difference is named. It also decides whether the package may be run at all:
one whose model.onnx points outside its directory may not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport import __version__
from qwenport.contract import (
    BY_ONNX,
    DTYPES,
    ENGINE,
    ENGINE_WEIGHTS,
    MODEL,
    WEIGHT_MODES,
    Progress,
    is_past,
    no_progress,
)
from qwenport.exporter import (
    COMPANIONS,
    Checkpoint,
    ExportError,
    Package,
    as_dual_chunk,
    describe_graph,
    expected_model,
    open_checkpoint,
)
from qwenport.validate.report import Check, ScenarioResult, Status
from qwenport.validate.rope_check import TABLES
from qwenport.validate.target import Target

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

WEIGHTS, GRAPH, FILES = "weights", "graph", "files"
SUMMARIES = {
    WEIGHTS: "Every byte of every weight against the checkpoint's",
    GRAPH: "model.onnx, node for node, against what this version of the exporter writes",
    FILES: "Companion files, the manifest and paths against the checkpoint, the graph and the directory",
}
IN_THE_PLAN = "it is inside the engine's plan, which only its logits show"


@dataclass(frozen=True)
class Identity:
    """The result of the byte-for-byte comparison.

    Attributes:
        rows: "weights", "graph" and "files".
        weights_sha256: weight file -> hex SHA-256, as `sha256sum` prints it: the checkpoint's files by name, and the
            package's files with other bytes as "weights/NAME".
        safe: model.onnx stays inside its directory. If not, nothing of the package may be run.
    """

    rows: tuple[ScenarioResult, ...]
    weights_sha256: dict[str, str]
    safe: bool


def check_identity(
    target: Target,
    checkpoint_path: Path,
    progress: Progress = no_progress,
) -> Identity:
    """Compare a package, or an engine's companion files, with the checkpoint it claims as its source.

    Args:
        target: the target to judge.
        checkpoint_path: the checkpoint directory.
        progress: called with (what, bytes done, bytes in all), one call at a time but from any thread.

    Raises:
        ConfigError, CheckpointError: not a checkpoint.
        ValidationError: model.onnx cannot be read.
    """
    checkpoint = open_checkpoint(
        checkpoint_path, target.rope_scaling, max_seq_len=target.rope_length, merged=target.merged
    )
    if target.judged_as == ENGINE or target.package is None:
        return _engine(target, checkpoint, progress)
    return _package(target.package, checkpoint, progress)


def _engine(target: Target, checkpoint: Checkpoint, progress: Progress) -> Identity:
    from qwenport.validate.weights_identity import hash_checkpoint

    if target.for_onnxruntime is not None:
        return _onnxruntime_engine(target, checkpoint, progress)
    begun = time.perf_counter()
    files = _row(FILES, begun, (_companions(target.path, checkpoint.path),))
    rows = (_row(WEIGHTS, begun, reason=IN_THE_PLAN), _row(GRAPH, begun, reason=IN_THE_PLAN), files)
    return Identity(rows, hash_checkpoint(checkpoint, progress), True)


def _onnxruntime_engine(target: Target, checkpoint: Checkpoint, progress: Progress) -> Identity:
    from qwenport.validate.model_file import check_places, read_model
    from qwenport.validate.weights_identity import compare_engine_weights

    begun = time.perf_counter()
    model = read_model(target.path / MODEL)
    check_places(model, target.path)
    outside = _outside(model, target.path)
    dtype = DTYPES[target.dtype]
    compared = compare_engine_weights(model, target.path, checkpoint, dtype, progress)
    weights = _row(WEIGHTS, begun, compared.checks)
    begun = time.perf_counter()
    checks = (
        _companions(target.path, checkpoint.path),
        _count("paths that leave the engine", outside),
    )
    files = _row(FILES, begun, checks)
    rows = (weights, _engine_graph(target, model, checkpoint), files)
    return Identity(rows, compared.sha256, not outside)


def _package(package: Package, checkpoint: Checkpoint, progress: Progress) -> Identity:
    from qwenport.validate.model_file import check_places, read_model
    from qwenport.validate.weights_identity import compare_weights

    begun = time.perf_counter()
    model = read_model(package.model)
    check_places(model, package.path)
    outside = _outside(model, package.path)
    compared = compare_weights(model, package.path, checkpoint, progress)
    weights = _row(WEIGHTS, begun, compared.checks)
    graph = _package_graph(package, model, checkpoint)
    begun = time.perf_counter()
    checks = (
        _companions(package.path, checkpoint.path),
        _count(
            "manifest entries that are not the graph's",
            _manifest_errors(package, model, checkpoint),
        ),
        _count("paths that leave the package", outside),
    )
    files = _row(FILES, begun, checks)
    return Identity((weights, graph, files), compared.sha256, not outside)


def _row(
    name: str,
    begun: float,
    checks: tuple[Check, ...] = (),
    *,
    reason: str | None = None,
    status: Status | None = None,
) -> ScenarioResult:
    if status is None and not checks:
        status = "not run"
    if status is None:
        status = "passed" if all(check.passed for check in checks) else "failed"
    seconds = round(time.perf_counter() - begun, 3)
    return ScenarioResult(name, SUMMARIES[name], status, checks, reason=reason, seconds=seconds)


def _count(metric: str, errors: list[str]) -> Check:
    """A check that there are none of these; names the first."""
    return Check(metric, len(errors), "==", 0, f"first: {errors[0]}" if errors else None)


def _package_graph(
    package: Package, model: onnx.ModelProto, checkpoint: Checkpoint
) -> ScenarioResult:
    def expected() -> ir.Model:
        return expected_model(
            checkpoint,
            dtype=package.dtype,
            weights=package.manifest["weights"].get("mode"),
            max_seq_len=package.max_seq_len,
        )

    return _graph(package.manifest, model, expected)


def _engine_graph(target: Target, model: onnx.ModelProto, checkpoint: Checkpoint) -> ScenarioResult:
    """As for a package: the graph of the package that this version exports, lowered as this version lowers it."""
    from qwenport.engines.lowering import for_onnxruntime_engine

    assert target.engine is not None
    manifest = target.engine.manifest

    def expected() -> ir.Model:
        package = expected_model(
            checkpoint,
            dtype=target.dtype,
            weights=manifest["package"]["weight_mode"],
            max_seq_len=target.rope_length,
        )
        rows = target.config.rope_rows(target.capacity)
        return for_onnxruntime_engine(package, rope_rows=rows, file=ENGINE_WEIGHTS)[0]

    return _graph(manifest, model, expected)


def _graph(
    manifest: Mapping[str, Any], model: onnx.ModelProto, expected: Callable[[], ir.Model]
) -> ScenarioResult:
    import onnx_ir as ir

    from qwenport.validate.graph_identity import differences

    begun = time.perf_counter()
    written_by = manifest.get("qwenport_version")
    if written_by != __version__:
        reason = (
            f"written by Qwenport {written_by}; this is {__version__}, "
            "so the graph is judged by numbers alone"
        )
        return _row(GRAPH, begun, reason=reason)
    try:
        wanted = ir.to_proto(expected())
    except (ExportError, KeyError, TypeError, ValueError) as error:
        reason = f"the exporter makes no such package: {error}"
        return _row(GRAPH, begun, reason=reason, status="failed")
    found = differences(model, wanted)
    return _row(GRAPH, begun, (_count("differences from the exporter's graph", found),))


def _companions(path: Path, checkpoint: Path) -> Check:
    errors = []
    for name in COMPANIONS:
        here, there = path / name, checkpoint / name
        if here.is_file() != there.is_file():
            side = "checkpoint" if there.is_file() else "target"
            errors.append(f"{name} is only in the {side}")
        elif there.is_file() and here.read_bytes() != there.read_bytes():
            errors.append(f"{name} differs")
    return _count("companion files that differ", errors)


def _manifest_errors(package: Package, model: onnx.ModelProto, checkpoint: Checkpoint) -> list[str]:
    """Statements of the manifest that the graph contradicts."""
    import onnx_ir as ir

    manifest = package.manifest
    try:
        stated = describe_graph(ir.from_proto(model))
    except Exception as error:  # the file can contain any message, and onnx-ir raises anything
        return [f"the graph cannot be read ({type(error).__name__}: {error})"]
    errors = [
        f"{key}: {_difference(manifest.get(key), found)}"
        for key, found in stated.items()
        if manifest.get(key) != found
    ]
    dtype, mode = manifest.get("dtype"), manifest["weights"].get("mode")
    modes = WEIGHT_MODES if _any_as_it_lies(checkpoint, str(dtype)) else ("convert",)
    if mode not in modes:
        errors.append(
            f"weights: mode {mode} in the manifest, for {dtype} from {checkpoint.dtype} it is "
            f"{' or '.join(modes)}"
        )
    caches = [v for v in model.graph.input if is_past(v.name)]
    tables = {t.name: t for t in model.graph.initializer if t.name in TABLES}
    types = {
        "the cache": {value.type.tensor_type.elem_type for value in caches},
        "weights": _weight_types(model),
    }
    for what, found in types.items():
        names = sorted(ir.DataType(number).name for number in found)
        if [BY_ONNX[name].name if name in BY_ONNX else None for name in names] != [dtype]:
            errors.append(f"dtype: {dtype} in the manifest, {what}: {', '.join(names) or 'none'}")
    positions: Any = manifest.get("max_seq_len")
    if chunks := manifest.get("model", {}).get("dual_chunk"):
        positions = as_dual_chunk(chunks).rope_rows
    for name in TABLES:
        rows = list(tables[name].dims)[:1] if name in tables else []
        if rows != [positions]:
            errors.append(
                f"max_seq_len: {manifest.get('max_seq_len')} in the manifest, rows of {name}: "
                f"{rows[0] if rows else 'none'}"
            )
    return errors


def _any_as_it_lies(checkpoint: Checkpoint, dtype: str) -> bool:
    """Whether some tensor of the checkpoint needs no conversion."""
    own = DTYPES[dtype].safetensors if dtype in DTYPES else None
    return any(entry.dtype == own for entry in checkpoint.tensors.values())


def _weight_types(model: onnx.ModelProto) -> set[int]:
    from qwenport.validate.model_file import is_floating

    """Types of the tensors in weight files but codes; constants of the graph may have any type."""
    return {
        tensor.data_type
        for tensor in model.graph.initializer
        if tensor.name not in TABLES
        and tensor.data_location == tensor.EXTERNAL
        and is_floating(tensor.data_type)
        and tensor.data_type != tensor.FLOAT8E4M3FN
    }


def _difference(stated: Any, found: Any) -> str:
    """Where two values of a manifest differ, descending into objects and lists of equal length."""
    from qwenport.validate.graph_identity import short

    if isinstance(stated, dict) and isinstance(found, dict):
        for key in (*found, *stated):
            if stated.get(key) != found.get(key):
                return f"{key}: {_difference(stated.get(key), found.get(key))}"
    if isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        for index, (one, other) in enumerate(zip(stated, found, strict=True)):
            if one != other:
                return f"{index}: {_difference(one, other)}"
    return f"{short(stated)} in the manifest, {short(found)} in the graph"


def _outside(model: onnx.ModelProto, package: Path) -> list[str]:
    """Tensors that are not stored in a file of the package."""
    from qwenport.validate.model_file import inner_tensors, is_inside, place_of

    errors = []
    for tensor in (*model.graph.initializer, *inner_tensors(model)):
        place = place_of(tensor)
        if place is not None and not is_inside(package, place.location):
            errors.append(f"{tensor.name} is in {place.location}")
    return errors
