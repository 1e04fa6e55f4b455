"""qwenport.json: the manifest of a package or an engine directory, and its checks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from qwenport import QwenportError
from qwenport.contract import ENGINE_FORMAT, MANIFEST, MODEL, PACKAGE_FORMAT, PLAN
from qwenport.exporter.directory import sha256
from qwenport.exporter.errors import PackageError
from qwenport.exporter.json_file import read_json
from qwenport.exporter.keys import short
from qwenport.exporter.safetensors_file import read_safetensors_header

MOST_BYTES = 1 << 24

Kind = Literal["checkpoint", "package", "engine"]
"""The kinds of directory."""
_KINDS: dict[str, Kind] = {PACKAGE_FORMAT: "package", ENGINE_FORMAT: "engine"}


def kind_of(path: Path | str) -> Kind:
    """The kind of a directory. Its contents are not checked here; opening it does that.

    Raises:
        PackageError: no such directory, or not of the three kinds; says what it is and what to do.
    """
    path = Path(path)
    if (wrong := why_no_directory(path)) is not None:
        raise PackageError(wrong)
    if (path / MANIFEST).is_file():
        try:
            return _KINDS[_read(path / MANIFEST)["format"]]
        except KeyError as error:
            raise PackageError(f"{path / MANIFEST}: not a Qwenport manifest") from error
    if (path / MODEL).is_file() or (path / PLAN).is_file():
        raise PackageError(f"{path}: has no {MANIFEST}; it is not a whole package or engine")
    if (path / "config.json").is_file():
        return "checkpoint"
    raise PackageError(
        f"{path}: neither a package nor an engine (no {MANIFEST}), nor a checkpoint (no config.json)"
    )


def as_json(data: dict[str, Any]) -> dict[str, Any]:
    """`data` after a round trip through JSON: tuples become lists."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    return result


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a manifest, indented and with a final newline."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(path: Path, format_name: str, format_version: int, remedy: str) -> dict[str, Any]:
    """Read `path`/qwenport.json and check its format and version.

    Raises:
        PackageError: not a directory of this format, not JSON, or another version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise PackageError(f"{path}: no {MANIFEST}; not a {format_name.replace('-', ' ')}")
    manifest = _read(file)
    found, version = manifest["format"], manifest.get("format_version")
    if found != format_name:
        raise PackageError(f"{path}: holds a {found}, expected a {format_name}")
    if type(version) is not int or version != format_version:
        raise PackageError(
            f"{path}: {format_name} format version {short(version)}, this Qwenport reads {format_version}; {remedy}"
        )
    return manifest


def _read(file: Path) -> dict[str, Any]:
    """Read a manifest, recognised by its format's name.

    Raises:
        PackageError: it is not a manifest.
    """
    try:
        manifest = read_json(file, MOST_BYTES, unique=True)
    except (OSError, ValueError) as error:
        raise PackageError(f"{file}: not a Qwenport manifest ({error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), str):
        raise PackageError(f"{file}: not a Qwenport manifest (it names no format)")
    return manifest


def why_no_directory(path: Path) -> str | None:
    """What a path that is not a directory is, and what to do, in one sentence; None for a directory."""
    if path.is_dir():
        return None
    if not path.exists():
        hub = re.fullmatch(
            r"(?:https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)", str(path)
        )
        if hub:
            return (
                f"{path}: no such directory. If it is a model on the Hugging Face Hub, fetch it first: "
                f"hf download {hub[1]} --local-dir {path.name}"
            )
        return f"{path}: no such directory"
    if path.suffix == ".gguf":
        return (
            f"{path}: a GGUF file, whose weights are quantized for llama.cpp; export reads the Hugging Face checkpoint "
            "that it was made from"
        )
    if path.suffix == ".safetensors":
        return f"{path}: a single weight file; give the directory that holds it and its config.json"
    return f"{path}: a file; a checkpoint is a directory with config.json and safetensors files"


@dataclass(frozen=True)
class Each:
    """The shape of an object with arbitrary keys.

    Attributes:
        of: the shape of each value.
    """

    of: Any


@dataclass(frozen=True)
class Maybe:
    """The shape of a value that may be null.

    Attributes:
        of: the shape of any other value.
    """

    of: Any


BINDING = {"name": str, "dtype": str, "shape": [(int, str)]}
BINDINGS = {"inputs": [BINDING], "outputs": [BINDING]}
"""Shape, for `check_shape`, of a manifest's bindings."""
SOURCE = {
    "dtype": str,
    "prefix": str,
    "converted": Each(int),
    "notes": [str],
    "adapter": Maybe({"config_sha256": str, "sha256": str, "matrices": int}),
    "quantized": Maybe(
        {
            "config_sha256": str,
            "files": [{"name": str, "bytes": int, "header_sha256": str}],
        }
    ),
    "config_sha256": str,
    "files": [{"name": str, "bytes": int, "header_sha256": str}],
}
"""Shape of a manifest's entry for the checkpoint."""
FILES = Each({"bytes": int, "sha256": str})
"""Shape of a manifest's file list."""


