"""checkpoint -> package. Reads config.json and safetensors headers, traces, writes model.onnx + manifest.

Heavy imports (torch, onnx_ir) happen inside `export`, so that a package opens quickly.
"""

from qwenport.exporter.adapter import Adapter
from qwenport.exporter.checkpoint import Checkpoint, expert_stacks, open_checkpoint, stacked_shape
from qwenport.exporter.companions import (
    COMPANIONS,
    MOST_OF_A_TOKENIZER,
    check_companions,
    copy_companions,
    stop_ids,
)
from qwenport.exporter.config import ModelConfig, parse_config, read_config_json
from qwenport.exporter.directory import (
    Note,
    atomic_directory,
    lock_directory,
    published,
    require_space,
    sha256,
)
from qwenport.exporter.dual_chunk import DualChunk, as_dual_chunk
from qwenport.exporter.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    PackageError,
    TracingError,
)
from qwenport.exporter.expected import quantized_weights
from qwenport.exporter.exporting import expected_model, export
from qwenport.exporter.first_call import settle
from qwenport.exporter.json_file import read_json
from qwenport.exporter.keys import short
from qwenport.exporter.manifest import (
    BINDINGS,
    FILES,
    SOURCE,
    Each,
    Kind,
    Maybe,
    as_json,
    check_files,
    check_listed,
    check_shape,
    check_weight_files,
    damaged,
    kind_of,
    read_manifest,
    write_json,
)
from qwenport.exporter.package import Package, describe_graph, load_package
from qwenport.exporter.quantization import (
    CODES,
    INPUT_SCALE,
    PERMUTATION,
    SCALES,
    WHOLE,
    ZEROS,
    Storage,
    part_name,
)
from qwenport.exporter.quantizing import Recipe, make_recipe
from qwenport.exporter.rope import Rope, rope_tables
from qwenport.exporter.safetensors_file import (
    CHUNK_BYTES,
    TensorEntry,
    chunks,
    plan_safetensors,
    read_safetensors_header,
    safetensors_header,
)

__all__ = [
    "BINDINGS",
    "CHUNK_BYTES",
    "CODES",
    "COMPANIONS",
    "FILES",
    "INPUT_SCALE",
    "MOST_OF_A_TOKENIZER",
    "PERMUTATION",
    "SCALES",
    "SOURCE",
    "WHOLE",
    "ZEROS",
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DualChunk",
    "Each",
    "ExportError",
    "Kind",
    "Maybe",
    "ModelConfig",
    "Note",
    "Package",
    "PackageError",
    "Recipe",
    "Rope",
    "Storage",
    "TensorEntry",
    "TracingError",
    "as_dual_chunk",
    "as_json",
    "atomic_directory",
    "check_companions",
    "check_files",
    "check_listed",
    "check_shape",
    "check_weight_files",
    "chunks",
    "copy_companions",
    "damaged",
    "describe_graph",
    "expected_model",
    "expert_stacks",
    "export",
    "kind_of",
    "load_package",
    "lock_directory",
    "make_recipe",
    "open_checkpoint",
    "parse_config",
    "part_name",
    "plan_safetensors",
    "published",
    "quantized_weights",
    "read_config_json",
    "read_json",
    "read_manifest",
    "read_safetensors_header",
    "require_space",
    "rope_tables",
    "safetensors_header",
    "settle",
    "sha256",
    "short",
    "stacked_shape",
    "stop_ids",
    "write_json",
]
