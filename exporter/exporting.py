"""Checkpoint -> package, all or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport import __version__
from qwenport.contract import (
    ADAPTERS,
    CHECKPOINT,
    DEFAULT_MAX_BATCH,
    DTYPES,
    LINK,
    MANIFEST,
    MERGE,
    MODEL,
    PACKAGE_FORMAT,
    PACKAGE_VERSION,
    ROPE,
    WEIGHT_MODES,
    Progress,
    no_progress,
)
from qwenport.exporter.adapter import ADAPTER_CONFIG
from qwenport.exporter.checkpoint import Checkpoint, open_checkpoint
from qwenport.exporter.companions import companions_of, copy_companions, doubts
from qwenport.exporter.config import ModelConfig
from qwenport.exporter.directory import Note, atomic_directory, sha256
from qwenport.exporter.errors import CheckpointError, ConfigError, ExportError
from qwenport.exporter.manifest import (
    as_json,
    write_json,
)
from qwenport.exporter.package import MOST_BATCH, Package, describe_graph
from qwenport.exporter.rope_file import (
    rope_entries,
    write_tables,
)
from qwenport.exporter.safetensors_file import (
    WeightFile,
    read_safetensors_header,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from qwenport.exporter.quantizing import Recipe


def export(
    checkpoint_path: Path | str,
    package_path: Path | str,
    *,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    rope_scaling: str | None = None,
    weights: str = LINK,
    adapter: str | None = None,
    ignore_sparse_attention: bool = False,
    quantize: Recipe | None = None,
    check_values: bool = False,
    strict: bool = False,
    force_clean: bool = False,
    progress: Progress = no_progress,
    note: Note = lambda text: None,
) -> Package:
    """Export a checkpoint as a package.

    Args:
        checkpoint_path: Hugging Face checkpoint directory; only read.
        package_path: directory to create; must not exist.
        dtype: "bf16", "fp16" or "fp32"; by default the checkpoint's own, and then a tensor of another dtype must not
            lose precision.
        max_seq_len: positions to support; by default all that the rope settings allow.
        max_batch: batch rows that sessions and engines may use.
        rope_scaling: "KIND:FACTOR" for a checkpoint without rope scaling.
        weights: "link" (by reference), "copy" (a package that can be moved) or "pack" (by reference, but with
            each sparse layer's experts stacked in a file of the package's own).
        adapter: what to do with an adapter in the checkpoint's directory: "ignore" or "merge" it.
        ignore_sparse_attention: export exact attention where the checkpoint asks for its sparse approximation.
        quantize: round the weights to few bits; see `make_recipe`. The quantized checkpoint becomes a part of the
            package.
        check_values: read every weight, and refuse NaN and infinity; converted or stacked weights are always checked.
        strict: refuse unread keys of config.json; otherwise they are only noted.
        force_clean: remove scratch directories of exports to the same path, even of exports that may still run.
        progress: called with (what, done, total).
        note: called with messages for the user.

    Raises:
        ConfigError, CheckpointError: see `open_checkpoint`.
        ExportError: the request cannot be met. Nothing is left at package_path.
    """
    package_path = Path(package_path)
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if weights not in WEIGHT_MODES:
        raise ExportError(f"weights must be one of {', '.join(WEIGHT_MODES)}, not {weights!r}")
    if adapter not in (None, *ADAPTERS):
        raise ExportError(f"adapter must be one of {', '.join(ADAPTERS)}, not {adapter!r}")
    if not 1 <= max_batch <= MOST_BATCH:
        raise ExportError(f"max batch must be from 1 to {MOST_BATCH}, not {max_batch}")
    checkpoint = open_checkpoint(
        checkpoint_path, rope_scaling, max_seq_len=max_seq_len, merged=adapter == MERGE
    )
    if strict and checkpoint.config.unread_keys:
        raise ConfigError(
            f"config.json has unread keys: {', '.join(checkpoint.config.unread_keys)}; "
            "--strict refuses them"
        )
    if adapter is None and checkpoint.has_adapter:
        raise CheckpointError(
            f"{checkpoint.path}: there is an adapter next to the weights ({ADAPTER_CONFIG}); --adapter merge adds it "
            "to them, --adapter ignore exports them without it"
        )
    _check_sparse_attention(checkpoint, ignore_sparse_attention)
    request = _Request(
        dtype or checkpoint.dtype,
        dtype is None,
        _checked_length(checkpoint.config, max_seq_len),
        max_batch,
        rope_scaling,
        weights,
        check_values,
    )
    if quantize is not None:
        _check_quantizable(checkpoint, weights)
    companions_of(checkpoint.path)
    for doubt in doubts(checkpoint.path, checkpoint.config.vocab_size):
        note(doubt)
    with atomic_directory(package_path, force_clean=force_clean, note=note) as scratch:
        quantized = None
        if quantize is not None:
            quantized = {**quantize.describe(), **_identity(checkpoint)}
            checkpoint = _quantized(checkpoint, scratch, request, quantize, progress)
        manifest = _write(checkpoint, scratch, request, progress, quantized)
    return Package(package_path, as_json(manifest), checkpoint.config)


@dataclass(frozen=True)
class _Request:
    """The request to `export`; `lossless`: the dtype is the checkpoint's own, so no precision may be lost."""

    dtype: str
    lossless: bool
    max_seq_len: int
    max_batch: int
    rope_scaling: str | None
    weights: str
    check_values: bool


