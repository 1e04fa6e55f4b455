"""examples/cpp/bench measures what `qwenport bench` measures, and says it in the same words."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenport import cli, engines, exporter

from .builds import built_example

Bench = Callable[..., subprocess.CompletedProcess[str]]
MEASURED = re.compile(r"\d+\.\d+( [MG]B)?")


@pytest.fixture(scope="module")
def bench(onnxruntime_library: Path) -> Bench:
    """Run the example."""
    program = built_example("bench")
    environment = {**os.environ, "QWENPORT_ONNXRUNTIME": str(onnxruntime_library)}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


@pytest.fixture(scope="module")
def engine(
    package_of: Callable[[str], exporter.Package], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "engine"
    return engines.build(package_of("tiny-qwen2.5").path, folder, target="onnxruntime").path


def python(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["bench", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--threads", 1, "--prompt-tokens", 20, "--new-tokens", 5],
        ["--prompt-tokens", 500],
        ["--new-tokens", 500],
    ],
)
def test_json_has_python_s_keys_and_tokens(
    options: list[object], bench: Bench, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = bench(engine, *options, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found, expected = (
        json.loads(done.stdout),
        json.loads(python(capsys, engine, *options, "--json")),
    )
    assert list(found) == list(expected)
    facts = {
        key: value
        for key, value in expected.items()
        if not key.endswith(("_seconds", "_per_second", "_bytes"))
    }
    assert {key: found[key] for key in facts} == facts | {"language": "C++"}
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in expected.items()
    }
    assert 0 < found["decode_p10_seconds"] <= found["decode_seconds"] <= found["decode_p90_seconds"]
    assert 0 < found["loaded_bytes"] <= found["peak_bytes"] + (4 << 20)


def test_text_is_python_s(bench: Bench, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--threads", 1, "--prompt-tokens", 20, "--new-tokens", 5]
    found = bench(engine, *options).stdout.splitlines()
    expected = python(capsys, engine, *options).splitlines()
    assert found[0] == expected[0].replace("Python", "C++")
    assert found[1:3] == expected[1:3]
    assert [MEASURED.sub("X", line) for line in found[3:]] == [
        MEASURED.sub("X", line) for line in expected[3:]
    ]


def test_fast_start_says_so(bench: Bench, engine: Path) -> None:
    done = bench(engine, "--fast-start", "--prompt-tokens", 20, "--new-tokens", 5, "--json")
    assert json.loads(done.stdout)["load_mode"] == "fast_start"
    assert ", fast_start, " in bench(engine, "--fast-start").stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "usage: bench ENGINE"),
        (["engine", "other"], "unexpected other"),
        (["engine", "--quick"], "unexpected --quick"),
        (["engine", "--threads"], "--threads needs a number"),
        (["engine", "--threads", "0"], "--threads: '0' is not"),
        (["engine", "--threads", "1x"], "--threads: '1x' is not"),
        (["engine", "--new-tokens", "99999999999"], "--new-tokens: '99999999999' is not"),
        (["engine", "--prompt-tokens", "512"], "at most the engine's 512 positions"),
        (["engine", "--new-tokens", "2147483647"], "at most the engine's 512 positions"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_wrong_request_is_one_line(
    options: list[str], words: str, bench: Bench, engine: Path
) -> None:
    done = bench(*(str(engine) if option == "engine" else option for option in options))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and words in done.stderr
