"""The package: what `export` writes and everything later reads.

model.onnx       the graph, opset 24, weights by reference
qwenport.json    the manifest
rope.safetensors cos and sin tables, fp32
symmetric-zero-points.safetensors   those of symmetric quantized weights, if there are any
weights/         the checkpoint's safetensors files (links), or the package's own files
proof.safetensors   what engines of it must reproduce, once `validate` or `build` has made it
checkpoint/      of a package that `export` quantized: the quantized checkpoint, which the weights are links to
config.json, tokenizer and generation files, as in the checkpoint
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from qwenport.contract import (
    DTYPES,
    MANIFEST,
    MODEL,
    PACKAGE_FORMAT,
    PACKAGE_VERSION,
    PROOF,
    ROPE,
    SYMMETRIC_ZEROS,
    is_past,
)
from qwenport.exporter.config import ModelConfig, parse_config, read_config_json
from qwenport.exporter.errors import CheckpointError, ConfigError, PackageError
from qwenport.exporter.keys import short
from qwenport.exporter.manifest import (
    BINDINGS,
    FILES,
    SOURCE,
    Each,
    as_json,
    check_files,
    check_listed,
    check_shape,
    check_weight_files,
    damaged,
    read_manifest,
)
from qwenport.exporter.rope_file import (
    check_table_values,
    check_tables,
)
from qwenport.exporter.safetensors_file import (
    read_safetensors_header,
)

if TYPE_CHECKING:
    import onnx_ir as ir


MOST_BATCH = 1 << 16


@dataclass(frozen=True)
class Package:
    """A verified package directory.

    Attributes:
        path: the directory.
        manifest: what its qwenport.json holds; docs/reference/manifests.md names every key.
        config: what its config.json means.
    """

    path: Path
    manifest: dict[str, Any]
    config: ModelConfig

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL

    def read_model(self) -> ir.Model:
        """The graph; no weight is read.

        Raises:
            PackageError: model.onnx is not an ONNX model.
        """
        import onnx_ir as ir

        try:
            model = ir.load(self.model)
            empty = not len(model.graph)
        except Exception as error:  # neither protobuf's errors nor onnx-ir's have a base class
            raise PackageError(
                f"{self.model}: not an ONNX model ({type(error).__name__}: {error})"
            ) from error
        if empty:
            raise PackageError(f"{self.model}: not an ONNX model (it has no graph)")
        return model

    def check_graph(self) -> ir.Model:
        """Read the graph and compare it with the rest of the package: bindings, tensor locations, rope tables.

        Whether it computes what the checkpoint's model computes is up to `validate`.

        Raises:
            PackageError: it is damaged, or does not belong to this package.
        """
        model = self.read_model()
        with damaged(self.model):
            described = as_json(describe_graph(model))
            for key, found in described.items():
                if self.manifest[key] != found:
                    raise PackageError(f"{self.model}: its {key} are not those in {MANIFEST}")
            for node in model.graph:
                for value in node.inputs:
                    if value is not None and not (
                        value.producer() or value.is_graph_input() or value.is_initializer()
                    ):
                        raise PackageError(f"{self.model}: no node computes {value.name}")
            _check_places(self, model)
        check_table_values(self.path, self.config, self.max_seq_len)
        return model

    @property
    def dtype(self) -> str:
        """The dtype of weights, activations and KV cache: "bf16", "fp16" or "fp32"."""
        dtype: str = self.manifest["dtype"]
        return dtype

    @property
    def max_seq_len(self) -> int:
        """Positions that the rope tables cover: the largest cache capacity."""
        length: int = self.manifest["max_seq_len"]
        return length

    @property
    def max_batch(self) -> int:
        """Batch rows that the package was exported for."""
        batch: int = self.manifest["max_batch"]
        return batch


def describe_graph(model: ir.Model) -> dict[str, Any]:
    """The manifest's description of a graph: its opset, the custom operators' versions, its bindings."""
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


def _binding(value: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.name.lower(), "shape": shape}


SHAPE = {
    "qwenport_version": str,
    "model": {"vocab_size": int},
    "dtype": str,
    "max_seq_len": int,
    "max_batch": int,
    "rope_scaling": (str, NoneType),
    "opset": int,
    "ops": Each(int),
    "bindings": BINDINGS,
    "weights": {
        "mode": str,
        "tensors": int,
        "bytes": int,
        "files": Each({"bytes": int, "header_sha256": str}),
    },
    "source": SOURCE,
    "files": FILES,
}


def _check_limits(manifest: dict[str, Any]) -> None:
    """Raises ValueError: the dtype, length or batch is one that no package can have."""
    if manifest["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {manifest['dtype']!r}")
    for name in ("max_seq_len", "max_batch"):
        if manifest[name] < 1:
            raise ValueError(f"{name} is {manifest[name]}")
    if manifest["max_batch"] > MOST_BATCH:
        raise ValueError(f"max_batch is {short(manifest['max_batch'])}")
    caches = {
        binding["dtype"] for binding in manifest["bindings"]["inputs"] if is_past(binding["name"])
    }
    if caches != {DTYPES[manifest["dtype"]].binding}:
        raise ValueError(f"dtype is {manifest['dtype']}, and that of its caches {short(caches)}")
    if not manifest["source"]["files"]:
        raise ValueError("it names no files that it was made from")


def _check_places(package: Package, model: ir.Model) -> None:
    """Raises PackageError: a tensor's location in the graph does not hold a tensor of its type and shape."""
    import onnx_ir as ir

    from qwenport.exporter.weights import external_tensor

    places: dict[tuple[str, int], ir.ExternalTensor] = {}
    zeros = [SYMMETRIC_ZEROS] if SYMMETRIC_ZEROS in package.manifest["files"] else []
    for location in (ROPE, *zeros, *package.manifest["weights"]["files"]):
        for entry in read_safetensors_header(package.path / location)[1]:
            if entry.length:  # an empty tensor has no location
                places[location, entry.offset] = external_tensor(entry.name, location, entry)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        there = places.get((str(tensor.location), tensor.offset or 0))
        if (
            there is None
            or not _is_held(tensor, there)
            or (there.location == ROPE and there.name != name)
        ):
            raise PackageError(
                f"{package.model}: tensor {name} is not where a weight of the package is"
            )


