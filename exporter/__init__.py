"""checkpoint -> package. Reads config.json and safetensors headers, traces, writes model.onnx + manifest.

Heavy imports (torch, onnx_ir) happen inside `export`, so that opening a package is quick.
"""

from qwenport.exporter.checkpoint import Checkpoint, open_checkpoint
from qwenport.exporter.config import ModelConfig, parse_config, read_config_json
from qwenport.exporter.directory import atomic_directory, sha256
from qwenport.exporter.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    PackageError,
    TracingError,
)
from qwenport.exporter.manifest import (
    MANIFEST,
    as_json,
    check_files,
    read_manifest,
    write_json,
)
from qwenport.exporter.package import (
    COMPANIONS,
    DEFAULT_MAX_BATCH,
    DTYPES,
    Package,
    export,
    load_package,
)
from qwenport.exporter.rope import RopeConfig, inverse_frequencies, rope_tables

__all__ = [
    "COMPANIONS",
    "DEFAULT_MAX_BATCH",
    "DTYPES",
    "MANIFEST",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "ModelConfig",
    "Package",
    "PackageError",
    "RopeConfig",
    "TracingError",
    "as_json",
    "atomic_directory",
    "check_files",
    "export",
    "inverse_frequencies",
    "load_package",
    "open_checkpoint",
    "parse_config",
    "read_config_json",
    "read_manifest",
    "rope_tables",
    "sha256",
    "write_json",
]