def _check_sparse_attention(checkpoint: Checkpoint, ignored: bool) -> None:
    """Raises ConfigError: config.json asks for sparse attention, which is not ignored; or there is none to ignore."""
    asks = checkpoint.config.sparse_attention
    if asks is not None and not ignored:
        raise ConfigError(
            f"config.json: {asks} asks for sparse attention, an approximation, which is not supported; "
            "--ignore-sparse-attention exports the exact attention that it approximates"
        )
    if ignored and not checkpoint.has_sparse_attention:
        raise ConfigError(
            f"{checkpoint.path} asks for no sparse attention that --ignore-sparse-attention could ignore"
        )


def _check_quantizable(checkpoint: Checkpoint, weights: str) -> None:
    """Raises ExportError: the checkpoint cannot be quantized, or its weights would not be the package's own."""
    if checkpoint.config.quantization is not None:
        raise ExportError(
            f"{checkpoint.path} is quantized already; --quantize rounds floating-point weights"
        )
    if checkpoint.adapter is not None:
        raise ExportError(
            "--quantize and --adapter merge do not go together; merge the adapter into the checkpoint with peft first"
        )
    if weights != LINK:
        raise ExportError(
            f"--weights {weights} is for weights that stay as they are; --quantize writes new ones into the package"
        )


def _checked_length(config: ModelConfig, asked: int | None) -> int:
    if asked is None:
        return config.max_context
    if not 1 <= asked <= config.max_context:
        raise ExportError(
            f"max sequence length {asked}: the rope settings ({config.rope.kind}) allow 1 to {config.max_context} "
            "positions" + ("; --rope-scaling extends them" if asked > 0 else "")
        )
    return asked


def _quantized(
    original: Checkpoint, scratch: Path, request: _Request, recipe: Recipe, progress: Progress
) -> Checkpoint:
    """Write the quantized checkpoint into the package; returns it, with the notes on the original."""
    from qwenport.exporter.quantizing.writing import write_quantized  # imports torch

    folder = scratch / CHECKPOINT
    write_quantized(original, folder, recipe, request.dtype, progress)
    made = open_checkpoint(folder, request.rope_scaling, max_seq_len=request.max_seq_len)
    return dataclasses.replace(made, notes=original.notes)


