"""`qwenport bench` and `qwenport perplexity`, as a user meets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenport import cli

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5"
TEXT = "The moon moves around the Earth. It needs about one month for one circle. " * 4
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must succeed; its output."""

    def call(*arguments: object) -> str:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return call


@pytest.fixture(scope="module")
def engine(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with a proof, about which opening it says nothing."""
    engine = tmp_path_factory.mktemp("engine") / "engine"
    assert cli.main(["build", str(tiny_package), str(engine), "--target", "onnxruntime", "-q"]) == 0
    return engine


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


# bench


def test_package_and_engine_are_measured_with_the_same_prompt(
    run: Run, tiny_package: Path, engine: Path
) -> None:
    lengths = ("--prompt-tokens", 30, "--new-tokens", 7, "--threads", 1)
    first, second = (
        json.loads(run("bench", target, *lengths, "--json")) for target in (tiny_package, engine)
    )
    assert first.keys() == second.keys()
    assert first["token_ids"] == second["token_ids"] and len(first["token_ids"]) == 7
    for facts in (first, second):
        assert (facts["prompt_tokens"], facts["new_tokens"], facts["threads"]) == (30, 7, 1)
        assert (facts["flavour"], facts["language"]) == ("onnxruntime", "Python")
    assert (first["dtype"], second["dtype"]) == ("bf16", "fp32")


def test_bench_prints_what_it_ran_and_clamps_its_defaults(run: Run, engine: Path) -> None:
    lines = run("bench", engine).splitlines()
    assert lines[0].startswith("onnxruntime ") and ", Python, " in lines[0]
    assert "threads: default" in lines[1]
    assert lines[2] == "prompt of 448 tokens, 64 new tokens"  # 512 positions in all
    titles = ["load", "time to first token", "prefill", "decode", "memory"]
    assert [line[:20].strip() for line in lines[3:]] == titles


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt-tokens", 500, "--new-tokens", 20), "at most the target's 512 positions"),
        (("--prompt-tokens", 512), "at most the target's 512 positions"),
        (("--prompt-tokens", 0), "--prompt-tokens"),
        (("--new-tokens", "x"), "--new-tokens"),
        (("--threads", 0), "--threads"),
    ],
)
def test_bench_request_is_refused(
    options: tuple[object, ...], words: str, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "bench", engine, *options)


# perplexity


def test_perplexity_of_a_file_is_transformers_loss(
    run: Run, tiny_package: Path, engine: Path, text: Path
) -> None:
    """One window has room for the whole text."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(TINY)(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    for target in (tiny_package, engine):
        found = json.loads(run("perplexity", target, text, "--json"))
        assert found["mean_nll"] == pytest.approx(loss, rel=1e-5)  # both compute in fp32
        assert (found["tokens"], found["scored"]) == (ids.numel(), ids.numel() - 1)
        assert (found["windows"], found["window"], found["stride"]) == (1, 512, 256)


def test_perplexity_states_window_and_stride(run: Run, engine: Path, text: Path) -> None:
    options = ("--window", 40, "--stride", 10)
    facts = json.loads(run("perplexity", engine, text, *options, "--json"))
    first, second = run("perplexity", engine, text, *options).splitlines()
    assert first.startswith(f"perplexity {facts['perplexity']:.4f}, ")
    assert f"{facts['scored']} of {facts['tokens']} tokens scored" in second
    assert second.endswith(f"{facts['windows']} windows of 40 tokens, stride 10")
    assert facts["windows"] == 1 + -(-(facts["tokens"] - 40) // 10)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", (), "has 0 tokens"),
        (b"The", (), "has 1 tokens"),
        (b"The moon \xff", (), "is not valid UTF-8"),
        (b"The moon moves", ("--window", 513), "has 512 positions"),
        (b"The moon moves", ("--window", 8, "--stride", 9), "more than the window of 8"),
        (b"The moon moves", ("--window", 1), "--window"),
        (b"The moon moves", ("--stride", 0), "--stride"),
    ],
)
def test_perplexity_request_is_refused(
    content: bytes,
    options: tuple[object, ...],
    words: str,
    engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert words in refused(capsys, "perplexity", engine, tmp_path / "text.txt", *options)


def test_perplexity_without_a_tokenizer_or_a_file_is_refused(
    engine: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused(capsys, "perplexity", engine, tmp_path / "none.txt")
    assert "is a directory" in refused(capsys, "perplexity", engine, tmp_path)
    without = Path(shutil.copytree(engine, tmp_path / "engine"))
    manifest: dict[str, Any] = json.loads((without / "qwenport.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (without / name).unlink()
        del manifest["files"][name]
    (without / "qwenport.json").write_text(json.dumps(manifest))
    assert "has no tokenizer" in refused(capsys, "perplexity", without, text)


@pytest.mark.parametrize("command", ["bench", "perplexity"])
def test_a_checkpoint_is_refused(
    command: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [text] if command == "perplexity" else []
    assert "is a checkpoint; export it first" in refused(capsys, command, TINY, *options)
