"""Sparse attention, an approximation of dual chunk attention: refused, or ignored on request and said everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chunked import SETTINGS, make_chunked

from qwenport import cli
from qwenport.exporter import ConfigError, export, load_package, open_checkpoint
from qwenport.validate import validate

ASKING: list[tuple[str, dict[str, Any]]] = [
    ("sparse_attention_config", {"sparse_attention_config": {"0": {}}}),
    (
        "dual_chunk_attention_config.sparse_attention_config",
        {"dual_chunk_attention_config": {**SETTINGS, "sparse_attention_config": {}}},
    ),
    (
        "dual_chunk_attention_config.sparse_attention_enabled",
        {"dual_chunk_attention_config": {**SETTINGS, "sparse_attention_enabled": True}},
    ),
]
FILE = "sparse_attention_config.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chunked(tmp_path_factory.mktemp("sparse") / "checkpoint")


def _copy(source: Path, folder: Path, **keys: Any) -> Path:
    """The checkpoint with other keys in its config.json."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(("key", "keys"), ASKING)
def test_it_is_refused_or_ignored_on_request(
    plain: Path, tmp_path: Path, key: str, keys: dict[str, Any]
) -> None:
    checkpoint = _copy(plain, tmp_path / "checkpoint", **keys)
    with pytest.raises(ConfigError, match=f"{key} asks.*--ignore-sparse-attention"):
        export(checkpoint, tmp_path / "package")
    assert not (tmp_path / "package").exists()
    export(checkpoint, tmp_path / "package", ignore_sparse_attention=True)
    package = load_package(tmp_path / "package")
    assert package.manifest["model"]["sparse_attention"] == package.config.sparse_attention == key
    (note,) = package.manifest["source"]["notes"]
    assert key in note and "ignored" in note
    dense = export(plain, tmp_path / "dense")
    assert package.model.read_bytes() == dense.model.read_bytes()
    assert dense.manifest["model"]["sparse_attention"] is None


def test_the_report_says_that_it_was_ignored(plain: Path, tmp_path: Path) -> None:
    key, keys = ASKING[-1]
    checkpoint = _copy(plain, tmp_path / "checkpoint", **keys)
    export(checkpoint, tmp_path / "package", ignore_sparse_attention=True)
    report = validate(tmp_path / "package", checkpoint, budget="quick")
    assert report.passed and report.coverage is not None
    assert sum(key in sentence for sentence in report.coverage.left_out) == 1
    export(plain, tmp_path / "dense")
    dense = validate(tmp_path / "dense", plain, budget="quick")
    assert dense.coverage is not None
    assert not any("sparse" in sentence for sentence in dense.coverage.left_out)


def test_it_is_ignored_from_the_command_line(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = _copy(plain, tmp_path / "checkpoint", **ASKING[0][1])
    args = ["export", str(checkpoint), str(tmp_path / "package")]
    assert cli.main(args) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--ignore-sparse-attention" in told
    assert cli.main([*args, "--ignore-sparse-attention"]) == 0
    assert "sparse attention" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "package"), "--brief"]) == 0
    assert "sparse attention" in capsys.readouterr().err


def test_settings_that_are_switched_off_ask_for_nothing(plain: Path, tmp_path: Path) -> None:
    """As vLLM reads them; its other two matter only to the approximation."""
    more = {"sparse_attention_threshold": 32768, "sparse_attention_last_q": 64}
    off = {**SETTINGS, **more, "sparse_attention_enabled": False, "sparse_attention_config": {}}
    for number, settings in enumerate(({**SETTINGS, **more}, off)):
        checkpoint = _copy(plain, tmp_path / str(number), dual_chunk_attention_config=settings)
        assert open_checkpoint(checkpoint).config.sparse_attention is None
    on = {**SETTINGS, **more, "sparse_attention_enabled": True}
    checkpoint = _copy(plain, tmp_path / "on", dual_chunk_attention_config=on)
    assert export(checkpoint, tmp_path / "p", ignore_sparse_attention=True).config.dual_chunk


def test_the_file_for_vllm_is_noted(plain: Path, tmp_path: Path) -> None:
    assert not any(FILE in note for note in open_checkpoint(plain).notes)
    checkpoint = _copy(plain, tmp_path / "checkpoint")
    (checkpoint / FILE).write_text("{}")
    for number, ignored in enumerate((False, True)):
        package = export(checkpoint, tmp_path / f"package{number}", ignore_sparse_attention=ignored)
        (note,) = package.manifest["source"]["notes"]
        assert FILE in note and "vLLM" in note
        assert package.config.sparse_attention is None


def test_the_file_of_a_model_without_chunks_concerns_nobody(plain: Path, tmp_path: Path) -> None:
    checkpoint = _copy(plain, tmp_path / "checkpoint", dual_chunk_attention_config=None)
    (checkpoint / FILE).write_text("{}")
    assert open_checkpoint(checkpoint).notes == ()


def test_where_there_is_nothing_to_ignore_the_request_is_refused(
    plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="asks for no sparse attention"):
        export(plain, tmp_path / "package", ignore_sparse_attention=True)
    assert not (tmp_path / "package").exists()