def check_shape(value: Any, shape: Any, where: str = "the manifest") -> None:
    """Check a value of a manifest against the types its readers expect.

    Args:
        shape: one type or several, [shape] of a list's items, {key: shape} of an object that may have more keys,
            `Each` or `Maybe`.
        where: the path to the value, for the message.

    Raises:
        ValueError: it has another shape; says where.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.of, where)
        return
    inside: list[tuple[Any, Any, str]] = []
    kind: Any = shape
    if isinstance(shape, list):
        kind = list
        if isinstance(value, list):
            inside = [(item, shape[0], f"{where}[{index}]") for index, item in enumerate(value)]
    elif isinstance(shape, Each):
        kind = dict
        if isinstance(value, dict):
            inside = [(item, shape.of, f"{where}.{key}") for key, item in value.items()]
    elif isinstance(shape, dict):
        kind = dict
        if isinstance(value, dict):
            missing = [key for key in shape if key not in value]
            if missing:
                raise ValueError(f"{where} lacks {missing[0]}")
            inside = [(value[key], of, f"{where}.{key}") for key, of in shape.items()]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} is {short(value)}")
    if isinstance(value, int) and not 0 <= value < 1 << 63:
        raise ValueError(f"{where} is {short(value)}")
    for item, of, place in inside:
        check_shape(item, of, place)


@contextmanager
def damaged(file: Path) -> Iterator[None]:
    """Turn any exception that a file's unexpected contents raise into a PackageError that names the file."""
    try:
        yield
    except QwenportError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,  # onnx-ir's own, too
        StopIteration,
        TypeError,
        ValueError,
    ) as error:
        raise PackageError(f"{file}: damaged ({error})") from error


def check_listed(
    path: Path, names: Sequence[str], needed: Sequence[str], *, unlisted: Sequence[str] = ()
) -> None:
    """Compare a directory's files with its manifest's list: no other files but `unlisted`, and no links.

    Raises:
        PackageError: a name leads outside, a file is a symbolic link or not listed, or a needed file is not listed.
    """
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise PackageError(f"{path / MANIFEST} names {name!r}, which is outside the directory")
    missing = [name for name in needed if name not in names]
    if missing:
        raise PackageError(f"{path / MANIFEST} does not list {missing[0]}")
    listed = {*names, MANIFEST, *unlisted}
    for folder, folders, files in os.walk(path):
        for name in (*files, *folders):
            found = Path(folder) / name
            relative = found.relative_to(path).as_posix()
            if found.is_symlink():
                raise PackageError(
                    f"{path}: {relative} is a symbolic link; a package holds files only"
                )
            if name in files and relative not in listed:
                raise PackageError(f"{path}: {relative} is not in the manifest; it was added later")


def check_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Compare files with the sizes and hashes in a manifest.

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
    """Compare weight files with their recorded sizes and header hashes; values are not read.

    Raises:
        PackageError: a file is missing or was changed.
        CheckpointError: a file is not a complete safetensors file.
    """
    for name, recorded in files.items():
        if not (path / name).is_file():
            raise PackageError(f"{path}: {name} is missing")
        file, _ = read_safetensors_header(path / name)
        if (file.size, file.header_sha256) != (recorded["bytes"], recorded["header_sha256"]):
            raise PackageError(f"{path}: {name} does not match the manifest; it was changed")
