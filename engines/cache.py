"""A cache on disk for what takes long to make again. It is safe to delete at any time.

Each entry is a directory below `$XDG_CACHE_HOME/qwenport`, named by a key that stands for everything its contents
depend on, so an entry never changes; one that grows is replaced. It is complete or absent, locked while it is read,
checked before, and made again if it is damaged. Those used least recently go first. Where directories cannot be locked,
nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwenport import QwenportError, __version__
from qwenport.contract import CACHE_FORMAT, CACHE_VERSION, MANIFEST
from qwenport.exporter import (
    FILES,
    Each,
    atomic_directory,
    check_files,
    check_listed,
    check_shape,
    check_weight_files,
    lock_directory,
    read_manifest,
    read_safetensors_header,
    sha256,
    write_json,
)
from qwenport.wording import size

MOST_CACHE_BYTES = 20_000_000_000
"""What all entries together may take, and never more than half of the space that they and the free disk have."""

_SHAPE = {
    "of": str,
    "files": FILES,
    "weights": Each({"bytes": int, "header_sha256": str, "state": [int]}),
}

_NAME = re.compile(r"\.?[a-z]+-[0-9a-f]{64}(\.[^/]*\.partial)?")
"""The name of an entry, and of the scratch directory in which it is written."""

Read = TypeVar("Read")


class CacheError(QwenportError):
    """Something cannot be kept: there is no room, or no place for a cache."""


@dataclass(frozen=True)
class Entry:
    """An entry, for people.

    Attributes:
        path: its directory.
        of: what it was made from.
        bytes: its size.
        used: when it was last used, in seconds since 1970.
    """

    path: Path
    of: str
    bytes: int
    used: float

    @property
    def kind(self) -> str:
        """What it holds: "model", "tokenizer" or "kernels"."""
        return self.path.name.strip(".").partition("-")[0]


def cache_folder() -> Path:
    """The directory of the cache, which need not exist: `$XDG_CACHE_HOME/qwenport`, by default in ~/.cache.

    Raises:
        CacheError: this user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG specification says
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise CacheError("there is no home directory to keep a cache in; set XDG_CACHE_HOME")
    return Path(base) / "qwenport"


def cache_key(kind: str, *parts: Any, code: tuple[Path, ...]) -> str:
    """The name of an entry.

    Args:
        kind: what the entry holds; the name begins with it.
        parts: what its contents depend on, as JSON writes it.
        code: source files, or folders of them, that make the contents; of one version there can be several.
    """
    digest = hashlib.sha256(json.dumps([__version__, *parts], sort_keys=True).encode())
    for place in code:
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return f"{kind}-{digest.hexdigest()}"


def cached(key: str, read: Callable[[Path], Read]) -> Read | None:
    """Call `read` with the directory of an entry, whose files have been checked and stay until it returns.

    Returns:
        Its result; None if there is no such entry, or it was damaged, which also removes it.
    """
    with suppress(CacheError):
        path = cache_folder() / key
        handle = lock_directory(path, shared=True)
        if handle is None:
            return None
        try:
            if not _is_at(handle, path):
                return None
            _check(path)
            with suppress(OSError):  # a cache that cannot be written can still be read
                os.utime(path)
            return read(path)
        except (QwenportError, OSError, ValueError, KeyError, TypeError):
            pass
        finally:
            os.close(handle)
        _remove(path)
    return None


def keep(
    key: str, fill: Callable[[Path], None], *, of: str, size_bytes: int, replace: bool = False
) -> None:
    """Add an entry; older ones make room for it. If it is there already, nothing happens.

    Args:
        key: its name.
        fill: writes its files into a directory. Of safetensors files, size, header, inode and times are checked later,
            of others the hash.
        of: what it is made from, for people.
        size_bytes: its size, or a bit more.
        replace: remove one that is there already, unless a process reads it.

    Raises:
        CacheError: there is no room.
        OSError, ExportError: it cannot be written.
    """
    path = cache_folder() / key
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_room(path.parent, size_bytes)
    if path.exists() and not (replace and _remove(path)):
        return
    with atomic_directory(path) as scratch:
        fill(scratch)
        names = sorted(file.name for file in scratch.iterdir())
        large = [name for name in names if name.endswith(".safetensors")]
        headers = {name: read_safetensors_header(scratch / name)[0] for name in large}
        manifest = {
            "format": CACHE_FORMAT,
            "format_version": CACHE_VERSION,
            "of": of,
            "files": {
                name: {"bytes": (scratch / name).stat().st_size, "sha256": sha256(scratch / name)}
                for name in names
                if name not in headers
            },
            "weights": {
                name: {
                    "bytes": header.size,
                    "header_sha256": header.header_sha256,
                    "state": file_state(scratch / name),
                }
                for name, header in headers.items()
            },
        }
        write_json(scratch / MANIFEST, manifest)


