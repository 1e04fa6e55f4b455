"""The cache: bounded, shared by processes, and nobody's files but its own are removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Capture, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenport import cli, engines
from qwenport.engines import cache
from qwenport.exporter import lock_directory

MANIFEST_BYTES = 1000  # at least those of an entry's manifest


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "qwenport"


def fill_with(count: int) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "data").write_bytes(bytes(count))

    return fill


def entry(letter: str) -> str:
    """The name of an entry."""
    return f"test-{letter * 64}"


def keep(letter: str, count: int) -> None:
    engines.keep(entry(letter), fill_with(count), of="x", size_bytes=count + MANIFEST_BYTES)


def size_of_data(path: Path) -> int:
    return (path / "data").stat().st_size


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} if root.is_dir() else set()


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=25),
    data=st.data(),
)
def test_what_stays_is_what_a_list_in_order_of_use_says(
    steps: list[tuple[str, bool]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes = {name: data.draw(st.integers(1, 60_000), name) for name in "abcdef"}
    limit, home = 100_000, tmp_path_factory.mktemp("home")
    order: dict[str, int] = {}  # the entry used least recently first -> its size on disk
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(cache, "MOST_CACHE_BYTES", limit)
        folder = home / "qwenport"
        for time, (letter, write) in enumerate(steps):
            name, size = entry(letter), sizes[letter]
            if name in order:
                assert engines.cached(name, size_of_data) == size
                order[name] = order.pop(name)
            elif write:
                keep(letter, size)
                for oldest in [*order]:
                    if sum(order.values()) + size + MANIFEST_BYTES > limit:
                        del order[oldest]
                order[name] = sum(file.stat().st_size for file in (folder / name).iterdir())
            else:
                assert engines.cached(name, size_of_data) is None
                continue
            os.utime(folder / name, (time, time))  # clocks may be coarse
            assert names(folder) == {*order}
            assert sum(order.values()) <= limit
    shutil.rmtree(home)


def test_the_entry_used_least_recently_goes_first(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_CACHE_BYTES", 40_000)
    for time, name in enumerate("abc"):
        keep(name, 10_000)
        os.utime(root / entry(name), (time, time))
    assert engines.cached(entry("a"), size_of_data)  # now b is the oldest
    keep("d", 10_000)
    assert names(root) == {entry("a"), entry("c"), entry("d")}


def test_an_entry_in_use_is_neither_evicted_nor_cleared(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_CACHE_BYTES", 15_000)
    keep("a", 10_000)

    def meanwhile(path: Path) -> bytes:
        with pytest.raises(engines.CacheError, match="in use"):
            keep("b", 10_000)
        assert engines.clear_cache() == (0, 0)
        return (path / "data").read_bytes()

    assert engines.cached(entry("a"), meanwhile) == bytes(10_000)
    keep("b", 10_000)
    assert names(root) == {entry("b")}


def test_what_a_killed_process_left_goes_and_what_a_live_one_writes_stays(root: Path) -> None:
    left, live = (root / f".{entry(letter)}.12345678-abcdefgh.partial" for letter in "ab")
    for folder in (left, live):
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(bytes(100))
    handle = lock_directory(live)
    assert handle is not None
    try:
        keep("c", 1)
        assert names(root) == {live.name, entry("c")}
    finally:
        os.close(handle)


def test_at_most_half_of_the_free_disk_is_taken(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    usage = shutil.disk_usage("/")._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    keep("a", 10_000)
    with pytest.raises(
        engines.CacheError, match="may take 20"
    ):  # half of 30 kB and the entry's own 10
        keep("b", 20_000)


def test_the_default_is_below_home_and_no_home_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert engines.cache_folder() == tmp_path / ".cache" / "qwenport"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert cli.main(["cache", "list"]) == 2
    assert "no home directory" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["list", "clear"])
def test_a_file_in_the_cache_s_place_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "qwenport").touch()
    assert "is not a directory" in refused(capsys, "cache", command)


def test_what_is_no_entry_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be somebody's checkout of Qwenport."""
    monkeypatch.setattr(cache, "MOST_CACHE_BYTES", 15_000)
    (root / "docs").mkdir(parents=True)
    (root / "docs" / "page.md").write_text("x" * 20_000)
    (root / "docs-1").symlink_to(root / "docs")
    keep("a", 10_000)
    keep("b", 10_000)
    assert engines.clear_cache()[0] == 1
    assert names(root) == {"docs", "docs-1"} and (root / "docs" / "page.md").is_file()
