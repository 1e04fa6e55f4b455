"""The package: what `export` writes and everything later reads.

model.onnx       the graph, opset 24, weights by reference
qwenport.json    the manifest
rope.safetensors cos and sin tables, fp32
weights/         the checkpoint's safetensors files (links), or files of the package's own
config.json, tokenizer and generation files, as in the checkpoint
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport import __version__
from qwenport.exporter.checkpoint import (
    Checkpoint,
    TensorEntry,
    open_checkpoint,
    read_safetensors_header,
)
from qwenport.exporter.config import ModelConfig, parse_config, read_config_json
from qwenport.exporter.directory import atomic_directory, sha256
from qwenport.exporter.errors import CheckpointError, ConfigError, ExportError, PackageError
from qwenport.exporter.manifest import (
    MANIFEST,
    PACKAGE_FORMAT,
    as_json,
    check_files,
    check_weight_files,
    read_manifest,
    write_json,
)

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT_VERSION = 2
MODEL, ROPE = "model.onnx", "rope.safetensors"
DTYPES = ("bf16", "fp16", "fp32")
WEIGHT_MODES = ("link", "copy", "pack")
DEFAULT_MAX_BATCH = 8

# Files that travel with the model unchanged, where the checkpoint has them.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Package:
    """A verified package directory."""

    path: Path
    manifest: dict[str, Any]
    config: ModelConfig

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL

    @property
    def dtype(self) -> str:
        """dtype of weights, activations and KV cache: "bf16", "fp16" or "fp32"."""
        dtype: str = self.manifest["dtype"]
        return dtype

    @property
    def max_seq_len(self) -> int:
        """Positions that the rope tables reach: the largest cache capacity."""
        length: int = self.manifest["max_seq_len"]
        return length

    @property
    def max_batch(self) -> int:
        """Rows that the package was exported for."""
        batch: int = self.manifest["max_batch"]
        return batch


def export(
    checkpoint_path: Path,
    package_path: Path,
    *,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    rope_scaling: str | None = None,
    weights: str = "link",
    progress: Any = lambda what, done, total: None,
) -> Package:
    """Write the package of a checkpoint.

    Args:
        checkpoint_path: Hugging Face checkpoint directory; only read.
        package_path: directory to create; must not exist.
        dtype: "bf16", "fp16" or "fp32"; the checkpoint's own by default.
        max_seq_len: positions to support; all that the rope settings allow by default.
        max_batch: rows that sessions and engines may use.
        rope_scaling: "KIND:FACTOR" for a checkpoint without rope scaling.
        weights: "link" (by reference), "copy" (a package that can be moved) or "pack" (by reference, but with
            each sparse layer's experts stacked in a file of the package's own).
        progress: called with (what, done, total).

    Raises:
        ConfigError, CheckpointError: see `open_checkpoint`.
        ExportError: the request cannot be met. Nothing is left at package_path.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if weights not in WEIGHT_MODES:
        raise ExportError(f"weights must be one of {', '.join(WEIGHT_MODES)}, not {weights!r}")
    if max_batch < 1:
        raise ExportError(f"max batch must be at least 1, not {max_batch}")
    checkpoint = open_checkpoint(checkpoint_path, rope_scaling)
    dtype = dtype or checkpoint.dtype
    max_seq_len = _checked_length(checkpoint.config, max_seq_len)
    with atomic_directory(package_path) as scratch:
        manifest = _write(
            checkpoint, scratch, dtype, max_seq_len, max_batch, rope_scaling, weights, progress
        )
    return Package(package_path, as_json(manifest), checkpoint.config)


def _checked_length(config: ModelConfig, asked: int | None) -> int:
    if asked is None:
        return config.max_context
    if not 1 <= asked <= config.max_context:
        raise ExportError(
            f"max sequence length {asked} is outside 1..{config.max_context}, what the rope settings "
            f"({config.rope.kind}) allow" + ("; --rope-scaling extends it" if asked > 0 else "")
        )
    return asked


def _write(
    checkpoint: Checkpoint,
    scratch: Path,
    dtype: str,
    max_seq_len: int,
    max_batch: int,
    rope_scaling: str | None,
    weights: str,
    progress: Any,
) -> dict[str, Any]:
    # torch and the IR are imported here: reading a package needs neither
    import onnx_ir as ir

    from qwenport.exporter.weights import place_weights

    plan = place_weights(checkpoint, scratch, dtype, weights, progress)
    _write_rope_tables(checkpoint.config, scratch / ROPE, max_seq_len)
    model = expected_model(
        checkpoint, dtype=dtype, weights=weights, max_seq_len=max_seq_len, progress=progress
    )
    ir.save(model, scratch / MODEL)
    for name in COMPANIONS:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, scratch / name)
    manifest = {
        "format": PACKAGE_FORMAT,
        "format_version": FORMAT_VERSION,
        "qwenport_version": __version__,
        "model": dataclasses.asdict(checkpoint.config),
        "dtype": dtype,
        "max_seq_len": max_seq_len,
        "max_batch": max_batch,
        "rope_scaling": rope_scaling,
        **describe_graph(model),
        "weights": {
            "mode": plan.mode,
            "tensors": len(plan.entries),
            "bytes": sum(entry.length for entry in plan.entries.values()),
            "files": _weight_files(scratch),
        },
        "source": {
            "dtype": checkpoint.dtype,
            "config_sha256": sha256(checkpoint.path / "config.json"),
            "files": [
                {"name": f.name, "bytes": f.size, "header_sha256": f.header_sha256}
                for f in checkpoint.files
            ],
        },
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(scratch.iterdir())
            if path.is_file()
        },
    }
    write_json(scratch / MANIFEST, manifest)
    return manifest


