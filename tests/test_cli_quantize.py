"""`qwenport export --quantize` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Capture

from qwenport import cli

TINY = str(Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5")


@pytest.mark.parametrize(
    ("options", "linears", "told"),
    [
        (["int4"], (4, 32, True), "4 bits in groups of 32, symmetric; embedding and head 8 bits"),
        (["int4", "--group", "64", "--asymmetric"], (4, 64, False), "of 64, with zero points"),
        (["int8"], (8, None, True), "linears 8 bits per row, symmetric"),
    ],
)
def test_export_quantize_says_what_was_done(
    options: list[str],
    linears: tuple[int, int | None, bool],
    told: str,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    assert (
        cli.main(["export", TINY, str(tmp_path / "json"), "--quantize", *options, "--json", "-q"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    how = dict(zip(("bits", "group", "symmetric"), linears, strict=True))
    assert report["quantized"]["linears"] == how
    assert report["weight_bytes"] < 0.52 * (Path(TINY) / "model.safetensors").stat().st_size
    held = tmp_path / "json" / "checkpoint" / "model.safetensors"
    assert held.stat().st_size < report["bytes_written"] < 1.6 * held.stat().st_size
    assert cli.main(["export", TINY, str(tmp_path / "text"), "--quantize", *options, "-q"]) == 0
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--group", "32"], "--group needs --quantize"),
        (["--asymmetric"], "--symmetric/--asymmetric needs --quantize"),
        (["--quantize", "int8", "--group", "32"], "--group is for int4"),
        (["--quantize", "int4", "--weights", "copy"], "--weights copy"),
        (["--quantize", "int2"], "int2"),
        (["--quantize", "int4", "--group", "16"], "16"),
    ],
)
def test_options_of_quantization_without_meaning_are_refused(
    options: list[str], said: str, tmp_path: Path, capsys: Capture
) -> None:
    assert cli.main(["export", TINY, str(tmp_path / "out"), *options]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert said in shown.err and shown.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
