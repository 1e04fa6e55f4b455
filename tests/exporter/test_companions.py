"""Tokenizers and generation settings: copied as they are, doubted at export, refused by `generate` in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import mini, write_checkpoint

from qwenport import cli
from qwenport.exporter import CheckpointError, export, stop_ids
from qwenport.exporter.companions import COMPANIONS


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    raw = mini("llama", torch_dtype="bfloat16")
    return write_checkpoint(tmp_path / "checkpoint", raw, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", sorted(set(COMPANIONS) - {"config.json"}))
@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "loose link"])
def test_what_is_no_file_is_refused_at_once(
    name: str, kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    """A device without an end or a pipe without a writer would be read for ever."""
    place = checkpoint / name
    place.unlink(missing_ok=True)
    if kind == "directory":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(CheckpointError, match=rf"{name}: not a file"):
        export(checkpoint, tmp_path / "package")
    assert not (tmp_path / "package").exists()


DAMAGED = ["", "{", "[]", "null", "[" * 100_000, "\ufeff{}", '{"a": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda text: repr(text[:8]))
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_damaged_file_is_noted_and_refused_when_text_is_wanted(
    name: str, content: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / name).write_text(content, encoding="utf-8")
    told: list[str] = []
    package = export(checkpoint, tmp_path / "package", note=told.append).path
    assert len(told) == 1 and name in told[0] and "not a JSON object" in told[0]
    (package / "tokenizer.json").exists()
    assert cli.main(["generate", str(package), "--prompt", "x", "-q"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= 300 and ("tokenizer" in line or name in line)
    assert "object has no attribute" not in line


@pytest.mark.parametrize("ids", [-1, 10**6, "a", 1.5, True, [0, -1], [[0]], {"a": 0}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_impossible_stop_token_is_noted_with_its_file(
    name: str, ids: Any, checkpoint: Path, tmp_path: Path
) -> None:
    content = json.loads((checkpoint / name).read_text()) if name == "config.json" else {}
    (checkpoint / name).write_text(json.dumps({**content, "eos_token_id": ids}))
    told: list[str] = []
    package = export(checkpoint, tmp_path / "package", note=told.append)
    assert len(told) == 1 and name in told[0] and "eos_token_id" in told[0]
    with pytest.raises(CheckpointError, match=rf"{name}: eos_token_id"):
        stop_ids(package.path, package.config.vocab_size)