def _is_held(tensor: ir.ExternalTensor, there: ir.ExternalTensor) -> bool:
    """Whether a tensor of the graph is what lies in its place; codes are the bytes of integers of any type."""
    import onnx_ir as ir

    if tensor.dtype in (ir.DataType.UINT4, ir.DataType.UINT8):
        assert tensor.length is not None and there.length is not None
        return not there.dtype.is_floating_point() and tensor.length <= there.length
    if there.dtype != tensor.dtype or there.length != tensor.length:
        return False
    return _without_ones(there.shape) == _without_ones(tensor.shape)


def _without_ones(shape: ir.Shape) -> list[int]:
    """The axes of a shape that matter: scales [N, 1] are [N] in a graph."""
    return [size for size in shape.numpy() if size != 1]


def _graph_of(model: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that the graph depends on; which other keys are known varies by release."""
    others = ("unread_keys", "sparse_attention")
    return {key: value for key, value in model.items() if key not in others}


def load_package(path: Path | str) -> Package:
    """Open a package directory and check it against its manifest.

    Weight files are checked by size and header hash; their values are not read.

    Raises:
        PackageError: not a package, another format version, or a file does not match the manifest.
    """
    path = Path(path)
    if not path.is_dir():
        raise PackageError(f"{path}: no such package directory")
    manifest = read_manifest(path, PACKAGE_FORMAT, PACKAGE_VERSION, "export the checkpoint again")
    try:
        with damaged(path / MANIFEST):
            check_shape(manifest, SHAPE)
            _check_limits(manifest)
            weights = manifest["weights"]["files"]
            # a proof is made later, and names the manifest that it belongs to
            check_listed(
                path,
                [*manifest["files"], *weights],
                (MODEL, ROPE, "config.json"),
                unlisted=(PROOF,),
            )
            check_files(path, manifest["files"])
            check_weight_files(path, weights)
            if not weights:
                raise PackageError(f"{path / MANIFEST} lists no weights")
            config = parse_config(
                read_config_json(path), manifest["rope_scaling"], manifest["max_seq_len"]
            )
            same = _graph_of(manifest["model"]) == _graph_of(as_json(dataclasses.asdict(config)))
            check_tables(path, config, manifest["max_seq_len"])
    except (CheckpointError, ConfigError) as error:
        raise PackageError(f"{path}: {error}") from error
    if not same:
        raise PackageError(f"{path}: {MANIFEST} describes another model than config.json")
    return Package(path, manifest, config)
