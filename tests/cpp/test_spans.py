"""C++ has the same spans as Python."""

from __future__ import annotations

import ctypes as c

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwenport.contract import MOST_SCORES, SCORE_BYTES
from qwenport.engines.session import CachedSession
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


@given(st.integers(1, 1000), st.data())
def test_the_largest_span_within_a_number_of_slots(
    library: Library, multiple: int, data: st.DataObject
) -> None:
    slots = data.draw(st.integers(1, 20) | st.integers(multiple, 50 * multiple))
    spans = Spans(multiple, slots)
    all_spans = sorted({spans.holding(count) for count in range(1, slots + 1)})
    most = data.draw(st.integers(0, slots + multiple) | st.sampled_from(all_spans))
    function = library.c.test_span_within
    function.argtypes, function.restype = [c.c_int64] * 3, c.c_int64
    assert function(most, multiple, slots) == max([0, *(s for s in all_spans if s <= most)])


class Narrow(CachedSession):
    """A session that runs nothing."""

    def _step(self, feeds: object) -> np.ndarray:
        raise AssertionError


@given(st.integers(1, 64), st.integers(1, 4096), st.integers(1, 2**22), st.integers(0, 64))
def test_the_scores_that_fit_are_python_s(
    library: Library, rows: int, width: int, span: int, heads: int
) -> None:
    session = Narrow(
        max_batch=1,
        capacity=1,
        vocab_size=9,
        max_step_tokens=9,
        max_step_logits=9,
        max_positions=9,
        score_bytes=heads * SCORE_BYTES,
    )
    function = library.c.test_scores_fit
    function.argtypes, function.restype = [c.c_int64] * 5, c.c_bool
    fits = function(rows, width, span, heads * SCORE_BYTES, MOST_SCORES)
    assert fits == session._fits(rows, width, span)
