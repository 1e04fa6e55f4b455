"""What of dual chunk attention no text reached is said in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qwenport.exporter import DualChunk
from qwenport.validate.budget import make_plan
from qwenport.validate.coverage import Counter
from qwenport.validate.scenarios import CHUNK_BORDERS
from qwenport.validate.text import Text

from .sessions import VOCABULARY, Diary, make_run, mini_config


def _counter(chunks: DualChunk | None, positions: int) -> Counter:
    plan = make_plan(
        mini_config(),
        budget="quick",
        seed=0,
        rows=1,
        capacity=positions,
        max_positions=positions,
        max_step_tokens=512,
        streamed=False,
    )
    return Counter(plan, VOCABULARY, chunks)


def _said(counter: Counter) -> str:
    found = [line for line in counter.coverage().left_out if "dual chunk" in line]
    assert len(found) <= 1
    return "".join(found)


@given(
    chunk=st.integers(2, 12),
    positions=st.integers(3, 60),
    texts=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 30)), max_size=4),
)
def test_borders_and_distances_that_no_text_reached(
    chunk: int, positions: int, texts: list[tuple[int, int]]
) -> None:
    counter = _counter(DualChunk(chunk + 1, 1, None), positions)
    pairs: set[tuple[int, int]] = set()  # of all chunks: (a key's, the query's)
    for first, count in texts:
        first, count = first % positions, min(count, positions - first % positions)
        text = Text((0,) * count, (count - 1,), first)
        counter.judged(SimpleNamespace(texts=[text]))  # type: ignore[arg-type]
        pairs |= {
            (key // chunk, (first + count - 1) // chunk) for key in range(first, first + count)
        }
    last = (positions - 1) // chunk
    said = _said(counter)
    for name, borders in (("first", [1]), ("second", [2]), ("later", list(range(3, last + 1)))):
        there = [border for border in borders if border <= last]
        crossed = any(key < border <= query for border in there for key, query in pairs)
        assert (f"the {name} border" in said) == (bool(there) and not crossed)
    far = any(query - key >= 2 for key, query in pairs)
    assert ("keys two chunks" in said) == (last >= 2 and not far)
    assert not said or f"in chunks of {chunk}," in said


def test_plain_attention_has_no_such_line() -> None:
    assert not _said(_counter(None, 100))


def test_short_texts_at_the_real_borders_see_no_older_chunk() -> None:
    """The scenario crosses every kind of border of Qwen2.5-1M, by texts of 48 tokens."""
    chunks = DualChunk(262144, 8192, 262144)
    counter = _counter(chunks, 1_010_000)
    session = Diary(1, 64, 1_010_000)
    run = make_run(session, counter.plan, chunk=chunks.chunk)
    CHUNK_BORDERS.run(run)
    assert "the first border" in _said(counter)
    counter.judged(run.observation())
    said: Any = _said(counter)
    assert "border" not in said and "keys two chunks or more" in said and "253952" in said
    counter.layer_distance["layer 0"] = 2 * chunks.chunk
    assert not _said(counter)