def _write(
    checkpoint: Checkpoint,
    scratch: Path,
    request: _Request,
    progress: Progress,
    quantized: dict[str, Any] | None,
) -> dict[str, Any]:
    # torch and the IR are imported here: reading a package needs neither
    import onnx_ir as ir

    from qwenport.exporter.weights import place_weights

    plan = place_weights(
        checkpoint,
        scratch,
        request.dtype,
        request.weights,
        progress,
        lossless=request.lossless,
        check_values=request.check_values,
    )
    write_tables(checkpoint.config, scratch, request.max_seq_len)
    model = expected_model(
        checkpoint,
        dtype=request.dtype,
        weights=request.weights,
        max_seq_len=request.max_seq_len,
        progress=progress,
    )
    ir.save(model, scratch / MODEL)
    copy_companions(checkpoint.path, scratch)
    manifest = {
        "format": PACKAGE_FORMAT,
        "format_version": PACKAGE_VERSION,
        "qwenport_version": __version__,
        "model": dataclasses.asdict(checkpoint.config),
        "dtype": request.dtype,
        "max_seq_len": request.max_seq_len,
        "max_batch": request.max_batch,
        "rope_scaling": request.rope_scaling,
        **describe_graph(model),
        "weights": {
            "mode": plan.mode,
            "tensors": len(plan.entries),
            "bytes": sum(entry.length for entry in plan.entries.values()),
            "files": _weight_files(scratch, () if plan.mode == "convert" else checkpoint.files),
        },
        "source": {
            "dtype": checkpoint.dtype,
            "prefix": checkpoint.prefix,
            "converted": plan.conversions(),
            "notes": list(checkpoint.notes),
            "adapter": None if checkpoint.adapter is None else checkpoint.adapter.describe(),
            "quantized": quantized,
            **_identity(checkpoint),
        },
        "files": {
            path.relative_to(scratch).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for path in (*sorted(scratch.iterdir()), *_companions(scratch / CHECKPOINT))
            if path.is_file()
        },
    }
    write_json(scratch / MANIFEST, manifest)
    return manifest


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a checkpoint from others, for a manifest."""
    return {
        "config_sha256": sha256(checkpoint.path / "config.json"),
        "files": [
            {"name": f.name, "bytes": f.size, "header_sha256": f.header_sha256}
            for f in checkpoint.files
        ],
    }


def expected_model(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    weights: str,
    max_seq_len: int,
    progress: Progress = no_progress,
) -> ir.Model:
    """Build the model.onnx that this version exports from a checkpoint, without reading a weight or writing a file.

    Args:
        checkpoint: the checkpoint to export.
        dtype: "bf16", "fp16" or "fp32".
        weights: "link", "copy" or "pack"; ignored if every tensor is converted.
        max_seq_len: rows of the rope tables.
        progress: called with (what, layers done, layers).

    Raises:
        ExportError: the weights cannot be laid out that way, or a tensor is unused.
    """
    from qwenport.exporter.graph import build_graph
    from qwenport.exporter.weights import external_tensor, plan_weights
    from qwenport.exporter.written_parts import location_of

    config = checkpoint.config
    plan = plan_weights(checkpoint, dtype, weights)
    entries = plan.entries
    tables = rope_entries(config, max_seq_len)
    used: set[str] = set()

    def tensor(name: str) -> ir.TensorProtocol | None:
        name = plan.same.get(name, name)
        used.add(name)
        if name in tables:
            return external_tensor(name, ROPE, tables[name])
        if name not in entries:
            return None
        entry = entries[name]  # another's, if the tensors are equal
        return external_tensor(entry.name, location_of(entry), entry)

    layers = config.num_hidden_layers
    model = build_graph(
        config, dtype, tensor, lambda index: progress("writing the graph", index + 1, layers)
    )
    unused = sorted(entries.keys() - used)
    if unused:
        raise ExportError(f"no operator uses tensor {unused[0]} ({len(unused)} unused in all)")
    return model


def _weight_files(package: Path, read: Sequence[WeightFile]) -> dict[str, dict[str, Any]]:
    """The manifest's entries for the weight files; the checkpoint's were read already."""
    known, files = {file.name: file for file in read}, {}
    for path in sorted((*package.glob("weights/*"), *package.glob(f"{CHECKPOINT}/*.safetensors"))):
        file = known.get(path.name) or read_safetensors_header(path)[0]
        name = path.relative_to(package).as_posix()
        files[name] = {"bytes": file.size, "header_sha256": file.header_sha256}
    return files


def _companions(checkpoint: Path) -> list[Path]:
    """The files of the checkpoint in a package, without its weights."""
    return sorted(p for p in checkpoint.glob("*") if p.suffix != ".safetensors")
