"""A session saved and restored is the same session: as transformers' own cache would go on, in another process too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.engines import CapacityError, SnapshotError, open_session
from qwenport.engines import snapshot as snapshot_
from qwenport.engines.session import CachedSession
from qwenport.exporter import export

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2.5"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(TINY, tmp_path_factory.mktemp("snapshots") / "package").path


@pytest.fixture(scope="module")
def sessions(package: Path) -> tuple[CachedSession, CachedSession]:
    """Two on one package, of different capacities."""
    return open_session(package, max_batch=3, capacity=64), open_session(
        package, max_batch=3, capacity=128
    )


ids = st.integers(0, 1000)


@given(
    rows=st.lists(st.lists(ids, max_size=20), min_size=3, max_size=3).filter(any),
    more=st.lists(st.lists(ids, max_size=4), min_size=3, max_size=3).filter(any),
    kept=st.integers(0, 20),
)
def test_what_is_restored_goes_on_as_if_it_had_never_stopped(
    sessions: tuple[CachedSession, CachedSession],
    rows: list[list[int]],
    more: list[list[int]],
    kept: int,
) -> None:
    first, second = sessions
    first.reset()
    first.prefill(rows)
    first.truncate(min(kept, len(rows[0])))
    snapshot = first.save()
    expected = first.prefill(more)
    second.reset()
    second.prefill([[7, 7, 7]] * 3)  # what it held is gone
    second.restore(snapshot)
    assert second.lengths.tolist() == [min(kept, len(rows[0])), len(rows[1]), len(rows[2])]
    assert second.save() == snapshot
    for ours, theirs in zip(second.prefill(more), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_the_slots_in_use_are_saved(sessions: tuple[CachedSession, CachedSession]) -> None:
    session = sessions[0]
    session.reset()
    empty = len(session.save())
    session.prefill([[1, 2, 3, 4]])
    four = len(session.save())
    session.prefill([[], [1, 2, 3, 4]])
    assert len(session.save()) - four == pytest.approx(four - empty, abs=64)


def test_another_process_goes_on(package: Path, tmp_path: Path) -> None:
    session = open_session(package, max_batch=1, capacity=64)
    session.prefill([[5, 6, 7]])
    (tmp_path / "snapshot").write_bytes(session.save())
    expected = session.decode([8])
    script = (
        "import sys, numpy\n"
        "from qwenport.engines import open_session\n"
        "session = open_session(sys.argv[1], max_batch=1, capacity=64)\n"
        "session.restore(open(sys.argv[2], 'rb').read())\n"
        "numpy.save(sys.argv[3], session.decode([8]))\n"
    )
    files = [package, tmp_path / "snapshot", tmp_path / "logits.npy"]
    subprocess.run([sys.executable, "-c", script, *map(str, files)], check=True)
    np.testing.assert_allclose(np.load(files[2]), expected, rtol=1e-4, atol=1e-4)


def test_a_snapshot_that_does_not_fit_leaves_the_session_as_it_was(
    package: Path, sessions: tuple[CachedSession, CachedSession], tmp_path: Path
) -> None:
    small, large = sessions
    large.reset()
    large.prefill([list(range(100))])
    small.reset()
    small.prefill([[1, 2]])
    before = small.save()
    with pytest.raises(CapacityError, match="row 0 holds 100 tokens; there are 64 slots"):
        small.restore(large.save())
    other = export(TINY, tmp_path / "other", max_seq_len=64).path
    with pytest.raises(SnapshotError, match="of another package"):
        small.restore(open_session(other, max_batch=3).save())
    with pytest.raises(SnapshotError, match=r"of 1 rows, this session has 3"):
        small.restore(open_session(package, max_batch=1).save())
    for wrong in (b"", b"x" * 200, None, "text"):
        with pytest.raises(SnapshotError):
            small.restore(wrong)  # type: ignore[arg-type]
    assert small.save() == before


@given(data=st.data())
def test_a_damaged_snapshot_is_refused(
    sessions: tuple[CachedSession, CachedSession], data: st.DataObject
) -> None:
    session = sessions[0]
    session.reset()
    session.prefill([[1, 2, 3], [4]])
    snapshot = bytearray(session.save())
    place = data.draw(st.integers(0, len(snapshot) - 1))
    if data.draw(st.booleans()):
        snapshot[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del snapshot[place:]
    with pytest.raises(SnapshotError):
        session.restore(bytes(snapshot))
    assert session.lengths.tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    "change",
    [
        lambda facts, arrays: facts.pop("of"),
        lambda facts, arrays: facts.pop("first_position"),
        lambda facts, arrays: facts.update(first_position=-1),
        lambda facts, arrays: facts.update(first_position=10**6),
        lambda facts, arrays: facts.update(first_position="0"),
        lambda facts, arrays: facts.pop("lengths"),
        lambda facts, arrays: facts.update(lengths=3),
        lambda facts, arrays: facts.update(lengths=["3", 2, 0]),
        lambda facts, arrays: facts.update(lengths=[-1, 2, 0]),
        lambda facts, arrays: facts.update(lengths=[4, 2, 0]),
        lambda facts, arrays: facts.update(lengths=[2, 2, 0]),
        lambda facts, arrays: facts.update(lengths=[True, 2, 0]),
        lambda facts, arrays: arrays.pop("0.tokens"),
        lambda facts, arrays: arrays.update({"0.tokens": np.array([1, 2, -3])}),
        lambda facts, arrays: arrays.update({"0.tokens": np.array([1, 2, 10**6])}),
        lambda facts, arrays: arrays.update({"0.tokens": arrays["0.tokens"].astype(np.int32)}),
        lambda facts, arrays: arrays.pop("1.4.value"),
        lambda facts, arrays: arrays.update({"1.4.value": arrays["1.4.value"][:, :1]}),
        lambda facts, arrays: arrays.update({"1.4.value": arrays["1.4.value"].view(np.int8)}),
    ],
)
def test_wrong_contents_under_a_right_hash_leave_the_session_as_it_was(
    sessions: tuple[CachedSession, CachedSession], change: Callable[[dict, dict], object]
) -> None:
    session = sessions[0]
    session.reset()
    session.prefill([[1, 2, 3], [4, 5], []])
    facts, arrays = snapshot_.unpack(session.save())
    change(facts, arrays)
    session.prefill([[6], [7], [8]])
    before = session.save()
    with pytest.raises(SnapshotError, match=r"^snapshot: "):
        session.restore(snapshot_.pack(facts, arrays))
    assert session.save() == before


def test_a_full_row_that_idles_keeps_its_last_slot_after_truncating_too(package: Path) -> None:
    """It replays the token that the slot holds, not the last one that it was given."""
    wide = open_session(package, max_batch=2, capacity=64)
    wide.prefill([[11, 12, 13, 14, 15, 16], [1]])
    wide.truncate(5)
    snapshot = wide.save()
    narrow = open_session(package, max_batch=2, capacity=5)
    narrow.restore(snapshot)
    narrow.decode([None, 3])
    wide.restore(narrow.save())
    found = wide.decode([99, None])
    wide.restore(snapshot)
    np.testing.assert_allclose(found, wide.decode([99, None]), rtol=1e-4, atol=1e-4)
