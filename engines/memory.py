"""Memory for caches: zeros that cost nothing until they are written, and used slots as bytes."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import FP16, Dtype

if TYPE_CHECKING:
    import torch

POISON = 2.0**100
"""Large against any key or value, and yet its product with a query is finite; bf16 and fp32 have it exactly."""
POISON_FP16 = 2.0**12

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


def poison(dtype: Dtype, start: int, end: int) -> NDArray[Any]:
    """The bits of what unused slots are filled with: +P for even slots and -P for odd ones, [end - start].

    Args:
        dtype: the cache's.
        start: the first slot.
        end: the slot after the last one.
    """
    if dtype == FP16:
        bits = np.array([POISON_FP16, -POISON_FP16], np.float16).view(np.uint16)
    else:
        bits = np.array([POISON, -POISON], np.float32).view(np.uint32)
        if dtype.itemsize == 2:  # bf16 is the upper half
            bits = (bits >> 16).astype(np.uint16)
    pattern: NDArray[Any] = bits[np.arange(start, end) % 2]
    return pattern


def poison_slots(cache: torch.Tensor, row: int, bits: NDArray[Any]) -> None:
    """Fill a row's last slots of a cache [rows, heads, slots, head_dim] with `poison`."""
    import torch

    values = torch.from_numpy(bits).view(cache.dtype).to(cache.device)
    cache[row, :, cache.shape[2] - len(bits) :] = values[:, None]
