"""Prompts of the user's own: they are what is run, and what cannot be one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import Capture, refused

from qwenport import cli
from qwenport.exporter import export
from qwenport.validate import ValidationError, validate
from qwenport.validate.prompts import make_prompts

from .bundled import DENSE


def test_prompts_of_a_file_are_what_is_run(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Der Uhrmacher zählt 1, 2, 3. 時計職人。\n" * 3, encoding="utf-8")
    ids = make_prompts(DENSE, 2048, file).ids
    assert ids != make_prompts(DENSE, 2048).ids[: len(ids)]
    package = export(DENSE, tmp_path / "package", max_seq_len=64, max_batch=1).path
    arguments = ["validate", str(package), "--reference", str(DENSE), "--json", "--budget", "quick"]
    plain = (cli.main(arguments), json.loads(capsys.readouterr().out))
    given = (cli.main([*arguments, "--prompts", str(file)]), json.loads(capsys.readouterr().out))
    assert (plain[0], given[0]) == (0, 0)
    assert given[1]["prompts"].startswith(f"prompts.txt, {len(ids)} tokens, SHA-256 ")
    rows = [
        [s["by_position"]["rel_l2"] for s in report["scenarios"] if s["name"] == "prefill"]
        for _, report in (plain, given)
    ]
    assert rows[0] != rows[1], "the same tokens were run"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"caf\xe9", "codec can't decode"), (None, "No such file")],
)
def test_prompts_that_cannot_be_read_are_refused(
    content: bytes | None, words: str, dense: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
        options = ["--reference", DENSE, "--prompts", file]
        assert words in refused(capsys, "validate", dense, *options)
    with pytest.raises(ValidationError, match=words):
        validate(dense, DENSE, prompts=file)


def test_prompts_without_a_tokenizer_are_refused(
    dense: Path, tmp_path: Path, capsys: Capture
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DENSE / name, bare)
    file = tmp_path / "prompts.txt"
    file.write_text("Hello")
    line = refused(capsys, "validate", dense, "--reference", bare, "--prompts", file)
    assert "has no tokenizer to encode them" in line
    with pytest.raises(ValidationError, match="does not fit the vocabulary of 20"):
        make_prompts(DENSE, 20, file)


def test_prompts_are_random_where_no_tokenizer_fits(tmp_path: Path) -> None:
    assert "text" in make_prompts(DENSE, 2048).description
    too_small = make_prompts(DENSE, 100)
    assert "does not fit" in too_small.description and max(too_small.ids) < 100
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    broken = make_prompts(tmp_path, 50)
    assert "does not load" in broken.description
    assert broken.take(3000) == make_prompts(tmp_path, 50).take(3000)
