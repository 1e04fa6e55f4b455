"""C++ has the same spans as Python."""

from __future__ import annotations

import ctypes as c

from hypothesis import given
from hypothesis import strategies as st

from qwenport.engines.spans import Spans

from .runtime import Library

LARGEST = 2**31 - 1


def holding(library: Library, count: int, multiple: int, slots: int) -> int:
    function = library.c.test_span_holding
    function.argtypes, function.restype = [c.c_int64] * 3, c.c_int64
    return int(function(count, multiple, slots))


def test_every_length_of_usual_caches(library: Library) -> None:
    for multiple, slots in ((64, 512), (64, 32768), (256, 8192), (256, 8000), (8192, 8192)):
        spans = Spans(multiple, slots)
        for count in range(1, slots + 1):
            assert holding(library, count, multiple, slots) == spans.holding(count)


@given(st.integers(1, LARGEST), st.integers(1, LARGEST), st.data())
def test_any_cache(library: Library, multiple: int, slots: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, slots) | st.integers(1, min(slots, 100_000)))
    assert holding(library, count, multiple, slots) == Spans(multiple, slots).holding(count)
