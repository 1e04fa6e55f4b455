"""Memory for caches: zeros that cost nothing until they are written."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, which Python 3.11 does not name


def untouched_zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Zeros in pages that the system makes when they are first written.

    A cache of many rows and slots is mostly empty. Huge pages are declined where the system has them: one written slot
    would otherwise cost two megabytes.

    Args:
        shape: of the array.
        dtype: what NumPy takes for one.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype=dtype, count=size // np.dtype(dtype).itemsize).reshape(shape)
