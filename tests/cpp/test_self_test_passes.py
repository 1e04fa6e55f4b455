"""The memory of passes, and sessions that need one."""

from __future__ import annotations

import ctypes as c
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwenport.contract import MANIFEST

from . import proofs
from .proofs import change, toy_with
from .runtime import Engine, Error, Library
from .toy import toy_directory

pytestmark = pytest.mark.usefixtures("passes")


def key_of(directory: Path) -> list[str]:
    """Of the toy engine on the stand-in, from docs/reference/proof.md."""
    manifest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    return ["qwenport-self-test 1", manifest, "GPU-stand-in", "1.0", "tensorrt 10.14.1.48"]


def file_of(passes: Path, key: list[str]) -> Path:
    name = hashlib.sha256("".join(f"{line}\n" for line in key).encode()).hexdigest()
    return passes / f"{name}.json"


def refusal(engine: Engine) -> str:
    with pytest.raises(Error) as error:
        engine.session()
    assert error.value.kind == "not proven"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_the_option_sessions_need_no_pass(library: Library, toy: Path) -> None:
    library.load(toy).session().prefill([[1]])


def test_sessions_are_refused_until_a_pass(library: Library, toy: Path, passes: Path) -> None:
    engine = library.load(toy, require_self_test=True)
    assert refusal(engine) == (
        f"{toy}: has not passed its self-test on this machine, and EngineOptions::require_self_test is "
        "set; call Engine::self_test, or run `qwenport selftest`"
    )
    report = engine.self_test()
    assert (report.passed, report.remembered) == (1, 1)
    engine.session().prefill([[1]])
    library.load(toy, require_self_test=True).session()  # remembered, for other processes too
    (file,) = passes.iterdir()
    assert file == file_of(passes, key_of(toy))
    assert json.loads(file.read_text()) == {
        "format": "qwenport-self-test",
        "format_version": 1,
        "key": key_of(toy),
        "cases": 4,
        "left_out": 1,
        "marks": 24,
    }


def test_a_pass_is_for_one_engine(library: Library, toy: Path, toy_proof, tmp_path: Path) -> None:
    library.load(toy).self_test()
    tensors, metadata = toy_proof
    bounds = {**tensors, "bounds": tensors["bounds"] * 2}
    other = toy_with(library, tmp_path / "other", proofs.write(bounds, metadata))
    assert "has not passed its self-test" in refusal(library.load(other, require_self_test=True))


def test_a_failure_forgets_a_pass(
    library: Library, toy_proof, tmp_path: Path, passes: Path
) -> None:
    tensors, metadata = toy_proof
    wrong = proofs.write(change(tensors, "top_values", (0, 0), 1.0), metadata)
    toy = toy_with(library, tmp_path / "toy", wrong)
    file = file_of(passes, key_of(toy))
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(pass_of(key_of(toy))))
    engine = library.load(toy, require_self_test=True)
    engine.session()
    assert engine.self_test().passed == 0
    assert not file.exists()
    assert "failed its self-test" in refusal(engine)
    assert "has not passed" in refusal(library.load(toy, require_self_test=True))


def pass_of(key: list[str]) -> dict[str, Any]:
    return {
        "format": "qwenport-self-test",
        "format_version": 1,
        "key": key,
        "cases": 4,
        "left_out": 0,
        "marks": 10,
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"format": "other"},
        {"format_version": 2},
        {"format_version": "1"},
        {"key": ["a", "b", "c", "d", "e"]},
        {"key": []},
        {"cases": 0},
        {"cases": -1},
        {"cases": "4"},
        {"left_out": 1.5},
        {"marks": 0},
        {"marks": 2**40},
        {"more": 1},
    ],
)
def test_a_pass_that_is_not_exactly_one_does_not_count(
    library: Library, toy: Path, passes: Path, changed: dict[str, Any]
) -> None:
    file = file_of(passes, key_of(toy))
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(pass_of(key_of(toy)) | changed))
    refusal(library.load(toy, require_self_test=True))


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "link", "pipe", "directory"])
def test_no_file_in_a_pass_s_place_counts(
    library: Library, toy: Path, passes: Path, content: str
) -> None:
    file = file_of(passes, key_of(toy))
    file.parent.mkdir(parents=True)
    if content == "link":
        (passes / "elsewhere").write_text(json.dumps(pass_of(key_of(toy))))
        file.symlink_to(passes / "elsewhere")
    elif content == "pipe":
        os.mkfifo(file)
    elif content == "directory":
        file.mkdir()
    else:
        file.write_text(content)
    engine = library.load(toy, require_self_test=True)
    refusal(engine)
    assert engine.self_test().remembered == (content != "directory")
    engine.session()


@pytest.mark.parametrize("home", ["", "relative", "/proc/nowhere"])
def test_without_a_place_to_remember_it_a_pass_counts_for_its_engine(
    library: Library, toy: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", home)
    engine = library.load(toy, require_self_test=True)
    report = engine.self_test()
    assert (report.passed, report.remembered) == (1, 0)
    engine.session()
    refusal(library.load(toy, require_self_test=True))


def test_the_default_place_is_in_the_home_directory(
    library: Library, toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert library.load(toy).self_test().remembered == 1
    passes = tmp_path / "home" / ".cache" / "qwenport" / "self-tests"
    assert [*passes.iterdir()] == [file_of(passes, key_of(toy))]


def test_an_engine_without_a_proof_says_so(library: Library, tmp_path: Path) -> None:
    toy = toy_directory(library, tmp_path / "toy")
    engine = library.load(toy, require_self_test=True)
    assert engine.info().has_proof == 0
    advice = "run `qwenport validate` on its package and build it again"
    assert refusal(engine) == (
        f"{toy}: carries no proof, which EngineOptions::require_self_test needs; {advice}"
    )
    with pytest.raises(Error) as error:
        engine.self_test()
    assert error.value.kind == "not proven"
    assert str(error.value) == f"{toy}: carries no proof; {advice}"


def test_a_report_that_is_null_is_refused(library: Library, toy: Path) -> None:
    engine = library.load(toy)
    assert library.c.qwenport_engine_self_test(engine.handle, None) == 1
    assert library.c.qwenport_last_error() == b"report is NULL"
    assert library.c.qwenport_engine_self_test(None, c.create_string_buffer(1024)) == 1
