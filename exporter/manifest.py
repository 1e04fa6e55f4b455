"""qwenport.json: how a package or an engine directory says what it holds, and how that is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from qwenport.exporter.checkpoint import read_safetensors_header
from qwenport.exporter.directory import sha256
from qwenport.exporter.errors import PackageError

MANIFEST = "qwenport.json"
PACKAGE_FORMAT, ENGINE_FORMAT = "qwenport-package", "qwenport-engine"

Kind = Literal["checkpoint", "package", "engine"]
_KINDS: dict[str, Kind] = {PACKAGE_FORMAT: "package", ENGINE_FORMAT: "engine"}


def kind_of(path: Path) -> Kind:
    """What a directory holds. Its contents are not checked: whoever opens it does that.

    Raises:
        PackageError: no such directory, or none of the three kinds.
    """
    if not path.exists():
        raise PackageError(f"{path}: no such directory")
    if not path.is_dir():
        raise PackageError(f"{path}: not a directory")
    if (path / MANIFEST).is_file():
        try:
            return _KINDS[json.loads((path / MANIFEST).read_text(encoding="utf-8"))["format"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PackageError(f"{path / MANIFEST}: not a manifest of Qwenport's") from error
    if (path / "model.onnx").is_file() or (path / "engine.plan").is_file():
        raise PackageError(f"{path}: has no {MANIFEST}; it is not a whole package or engine")
    if (path / "config.json").is_file():
        return "checkpoint"
    raise PackageError(
        f"{path}: neither a package nor an engine (no {MANIFEST}), nor a checkpoint (no config.json)"
    )


def as_json(data: dict[str, Any]) -> dict[str, Any]:
    """`data` as it reads back from JSON: tuples become lists."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    return result


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a manifest: indented, with a final newline."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(path: Path, format_name: str, format_version: int, remedy: str) -> dict[str, Any]:
    """Read `path`/qwenport.json and check its format and version.

    Raises:
        PackageError: not such a directory, not JSON, another format or version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise PackageError(f"{path}: no {MANIFEST}; not a {format_name.replace('-', ' ')}")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found, version = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageError(f"{file}: not a manifest ({type(error).__name__}: {error})") from error
    if found != format_name:
        raise PackageError(f"{path}: holds a {found}, expected a {format_name}")
    if version != format_version:
        raise PackageError(
            f"{path}: {format_name} format version {version}, this Qwenport reads {format_version}; {remedy}"
        )
    return manifest


def check_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Hold files against the sizes and hashes that a manifest records.

    Raises:
        PackageError: a file is missing or was changed.
    """
    for name, recorded in files.items():
        file = path / name
        if not file.is_file():
            raise PackageError(f"{path}: {name} is missing")
        if file.stat().st_size != recorded["bytes"] or sha256(file) != recorded["sha256"]:
            raise PackageError(f"{path}: {name} does not match the manifest; it was changed")


def check_weight_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Hold weight files against their recorded sizes and header hashes; values are not read.

    Raises:
        PackageError: a file is missing or was changed.
        CheckpointError: a file is no whole safetensors file.
    """
    for name, recorded in files.items():
        if not (path / name).is_file():
            raise PackageError(f"{path}: {name} is missing")
        file, _ = read_safetensors_header(path / name)
        if (file.size, file.header_sha256) != (recorded["bytes"], recorded["header_sha256"]):
            raise PackageError(f"{path}: {name} does not match the manifest; it was changed")
