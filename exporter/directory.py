"""Output directories: written next to their final path, flushed to disk and renamed when complete; their files' hashes.

A scratch directory is locked while its process lives. An unlocked one that this machine made was left by a process
that is gone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from qwenport.contract import MANIFEST
from qwenport.exporter.errors import ExportError
from qwenport.wording import size

try:
    import fcntl
except ImportError:  # not Unix: no process can be proven dead
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # locks may be local

Note = Callable[[str], None]
"""Called with a message for the user."""

_published: set[Path] = set()


@contextmanager
def atomic_directory(
    target: Path, *, force_clean: bool = False, note: Note = lambda text: None
) -> Iterator[Path]:
    """Yield a scratch directory that becomes `target` if the block succeeds and vanishes if it does not.

    Args:
        target: must not exist.
        force_clean: remove scratch directories for this target that another process may still be writing.
        note: called with a message for each scratch directory found.

    Raises:
        ExportError: target exists, its parent does not, it would be inside a package or an engine, or another process
            removed the scratch directory.
    """
    target = Path(os.path.abspath(target))
    if target.exists() or target.is_symlink():
        raise _exists(target)
    if not target.parent.is_dir():
        raise ExportError(f"{target.parent}: no such directory to write {target.name} in")
    for folder in target.resolve().parents:
        if (folder / MANIFEST).exists():
            raise ExportError(f"{target} would be inside {folder}, whose manifest lists its files")
    _published.discard(target)
    scratch, lock = _begin(target, force_clean, note)
    try:
        scratch.chmod(0o755)
        yield scratch
        _to_disk(scratch)
        _publish(scratch, target)
        _sync(target.parent)
    except BaseException as error:
        removed = not scratch.exists() and target not in _published
        shutil.rmtree(scratch, ignore_errors=True)
        if removed and isinstance(error, OSError):
            raise ExportError(
                f"{scratch} was removed while it was written, by --force-clean of another process perhaps"
            ) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def require_space(folder: Path, needed: int) -> None:
    """Raises ExportError: the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(f"not enough disk space: {size(needed)} needed, {size(free)} free")


def published(target: Path) -> bool:
    """Whether this process has published `target`."""
    return Path(os.path.abspath(target)) in _published


def _publish(scratch: Path, target: Path) -> None:
    """Rename, and record it; Ctrl-C takes effect before or after both."""
    with _without_interrupts():
        try:
            scratch.rename(target)
        except OSError as error:  # another process published first
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise _exists(target) from error
            raise
        _published.add(target)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Defer Ctrl-C until the context exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


def _exists(target: Path) -> ExportError:
    return ExportError(f"{target} exists already; choose another name or remove it")


def _begin(target: Path, force: bool, note: Note) -> tuple[Path, int | None]:
    """Remove what dead processes left, and make a scratch directory; returns it and its lock, released when we exit.

    One process does so at a time: a directory is never visible between its creation and its locking.
    """
    parent = lock_directory(target.parent, wait=True)
    try:
        _clear(target, force, note)
        prefix = f".{target.name}.{_HOST}-"
        try:
            made = tempfile.mkdtemp(prefix=prefix, suffix=SUFFIX, dir=target.parent)
        except FileNotFoundError as error:  # its parent is there: a file system of the kernel's own
            raise ExportError(f"{target}: no directory can be made in {target.parent}") from error
        return Path(made), lock_directory(Path(made))
    finally:
        if parent is not None:
            os.close(parent)


def _clear(target: Path, force: bool, note: Note) -> None:
    """Remove what killed processes left; report what may belong to a live one."""
    ours = re.compile(
        rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})-[a-z0-9_]{{8}}{re.escape(SUFFIX)}"
    )
    for scratch in sorted(target.parent.iterdir()):
        made = ours.fullmatch(scratch.name)
        if made is None or not scratch.is_dir() or scratch.is_symlink():
            continue
        dead = made[1] == _HOST and _is_dead(scratch)
        if dead or force:
            shutil.rmtree(scratch, ignore_errors=True)
        if scratch.exists():
            how = "cannot be removed" if dead or force else "--force-clean removes it"
            note(f"{scratch} is being written by another process, or was left by one; {how}")
        else:
            why = "left by a process that is gone" if dead else "as --force-clean asks"
            note(f"removed {scratch}, {why}")


def lock_directory(directory: Path, *, wait: bool = False, shared: bool = False) -> int | None:
    """A handle that holds a lock on a directory until it is closed.

    Args:
        directory: the directory to lock.
        wait: wait while others hold locks that exclude this one.
        shared: exclude only locks that are not shared.

    Returns:
        None if the system or the file system has no such locks, the directory is locked, or it does not exist.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _is_dead(scratch: Path) -> bool:
    """Whether it is certain that no process on this machine is writing the directory: its lock is free."""
    handle = lock_directory(scratch)
    if handle is None:
        return False
    os.close(handle)
    return True


def _to_disk(directory: Path) -> None:
    """Flush the files to disk, so that after a power failure every named file has its contents."""
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder) / name
            if file.stat().st_nlink == 1:  # a hard link shares the checkpoint's contents
                _sync(file)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync directories
            os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path | str) -> str:
    """The hex SHA-256 of a file's contents."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