def expected_model(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    weights: str,
    max_seq_len: int,
    progress: Any = lambda what, done, total: None,
) -> ir.Model:
    """Build the model.onnx that this version exports from a checkpoint. Reads no weight and writes nothing.

    Args:
        checkpoint: what is exported.
        dtype: "bf16", "fp16" or "fp32".
        weights: "link", "copy" or "pack"; ignored if `dtype` is not the checkpoint's.
        max_seq_len: rows of the rope tables.
        progress: called with (what, layers done, layers).

    Raises:
        ExportError: the weights cannot be laid out so, or a tensor is unused.
    """
    from qwenport.exporter.graph import build_graph
    from qwenport.exporter.weights import FOLDER, external_tensor, plan_weights

    config = checkpoint.config
    entries = plan_weights(checkpoint, dtype, weights).entries
    tables = _rope_entries(config, max_seq_len)
    used: set[str] = set()

    def tensor(name: str) -> ir.TensorProtocol | None:
        used.add(name)
        if name in tables:
            return external_tensor(name, ROPE, tables[name])
        if name not in entries:
            return None
        return external_tensor(name, f"{FOLDER}/{entries[name].file}", entries[name])

    layers = config.num_hidden_layers
    model = build_graph(
        config, dtype, tensor, lambda index: progress("writing the graph", index + 1, layers)
    )
    unused = sorted(entries.keys() - used)
    if unused:
        raise ExportError(f"no operator uses tensor {unused[0]} ({len(unused)} unused in all)")
    return model


def describe_graph(model: ir.Model) -> dict[str, Any]:
    """What the manifest repeats of a graph: its opset, the versions of custom operators, its bindings."""
    return {
        "opset": model.opset_imports[""],
        "ops": {
            f"{f.domain}.{f.name}": model.opset_imports[f.domain] for f in model.functions.values()
        },
        "bindings": {
            "inputs": [_binding(value) for value in model.graph.inputs],
            "outputs": [_binding(value) for value in model.graph.outputs],
        },
    }


def _rope_entries(config: ModelConfig, length: int) -> dict[str, TensorEntry]:
    from qwenport.exporter.graph import COS_TABLE, SIN_TABLE
    from qwenport.exporter.weights import plan_safetensors

    shape = (length, config.rope.head_dim // 2)
    return plan_safetensors(ROPE, "F32", {COS_TABLE: shape, SIN_TABLE: shape})


def _write_rope_tables(config: ModelConfig, target: Path, length: int) -> None:
    import torch

    from qwenport.exporter.rope import rope_tables
    from qwenport.exporter.weights import safetensors_header

    with target.open("wb") as writer:
        writer.write(safetensors_header(_rope_entries(config, length).values()))
        for table in rope_tables(config.rope, length):
            writer.write(table.contiguous().view(torch.uint8).numpy().data)


def _binding(value: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.name.lower(), "shape": shape}


def _weight_files(package: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted((package / "weights").iterdir()):
        file, _ = read_safetensors_header(path)
        files[f"weights/{path.name}"] = {"bytes": file.size, "header_sha256": file.header_sha256}
    return files


def _check_types(manifest: dict[str, Any]) -> None:
    """What is read of a manifest without further ado is of the right type.

    Raises:
        ValueError, KeyError, TypeError: it is not; says what.
    """
    if manifest["dtype"] not in DTYPES:
        raise ValueError(f"dtype {manifest['dtype']!r}")
    for name in ("max_seq_len", "max_batch"):
        if type(manifest[name]) is not int or manifest[name] < 1:
            raise ValueError(f"{name} {manifest[name]!r}")
    if not isinstance(manifest["rope_scaling"], str | None):
        raise ValueError(f"rope_scaling {manifest['rope_scaling']!r}")
    source = manifest["source"]
    texts = [source["config_sha256"], source["dtype"]]
    texts += [file[name] for file in source["files"] for name in ("name", "header_sha256")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("source holds something that is no text")
    if not isinstance(manifest["weights"]["mode"], str):
        raise ValueError("weights has no mode")


def load_package(path: Path) -> Package:
    """Open a package directory and check it against its manifest.

    Weight files are checked by size and header hash; their values are not read.

    Raises:
        PackageError: not a package, another format version, or files that do not match the manifest.
    """
    if not path.is_dir():
        raise PackageError(f"{path}: no such package directory")
    manifest = read_manifest(path, PACKAGE_FORMAT, FORMAT_VERSION, "export the checkpoint again")
    try:
        check_files(path, manifest["files"])
        check_weight_files(path, manifest["weights"]["files"])
        _check_types(manifest)
        config = parse_config(read_config_json(path), manifest["rope_scaling"])
        same = manifest["model"] == as_json(dataclasses.asdict(config))
    except (CheckpointError, ConfigError) as error:
        raise PackageError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PackageError(
            f"{path / MANIFEST}: damaged ({type(error).__name__}: {error})"
        ) from error
    if not same:
        raise PackageError(f"{path}: {MANIFEST} describes another model than config.json")
    return Package(path, manifest, config)
