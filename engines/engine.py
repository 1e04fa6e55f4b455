"""An engine directory as it lies on disk, verified against its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenport.engines.errors import EngineError
from qwenport.exporter import ENGINE_FORMAT, MANIFEST, PackageError, check_files, read_manifest

FORMAT_VERSION = 2
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


def load_engine(path: Path) -> Engine:
    """Open an engine directory and check its files against its manifest.

    Raises:
        EngineError: no such directory, not an engine, another format version, or changed files.
    """
    if not path.is_dir():
        raise EngineError(f"{path}: no such engine directory")
    try:
        manifest = read_manifest(path, ENGINE_FORMAT, FORMAT_VERSION, "build the engine again")
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
