"""Output directories: written beside their final place and renamed when whole; their files hashed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwenport.exporter.errors import ExportError


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `target` if the block succeeds and vanishes if it does not.

    Raises:
        ExportError: target exists, or its parent does not.
    """
    target = Path(os.path.abspath(target))
    if target.exists() or target.is_symlink():
        raise ExportError(f"{target} exists already; choose another name or remove it")
    if not target.parent.is_dir():
        raise ExportError(f"{target.parent}: no such directory to write {target.name} in")
    scratch = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    )
    try:
        scratch.chmod(0o755)
        yield scratch
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
