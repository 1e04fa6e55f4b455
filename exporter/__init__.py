"""checkpoint -> package. Reads config.json and safetensors headers, traces, writes model.onnx + manifest.

Heavy imports (torch, onnx_ir) happen inside `export`, so that opening a package is quick.
"""

from qwenport.exporter.checkpoint import (
    CHUNK_BYTES,
    Checkpoint,
    TensorEntry,
    expert_stacks,
    open_checkpoint,
    stacked_shape,
)
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
    ENGINE_FORMAT,
    MANIFEST,
    Kind,
    as_json,
    check_files,
    kind_of,
    read_manifest,
    write_json,
)
from qwenport.exporter.package import (
    COMPANIONS,
    DEFAULT_MAX_BATCH,
    DTYPES,
    WEIGHT_MODES,
    Package,
    describe_graph,
    expected_model,
    export,
    load_package,
)
from qwenport.exporter.rope import RopeConfig, inverse_frequencies, rope_tables

__all__ = [
    "CHUNK_BYTES",
    "COMPANIONS",
    "DEFAULT_MAX_BATCH",
    "DTYPES",
    "ENGINE_FORMAT",
    "MANIFEST",
    "WEIGHT_MODES",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "Kind",
    "ModelConfig",
    "Package",
    "PackageError",
    "RopeConfig",
    "TensorEntry",
    "TracingError",
    "as_json",
    "atomic_directory",
    "check_files",
    "describe_graph",
    "expected_model",
    "expert_stacks",
    "export",
    "inverse_frequencies",
    "kind_of",
    "load_package",
    "open_checkpoint",
    "parse_config",
    "read_config_json",
    "read_manifest",
    "rope_tables",
    "sha256",
    "stacked_shape",
    "write_json",
]
