"""A package's lowered model in the cache: it computes the same, changes with the package, and is never trusted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwenport import cli, engines, exporter
from qwenport.contract import DTYPES, ENGINE_WEIGHTS, MANIFEST, MODEL
from qwenport.engines import OnnxRuntimeSession, cache, kept_model, open_session

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
CASES = [
    *((DENSE, dtype, "link") for dtype in DTYPES),
    *((MIXTURE, dtype, "link") for dtype in DTYPES),
    *((MIXTURE, dtype, "pack") for dtype in ("bf16", "fp32")),
]
OPEN = "import sys; from qwenport.engines import open_session; "


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "qwenport"


@pytest.fixture
def package(tmp_path: Path, tiny_package: Path) -> Path:
    return Path(shutil.copytree(tiny_package, tmp_path / "package"))


def the_entry(root: Path) -> Path:
    (entry,) = root.iterdir()
    return entry


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} if root.is_dir() else set()


def logits_of(session: engines.Session) -> list[np.ndarray]:
    found = session.prefill([[1, 2, 3, 4, 5, 6, 7], [900, 11]], all_logits=True)
    return [*found, session.decode([3, None]), session.decode([5, 6])]


def assert_same(left: engines.Session, right: engines.Session) -> None:
    for ours, theirs in zip(logits_of(left), logits_of(right), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def in_memory(path: Path) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(exporter.load_package(path), max_batch=2, capacity=48)


def no_writing(*arguments: object, **more: object) -> None:
    raise AssertionError("an entry is written although there is one")


@pytest.mark.parametrize(
    ("checkpoint", "dtype", "weights"), CASES, ids=lambda v: getattr(v, "name", v)
)
def test_first_and_later_sessions_give_the_logits_of_the_package_bit_for_bit(
    checkpoint: Path,
    dtype: str,
    weights: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = shutil.copytree(
        checkpoint, tmp_path / "checkpoint"
    )  # a link more is a change of its files
    package = exporter.export(own, tmp_path / "package", dtype=dtype, weights=weights).path
    first = open_session(package, max_batch=2, capacity=48)
    entry = the_entry(root)
    monkeypatch.setattr(cache, "keep", no_writing)
    monkeypatch.setattr(kept_model, "keep", no_writing)
    second = open_session(package, max_batch=2, capacity=48)
    package_session = in_memory(package)
    assert_same(first, package_session)
    package_session.reset()
    assert_same(second, package_session)
    by_reference = {MANIFEST, MODEL}  # the weights of an fp32 package stay where they are
    names = by_reference if dtype == "fp32" else by_reference | {ENGINE_WEIGHTS}
    assert {file.name for file in entry.iterdir()} == names


def test_an_entry_has_the_bytes_of_the_engine_that_build_writes(
    package: Path, root: Path, tmp_path: Path
) -> None:
    """So what `validate` says of that engine holds for what `generate` runs."""
    open_session(package)
    engine = engines.build(package, tmp_path / "engine", target="onnxruntime").path
    for name in (MODEL, ENGINE_WEIGHTS):
        assert (the_entry(root) / name).read_bytes() == (engine / name).read_bytes()


def test_snapshots_go_on_with_and_without_the_cache(package: Path) -> None:
    kept, alone = open_session(package, max_batch=2, capacity=48), in_memory(package)
    kept.prefill([[1, 2, 3], [4]])
    alone.restore(kept.save())
    np.testing.assert_array_equal(alone.decode([5, 6]), kept.decode([5, 6]))


def test_a_later_session_needs_neither_torch_nor_onnx_ir(package: Path) -> None:
    script = (
        OPEN
        + "open_session(sys.argv[1]).prefill([[1]]); print({*sys.modules} & {'torch', 'onnx_ir', 'onnx'})"
    )
    run = [sys.executable, "-c", script, str(package)]
    outputs = [
        subprocess.run(run, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert "onnx_ir" in outputs[0] and outputs[1].strip() == "set()"


def weights_of(package: Path) -> Path:
    return next((package / "weights").glob("*.safetensors"))


def test_weights_edited_in_place_are_not_served_from_an_old_entry(
    package: Path, root: Path
) -> None:
    """Their header is the same, so the package's manifest is, too."""
    before = logits_of(open_session(package, max_batch=2, capacity=48))
    file = weights_of(package)
    with file.open("r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start)
        data = bytearray(stream.read())
        data[1::64] = bytes(byte ^ 0x80 for byte in data[1::64])  # signs of bf16 numbers
        stream.seek(start)
        stream.write(data)
    edited = open_session(package, max_batch=2, capacity=48)
    assert len([*root.iterdir()]) == 2
    assert not np.array_equal(logits_of(edited)[0], before[0])
    edited.reset()
    assert_same(edited, in_memory(package))


def test_two_packages_with_the_same_manifest_and_other_weights_have_two_entries(
    package: Path, root: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(package, tmp_path / "other"))
    data = weights_of(other).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    weights_of(other).write_bytes(data[:header] + bytes(len(data) - header))
    assert (other / MANIFEST).read_bytes() == (package / MANIFEST).read_bytes()
    (ones,) = open_session(package).prefill([[1, 2]])
    (zeros,) = open_session(other).prefill([[1, 2]])
    assert ones.any() and not zeros.any()
    assert len([*root.iterdir()]) == 2


def test_another_release_or_other_code_has_another_key(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = exporter.load_package(package)
    keys = [kept_model._key(loaded)]
    monkeypatch.setattr(cache, "__version__", "9.9")
    keys.append(kept_model._key(loaded))
    code = tmp_path / "code"
    shutil.copytree(Path(engines.__file__).parent / "lowering", code)
    monkeypatch.setattr(kept_model, "_CODE", (code,))
    keys.append(kept_model._key(loaded))
    (code / "float32.py").write_text("# another way\n")
    keys.append(kept_model._key(loaded))
    assert len({*keys}) == 4


def contents(entry: Path) -> dict[str, bytes]:
    """Its files without the manifest, which has the times of the others."""
    return {file.name: file.read_bytes() for file in entry.iterdir() if file.name != MANIFEST}


def cut_weights(entry: Path) -> None:
    with (entry / ENGINE_WEIGHTS).open("r+b") as stream:
        stream.truncate(1000)


def other_header(entry: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, entry / ENGINE_WEIGHTS)


def change_weights(entry: Path) -> None:
    """Values only, and the file looks as old as before."""
    file = entry / ENGINE_WEIGHTS
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)
        stream.write(b"?" * 64)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange_weights(entry: Path) -> None:
    other = shutil.copy2(entry / ENGINE_WEIGHTS, entry.parent / "other")
    Path(other).rename(entry / ENGINE_WEIGHTS)


def change_graph(entry: Path) -> None:
    data = bytearray((entry / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (entry / MODEL).write_bytes(data)


def consistent_nonsense(entry: Path) -> None:
    """Only onnxruntime finds out."""
    (entry / MODEL).write_bytes(b"no model")
    manifest = json.loads((entry / MANIFEST).read_text())
    manifest["files"][MODEL] = {"bytes": 8, "sha256": exporter.sha256(entry / MODEL)}
    (entry / MANIFEST).write_text(json.dumps(manifest))


DAMAGE = [
    cut_weights,
    other_header,
    change_weights,
    exchange_weights,
    change_graph,
    consistent_nonsense,
    lambda entry: (entry / MANIFEST).unlink(),
    lambda entry: (entry / MANIFEST).write_text("{"),
    lambda entry: (entry / MANIFEST).write_text('{"format": "qwenport-cache-entry"}'),
    lambda entry: (entry / ENGINE_WEIGHTS).unlink(),
    lambda entry: (entry / "more").write_text("added"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_written_again_and_never_used(
    damage: Callable[[Path], None], package: Path, root: Path
) -> None:
    open_session(package)
    entry = the_entry(root)
    whole = contents(entry)
    damage(entry)
    notes: list[str] = []
    session = open_session(package, max_batch=2, capacity=48, note=notes.append)
    assert_same(session, in_memory(package))
    assert not notes
    assert contents(the_entry(root)) == whole


def test_a_damaged_package_is_refused_whatever_the_cache_has(package: Path) -> None:
    open_session(package)
    (package / MODEL).write_bytes(b"no model")
    with pytest.raises(exporter.PackageError, match=r"model\.onnx does not match"):
        open_session(package)


def test_a_model_beyond_the_limit_runs_from_memory_with_a_note(
    package: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_CACHE_BYTES", 1000)
    notes: list[str] = []
    session = open_session(package, max_batch=2, capacity=48, note=notes.append)
    assert_same(session, in_memory(package))
    (note,) = notes
    assert "will open as slowly next time" in note and "may take 1.0 kB" in note
    assert names(root) == set()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "no")]
)
def test_an_entry_that_cannot_be_written_is_a_note_and_leaves_nothing(
    error: OSError, package: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(kept_model, "write_lowered", write)
    notes: list[str] = []
    assert_same(
        open_session(package, max_batch=2, capacity=48, note=notes.append), in_memory(package)
    )
    assert len(notes) == 1 and names(root) == set()


@pytest.mark.parametrize("home", ["a file", "a file/below"])
def test_a_place_for_no_cache_is_a_note(
    home: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a read-only home is, which root could write to."""
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
    notes: list[str] = []
    session = open_session(package, max_batch=2, capacity=48, note=notes.append)
    assert_same(session, in_memory(package))
    assert len(notes) == 1


def test_two_processes_at_once_both_run_and_leave_one_entry(package: Path, root: Path) -> None:
    script = OPEN + "print(open_session(sys.argv[1]).prefill([[1, 2, 3]])[0].tobytes().hex())"
    command = [sys.executable, "-c", script, str(package)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0]
    expected = in_memory(package).prefill([[1, 2, 3]])[0].tobytes().hex()
    assert [out.strip() for out, _ in outputs] == [expected, expected]
    assert the_entry(root).name.startswith("model-")


def test_the_loser_of_a_race_uses_the_winners_entry(
    package: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = kept_model.write_lowered

    def slowly(*arguments: object) -> None:
        monkeypatch.setattr(kept_model, "write_lowered", write)
        open_session(package)  # another session is opened meanwhile
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kept_model, "write_lowered", slowly)
    notes: list[str] = []
    session = open_session(package, max_batch=2, capacity=48, note=notes.append)
    assert not notes and the_entry(root)
    assert_same(session, in_memory(package))


def test_an_open_session_outlives_its_entry(package: Path, root: Path) -> None:
    session = open_session(package, max_batch=2, capacity=48)
    assert engines.clear_cache()[0] == 1
    assert names(root) == set()
    assert_same(session, in_memory(package))


def test_generate_and_the_commands_of_the_cache(
    package: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> dict[str, object]:
        assert cli.main([*map(str, arguments), "--json"]) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    answers = [
        run("generate", package, "--prompt", "Once upon", "--max-new-tokens", 8) for _ in range(2)
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    listed = run("cache", "list")
    assert listed["folder"] == str(root)
    kinds = [(entry["kind"], entry["of"]) for entry in listed["entries"]]  # type: ignore[attr-defined]
    assert sorted(kinds) == [("model", str(package)), ("tokenizer", str(package))]
    size = sum(file.stat().st_size for file in root.glob("*/*"))
    assert listed["bytes"] == size
    assert cli.main(["cache", "list"]) == 0
    assert str(root) in capsys.readouterr().out
    assert run("cache", "clear") == {"folder": str(root), "entries": 2, "bytes": size}
    assert run("cache", "clear") == {"folder": str(root), "entries": 0, "bytes": 0}
