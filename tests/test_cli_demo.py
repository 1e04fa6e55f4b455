"""`qwenport demo`: the whole path, and what it says where a part is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qwenport
from qwenport import cli
from qwenport.commands import demo

Capture = pytest.CaptureFixture[str]


@pytest.mark.slow
def test_demo_runs_every_step_and_sums_up(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "kept")]) == 0
    out, _ = capsys.readouterr()
    table = out.partition("seconds      bytes\n")[2].splitlines()
    names = ["export", "inspect", "validate", "validate", "build", "inspect", "generate"]
    assert [line.split()[:3] for line in table[:14]] == [
        [model, name, "done"] for model in demo.CHECKPOINTS for name in names
    ]
    few_bits = ["export", "inspect", "validate", "build", "selftest", "generate"]
    assert [line.split()[1:4] for line in table[14:20]] == [
        ["int4", name, "done"] for name in few_bits
    ]
    chunked = ["export", "validate", "build", "selftest", "generate"]
    assert [line.split()[:3] for line in table[20:25]] == [
        [demo.IN_CHUNKS, name, "done"] for name in chunked
    ]
    assert sum(line.startswith("$ qwenport ") for line in out.splitlines()) == 25
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    kinds = ("engine", "engine.parity", "package", "package.parity")
    assert kept == {f"{model}.{kind}" for model in demo.CHECKPOINTS for kind in kinds} | {
        f"{model}.{kind}"
        for model in (f"{demo.CHECKPOINTS[0]}-int4", demo.IN_CHUNKS)
        for kind in ("engine", "package")
    }
    assert "quantized 4 bits in groups of 32, symmetric" in out


def test_demo_without_tensorrt_rtx_names_the_extra_and_goes_on(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(demo, "CHECKPOINTS", demo.CHECKPOINTS[:1])
    for name in ("steps", "in_chunks"):
        monkeypatch.setattr(demo, name, without_validation(getattr(demo, name)))
    stdin = sys.stdin
    assert cli.main(["demo"]) == 2
    assert sys.stdin is stdin
    out, err = capsys.readouterr()
    (error,) = [line for line in err.splitlines() if "error:" in line]
    assert error.startswith("error: build of tiny-qwen2.5: tensorrt-rtx is not installed")
    assert error.endswith("pip install 'qwenport[rtx]'")
    table = [line.split() for line in out.split("bytes\n")[1].splitlines()]
    results = [words[2] for words in table if words[1] != "int4"]
    assert results == ["done", "done", "failed", "skipped:", "done"] + ["done"] * 4
    assert [words[3] for words in table if words[1] == "int4"] == ["done"] * 6


def without_validation(steps: Callable[..., list[demo.Step]]) -> Callable[..., list[demo.Step]]:
    return lambda *arguments: [step for step in steps(*arguments) if step.name != "validate"]


def test_demo_outside_a_source_checkout_says_so(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(qwenport, "__file__", str(tmp_path / "qwenport" / "__init__.py"))
    assert cli.main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert "source checkout" in err and err.count("\n") == 1 and out == ""


def test_demo_does_not_write_over_anything(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / "no" / "such")]) == 2
    assert "no such directory" in capsys.readouterr().err
