"""Output directories: whole or not at all, whoever else writes, dies or is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenport.contract import MANIFEST
from qwenport.exporter import ExportError, atomic_directory, directory, published

# writes a directory, then waits until it is told to go on
WRITER = """
import sys, time
from pathlib import Path
from qwenport.exporter import atomic_directory
target, go = Path(sys.argv[1]), Path(sys.argv[2])
with atomic_directory(target) as scratch:
    (scratch / "file").write_text("whole")
    print(scratch, flush=True)
    while not go.exists():
        time.sleep(0.01)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Callable[[str], tuple[subprocess.Popen[str], Path]]:
    """Starts a process that writes `tmp_path`/name until `tmp_path`/go exists; returns it and its scratch directory."""

    def start(name: str) -> tuple[subprocess.Popen[str], Path]:
        command = [sys.executable, "-c", WRITER, str(tmp_path / name), str(tmp_path / "go")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    return start


def write(target: Path, **options: bool) -> list[str]:
    """Write a directory; returns the notes."""
    notes: list[str] = []
    with atomic_directory(target, note=notes.append, **options) as scratch:
        (scratch / "file").write_text("mine")
    return notes


def test_of_two_at_once_the_slower_is_told_that_it_exists(
    writer: Callable[[str], tuple[subprocess.Popen[str], Path]], tmp_path: Path
) -> None:
    process, scratch = writer("a")
    (note,) = write(tmp_path / "a")
    assert str(scratch) in note and "--force-clean" in note and scratch.is_dir()
    (tmp_path / "go").touch()
    _, error = process.communicate(timeout=20)
    assert process.returncode == 1 and "exists already" in error
    assert (tmp_path / "a" / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "go"]


def test_what_a_killed_process_left_is_removed_and_named(
    writer: Callable[[str], tuple[subprocess.Popen[str], Path]], tmp_path: Path
) -> None:
    process, scratch = writer("a")
    process.kill()
    process.wait(20)
    assert scratch.is_dir()
    (note,) = write(tmp_path / "a")
    assert note == f"removed {scratch}, left by a process that is gone"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_another_machine_s_is_never_taken_for_dead(
    writer: Callable[[str], tuple[subprocess.Popen[str], Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, scratch = writer("a")
    process.kill()
    process.wait(20)
    monkeypatch.setattr(directory, "_HOST", "0" * 8)
    write(tmp_path / "a")
    assert scratch.is_dir()


def test_force_removes_what_is_being_written_and_its_writer_says_so(
    writer: Callable[[str], tuple[subprocess.Popen[str], Path]], tmp_path: Path
) -> None:
    process, scratch = writer("a")
    assert write(tmp_path / "a", force_clean=True) == [f"removed {scratch}, as --force-clean asks"]
    (tmp_path / "go").touch()
    _, error = process.communicate(timeout=20)
    assert process.returncode == 1 and "was removed while it was written" in error
    assert (tmp_path / "a" / "file").read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_other_directories_are_left_alone(
    force: bool, writer: Callable[[str], tuple[subprocess.Popen[str], Path]], tmp_path: Path
) -> None:
    process, scratch = writer("a.v2")
    others = [".a.partial", ".a.b.partial", ".a.0123.partial", ".b.01234567-abcdefgh.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    assert write(tmp_path / "a", force_clean=force) == []
    assert scratch.is_dir() and all((tmp_path / name).is_dir() for name in others)
    (tmp_path / "go").touch()
    process.communicate(timeout=20)
    assert process.returncode == 0 and (tmp_path / "a.v2" / "file").read_text() == "whole"


def test_many_at_once_leave_one_whole_directory_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a"), str(tmp_path / "go")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes.count(0) == 1, said
    assert all("exists already" in text for text, code in zip(said, codes, strict=True) if code)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "go"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_directory(tmp_path / "a") as scratch:
            (scratch / "file").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == [] and not published(tmp_path / "a")


def test_files_and_folders_are_on_the_disk_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(handle: int) -> None:
        happened.append(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def rename(self: Path, target: Path) -> Path:
        happened.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    with atomic_directory(tmp_path / "a") as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "file").write_text("x")
    before = happened[: happened.index("rename")]
    assert set(before) == {str(scratch / "inner" / "file"), str(scratch / "inner"), str(scratch)}
    assert happened[happened.index("rename") + 1 :] == [str(tmp_path)]


INTERRUPTED = """
    import os, signal, sys
    from pathlib import Path
    from qwenport import cli
    from qwenport.exporter import directory
    real = Path.rename
    def rename(self, target):
        if sys.argv[3] == "before":
            os.kill(os.getpid(), signal.SIGINT)
        made = real(self, target)
        if sys.argv[3] == "after":
            os.kill(os.getpid(), signal.SIGINT)
        return made
    Path.rename = rename
    if sys.argv[3] == "late":
        sync = directory._sync
        def late(path):
            sync(path)
            if path == Path(sys.argv[2]).parent:
                os.kill(os.getpid(), signal.SIGINT)
        directory._sync = late
    if sys.argv[3] == "early":
        disk = directory._to_disk
        def early(path):
            disk(path)
            os.kill(os.getpid(), signal.SIGINT)
        directory._to_disk = early
    sys.exit(cli.main(["export", sys.argv[1], sys.argv[2], "-q"]))
"""


@pytest.mark.parametrize("when", ["early", "before", "after", "late"])
def test_ctrl_c_around_the_rename_is_130_or_success_and_never_both(
    when: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "package"
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tiny_checkpoint)]
    done = subprocess.run([*command, str(target), when], capture_output=True, text=True, timeout=60)
    assert done.returncode == (130 if when == "early" else 0), done.stderr
    assert target.is_dir() == (done.returncode == 0)
    assert [p.name for p in tmp_path.iterdir()] == ([] if when == "early" else ["package"])


def test_the_interrupt_of_a_slower_process_is_no_success(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has written the target meanwhile."""
    from qwenport import cli

    def interrupt(scratch: Path) -> None:
        (tmp_path / "package").mkdir()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(directory, "_to_disk", interrupt)
    assert cli.main(["export", str(tiny_checkpoint), str(tmp_path / "package"), "-q"]) == 130


def test_a_parent_that_is_missing_or_a_target_that_is_there(tmp_path: Path) -> None:
    for target in (tmp_path / "no" / "a", tmp_path):
        with pytest.raises(ExportError), atomic_directory(target):
            raise AssertionError


def test_nothing_is_put_inside_a_package_or_an_engine(tmp_path: Path) -> None:
    (tmp_path / "package" / "weights").mkdir(parents=True)
    (tmp_path / "package" / MANIFEST).touch()
    (tmp_path / "link").symlink_to("package")
    for target in ("package/a", "package/weights/a", "link/a"):
        with (
            pytest.raises(ExportError, match=r"would be inside .*package, whose manifest"),
            atomic_directory(tmp_path / target),
        ):
            raise AssertionError
