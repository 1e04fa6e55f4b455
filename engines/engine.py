"""An engine directory on disk, verified against its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from qwenport.contract import DTYPES, ENGINE_FORMAT, ENGINE_VERSION, MANIFEST, PLAN
from qwenport.engines.errors import EngineError
from qwenport.exporter import (
    BINDINGS,
    FILES,
    SOURCE,
    Each,
    PackageError,
    check_files,
    check_listed,
    check_shape,
    damaged,
    read_manifest,
)

SHAPE = {
    "qwenport_version": str,
    "flavour": str,
    "tensorrt_version": str,
    "gpus": [str],
    "model": {"num_key_value_heads": int, "head_dim": int, "vocab_size": int},
    "dtype": str,
    "max_seq_len": int,
    "max_batch": int,
    "rope_scaling": (str, NoneType),
    "profile": Each(Each([int])),
    "bindings": BINDINGS,
    "aliases": Each(str),
    "layers": int,
    "plugins": [str],
    "plugin_layers": Each(int),
    "package": {"source": SOURCE, "weight_bytes": int, "max_seq_len": int},
    "files": FILES,
}


@dataclass(frozen=True)
class Engine:
    """A verified engine directory.

    Attributes:
        path: the directory.
        manifest: what its qwenport.json holds; docs/reference/manifests.md names every key.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def plan(self) -> Path:
        """The serialized TensorRT engine."""
        return self.path / PLAN


def load_engine(path: Path | str) -> Engine:
    """Open an engine directory and check its files against its manifest.

    Raises:
        EngineError: no such directory, not an engine, another format version, or a changed file.
    """
    path = Path(path)
    if not path.is_dir():
        raise EngineError(f"{path}: no such engine directory")
    try:
        manifest = read_manifest(path, ENGINE_FORMAT, ENGINE_VERSION, "build the engine again")
        with damaged(path / MANIFEST):
            check_shape(manifest, SHAPE)
            if manifest["dtype"] not in DTYPES:
                raise ValueError(f"dtype is {manifest['dtype']!r}")
            check_listed(path, list(manifest["files"]), (PLAN,))
            check_files(path, manifest["files"])
            for name in manifest["plugins"]:
                if name not in manifest["files"]:
                    raise EngineError(
                        f"{path / MANIFEST}: the plugins {name} are not among its files"
                    )
    except PackageError as error:
        raise EngineError(str(error)) from error
    return Engine(path, manifest)
