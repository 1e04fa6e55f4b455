"""Zeros that cost nothing until they are written."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.engines.memory import untouched_zeros

MEGABYTE = 1 << 20
shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)
dtypes = st.sampled_from((np.float32, np.float16, np.uint16, np.int64, np.uint8))


@given(shapes, dtypes)
def test_they_are_zeros_that_can_be_written(shape: tuple[int, ...], dtype: Any) -> None:
    made = untouched_zeros(shape, dtype)
    assert made.shape == shape and made.dtype == dtype
    assert made.flags.writeable and made.flags.c_contiguous and not made.any()
    made[...] = 3
    assert (made == 3).all()
    assert not untouched_zeros(shape, dtype).any(), "no two share memory"


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="Linux tells what is resident")
def test_memory_is_resident_once_it_is_written_and_gone_with_the_array() -> None:
    """A gigabyte, of which a megabyte is written at 256 places: no huge pages, so no more than that and its pages."""
    gc.collect()
    start = resident()
    made = untouched_zeros((256, MEGABYTE), np.float32)
    assert resident() - start < 8 * MEGABYTE
    made[:, 500_000:501_024] = 1  # 4 kB in each of 256 places: two pages at most
    written = resident() - start
    assert 0.5 * MEGABYTE < written < 12 * MEGABYTE
    assert made[7, 499_999:500_002].tolist() == [0, 1, 1]
    made[:8] = 1  # 32 MB
    assert 30 * MEGABYTE < resident() - start - written < 40 * MEGABYTE
    del made
    gc.collect()
    assert resident() - start < 12 * MEGABYTE