def file_state(file: Path) -> list[int]:
    """What changes if a file is written again or exchanged: inode, size, and the times of its last changes."""
    found = file.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def cache_entries() -> list[Entry]:
    """All entries, the one that was used last first.

    Raises:
        CacheError: see `cache_folder`.
    """
    folder, found = cache_folder(), []
    if os.path.lexists(folder) and not folder.is_dir():
        raise CacheError(f"{folder} is not a directory; remove it, or set XDG_CACHE_HOME")
    for path in _directories(folder):
        with suppress(OSError):
            of = "unfinished or damaged"
            with suppress(QwenportError, KeyError):
                of = read_manifest(path, CACHE_FORMAT, CACHE_VERSION, "")["of"]
            found.append(Entry(path, of, _bytes_of(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def clear_cache() -> tuple[int, int]:
    """Remove all entries, except those that a process is writing or opening.

    Returns:
        The number of entries removed, and their bytes.

    Raises:
        CacheError: see `cache_folder`.
    """
    alone = lock_directory(cache_folder(), wait=True)
    if alone is None:  # there is no cache
        return 0, 0
    try:
        removed = [entry for entry in cache_entries() if _remove(entry.path)]
    finally:
        os.close(alone)
    return len(removed), sum(entry.bytes for entry in removed)


def _check(path: Path) -> None:
    """Raises PackageError, CheckpointError, ValueError: the entry is not what was written."""
    manifest = read_manifest(path, CACHE_FORMAT, CACHE_VERSION, "clear the cache")
    check_shape(manifest, _SHAPE)
    check_listed(path, [*manifest["files"], *manifest["weights"]], ())
    check_files(path, manifest["files"])
    check_weight_files(path, manifest["weights"])
    for name, recorded in manifest["weights"].items():
        if file_state(path / name) != recorded["state"]:
            raise CacheError(f"{path / name} was changed")


def _make_room(folder: Path, needed: int) -> None:
    """Remove what killed processes left, and then the entries used least recently, until `needed` bytes fit.

    Raises:
        CacheError: they never will, or all that could go is in use.
    """
    alone = lock_directory(
        folder, wait=True
    )  # scratch directories are made and locked under this lock
    if alone is None:
        raise CacheError(f"{folder}: directories cannot be locked there")
    try:
        found = []
        for path in _directories(folder):
            if path.name.startswith("."):
                _remove(path)
            else:
                found.append((path.stat().st_mtime, _bytes_of(path), path))
        used = sum(count for _, count, _ in found)
        most = min(MOST_CACHE_BYTES, (shutil.disk_usage(folder).free + used) // 2)
        if needed > most:
            raise CacheError(
                f"{size(needed)} are needed, and the cache {folder} may take {size(most)}"
            )
        for _, count, path in sorted(found):
            if used + needed > most and _remove(path):
                used -= count
        if used + needed > most:
            raise CacheError(f"{folder}: full of entries in use")
    finally:
        os.close(alone)


def _directories(folder: Path) -> list[Path]:
    """The entries and scratch directories; anything else there is not ours to remove."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in folder.iterdir()
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _bytes_of(path: Path) -> int:
    """Bytes of an entry's files; those that vanish meanwhile count nothing."""
    total = 0
    for file in path.iterdir() if path.is_dir() else ():
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _is_at(handle: int, path: Path) -> bool:
    """Whether a directory is still where it was opened: it may have been removed before it was locked."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _remove(path: Path) -> bool:
    """Remove a directory unless a process has it locked."""
    handle = lock_directory(path)
    if handle is None:
        return False
    try:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)
    return not path.exists()
