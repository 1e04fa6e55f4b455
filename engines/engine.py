"""An engine directory as it lies on disk, verified against its manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenport.engines.errors import EngineError
from qwenport.exporter import MANIFEST, PackageError, check_files, read_manifest

FORMAT, FORMAT_VERSION = "qwenport-engine", 2
PLAN = "engine.plan"


@dataclass(frozen=True)
class Engine:
    """A verified engine directory."""

    path: Path
    manifest: dict[str, Any]

    @property
    def plan(self) -> Path:
        """The serialized TensorRT engine."""
        return self.path / PLAN


def is_engine(path: Path) -> bool:
    """Whether a directory's manifest says that it holds an engine."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def load_engine(path: Path) -> Engine:
    """Open an engine directory and check its files against its manifest.

    Raises:
        EngineError: no such directory, not an engine, another format version, or changed files.
    """
    if not path.is_dir():
        raise EngineError(f"{path}: no such engine directory")
    try:
        manifest = read_manifest(path, FORMAT, FORMAT_VERSION, "build the engine again")
        check_files(path, manifest["files"])
        for name in manifest["plugins"]:
            if name not in manifest["files"]:
                raise EngineError(f"{path / MANIFEST}: the plugins {name} are not among its files")
    except PackageError as error:
        raise EngineError(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"{path / MANIFEST}: damaged ({type(error).__name__}: {error})"
        ) from error
    return Engine(path, manifest)
