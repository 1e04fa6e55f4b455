"""Memory that a block of code allocates is moved into huge pages, and no other."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.engines import build, onnxruntime_session, open_session
from qwenport.engines import huge_pages as room
from qwenport.exporter import export

EXAMPLES = Path(__file__).parents[2] / "examples"

SIZE = 8 * room.HUGE
HUGE_KB = room.HUGE >> 10


def allocate(written: int) -> mmap.mmap:
    """Anonymous memory, something written to each of its first pages."""
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for index in range(0, written, mmap.PAGESIZE):
        memory[index] = 1
    return memory


def written_pages(memory: mmap.mmap) -> int:
    return sum(memory[index] for index in range(0, SIZE, mmap.PAGESIZE))


def in_huge_pages() -> int:
    """KiB of the process."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^AnonHugePages: +(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def resident() -> int:
    """KiB of the process."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Rss: +(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


needs_huge_pages = pytest.mark.skipif(
    not room._are_allowed(), reason="huge pages are switched off, or the system has none"
)


@needs_huge_pages
def test_new_memory_and_no_older() -> None:
    old = allocate(SIZE)
    before = in_huge_pages()
    with room.huge_pages():
        new = allocate(SIZE)
    grown = in_huge_pages() - before
    assert 6 * HUGE_KB <= grown <= 9 * HUGE_KB, grown
    assert written_pages(new) == written_pages(old) == SIZE // mmap.PAGESIZE


@needs_huge_pages
def test_what_was_not_written_costs_nothing() -> None:
    with room.huge_pages():
        memory = allocate(SIZE // 2)
        before = resident()
    assert resident() - before < HUGE_KB
    assert written_pages(memory) == SIZE // 2 // mmap.PAGESIZE


def test_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(room, "SETTING", setting)
    before = in_huge_pages()
    with room.huge_pages():
        memory = allocate(SIZE)
    assert in_huge_pages() <= before
    monkeypatch.setattr(room, "SETTING", tmp_path / "missing")
    with room.huge_pages():
        memory.close()


def test_an_error_passes() -> None:
    with pytest.raises(KeyError), room.huge_pages():
        raise KeyError


ranges = st.lists(st.integers(0, 60), unique=True, max_size=12).map(
    lambda edges: [*zip(*[iter(sorted(edges))] * 2, strict=False)]
)


@given(ranges, ranges)
def test_without_is_the_difference_of_sets(
    some: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    def points(found: list[tuple[int, int]]) -> set[int]:
        return {point for start, end in found for point in range(start, end)}

    found = [*room._without(some, others)]
    assert all(start < end for start, end in found)
    assert points(found) == points(some) - points(others)
    assert sum(end - start for start, end in found) == len(points(found))


@pytest.mark.parametrize("name", ["tiny-qwen2.5", "quantized/w4a16"])
def test_only_for_engines_of_few_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = export(EXAMPLES / name, tmp_path / "package")
    engine = build(
        package.path, tmp_path / "engine", target="onnxruntime", make_proof=lambda package: None
    )
    entered: list[bool] = []

    @contextmanager
    def seen() -> Iterator[None]:
        entered.append(True)
        yield

    monkeypatch.setattr(onnxruntime_session, "huge_pages", seen)
    open_session(engine.path)
    assert entered == [True] * ("quantized" in name)
