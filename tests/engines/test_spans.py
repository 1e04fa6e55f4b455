"""Active spans of a cache: multiples of the first, each an eighth larger than the last, so few of them."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.contract import SPAN_MULTIPLE
from qwenport.engines.spans import Spans

SPANS = st.builds(
    Spans,
    multiple=st.sampled_from([1, 64, 256]) | st.integers(1, 5000),
    slots=st.integers(1, 40_000),
)


@given(SPANS)
def test_each_span_is_the_next_multiple_that_is_an_eighth_larger(spans: Spans) -> None:
    every = list(spans)
    assert every[0] == min(spans.multiple, spans.slots) and every[-1] == spans.slots
    assert len(spans) == len(every) and every == sorted(set(every))
    for span, larger in itertools.pairwise(every):
        assert span % spans.multiple == 0
        multiples = math.ceil(Fraction(span * 9, 8 * spans.multiple))
        multiples = max(multiples, span // spans.multiple + 1)
        assert larger == min(multiples * spans.multiple, spans.slots)


@given(SPANS, st.data())
def test_a_step_s_span_is_the_smallest_that_holds_it(spans: Spans, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, spans.slots))
    assert spans.holding(count) == min(span for span in spans if span >= count)


@pytest.mark.parametrize(("multiple", "most"), [(SPAN_MULTIPLE, 41), (256, 29), (32768, 1)])
def test_a_long_cache_has_few_spans(multiple: int, most: int) -> None:
    spans = Spans(multiple, 32768)
    assert len(spans) == most
    assert all(
        spans.holding(count) <= max(count * 1.25, count + multiple)
        for count in range(1, 32769, 37)
        if multiple < 32768
    )
