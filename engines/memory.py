"""Memory for caches: zeros that cost nothing until they are written, and used slots as bytes."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, not defined in Python 3.11


def untouched_zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Zeros in pages that the system allocates on the first write.

    A cache of many rows and slots is mostly empty. Huge pages are declined where the system has them: one written slot
    would otherwise cost two megabytes.

    Args:
        shape: shape of the array.
        dtype: anything NumPy accepts as a dtype.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype=dtype, count=size // np.dtype(dtype).itemsize).reshape(shape)


def read_slots(cache: torch.Tensor, row: int, count: int) -> NDArray[np.uint8]:
    """The first `count` slots of a row of a cache [rows, heads, slots, head_dim], as bytes [heads, count, ...]."""
    import torch

    data: NDArray[np.uint8] = (
        cache[row, :, :count].contiguous().view(torch.uint8).cpu().numpy().copy()
    )
    return data


def write_slots(cache: torch.Tensor, row: int, data: NDArray[np.uint8]) -> None:
    """The inverse of `read_slots`."""
    import torch

    values = torch.from_numpy(np.ascontiguousarray(data)).view(cache.dtype)
    cache[row, :, : data.shape[1]] = values.to(cache.device)
