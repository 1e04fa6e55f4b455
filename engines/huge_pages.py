"""Huge pages for the weights that onnxruntime packs when it loads an engine.

A decode step reads every weight once. Linux gives onnxruntime pages of 4 KiB unless somebody asks for larger ones, and
with weights of a few bits the processor then waits for its page tables as well as for memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

HUGE = 2 << 20
"""Bytes of a huge page, where pages have 4 KiB."""
COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1 and newer, not defined in Python 3.11: copy pages into huge ones, now."""
MAPPINGS = Path("/proc/self/maps")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Range = tuple[int, int]


@contextmanager
def huge_pages() -> Iterator[None]:
    """Move the memory that the body allocates, and has written to, into huge pages.

    Nothing happens, and nothing is said, where the system has none, has them switched off, or is short of them.
    """
    if not _are_allowed():
        yield
        return
    before = _anonymous()
    yield
    libc = ctypes.CDLL(None)
    for start, end in _without(_anonymous(), before):
        for low, high in _resident(libc, start, end):
            libc.madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), COLLAPSE)


def _are_allowed() -> bool:
    try:
        return mmap.PAGESIZE == 4096 and "[never]" not in SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def _anonymous() -> list[Range]:
    """The process's private, writable memory that belongs to no file, in order."""
    found = []
    for line in MAPPINGS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, rights, *_, inode = line.split(maxsplit=5)[:5]
        if rights == "rw-p" and inode == "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((start, end))
    return found


def _without(ranges: list[Range], others: list[Range]) -> Iterator[Range]:
    """The parts of `ranges` that are in none of `others`: the kernel joins new memory to old. Both are in order."""
    for start, end in ranges:
        for low, high in others:
            if low < end and high > start:
                if start < low:
                    yield start, low
                start = high
        if start < end:
            yield start, end


def _resident(libc: ctypes.CDLL, start: int, end: int) -> Iterator[Range]:
    """Runs of whole huge pages in [start, end) whose every page has been written to."""
    start, end = -(-start // HUGE) * HUGE, end // HUGE * HUGE
    if start >= end:
        return
    pages = np.zeros((end - start) // mmap.PAGESIZE, dtype=np.uint8)
    address, size = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
    if libc.mincore(address, size, ctypes.c_void_p(pages.ctypes.data)) != 0:
        return
    whole = np.pad((pages & 1).reshape(-1, HUGE // mmap.PAGESIZE).all(axis=1), 1)
    edges = np.flatnonzero(np.diff(whole.astype(np.int8))).reshape(-1, 2)
    for low, high in edges.tolist():
        yield start + low * HUGE, start + high * HUGE
