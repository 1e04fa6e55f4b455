"""Packages and engines that are not what their manifest says, and requests that make no sense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, refused

from qwenport import cli
from qwenport.exporter import sha256

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound package, weights copied so that damage to a copy of it stays there."""
    path = tmp_path_factory.mktemp("exported") / "package"
    assert cli.main(["export", str(TINY), str(path), "--weights", "copy", "-q", "--json"]) == 0
    return path


@pytest.fixture(scope="module")
def built(exported: Path) -> Path:
    """A sound engine."""
    path = exported.parent / "engine"
    target = ["--target", "tensorrt-rtx", "--gpu", "sm86"]
    assert cli.main(["build", str(exported), str(path), *target, "--json"]) == 0
    return path


@pytest.fixture
def package(exported: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "package"))


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "qwenport.json").read_text())
        change(manifest)
        (path / "qwenport.json").write_text(json.dumps(manifest))

    return damage


def append(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with (path / name).open("ab") as stream:
            stream.write(b"x")

    return damage


def halve(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:-1000])

    return damage


def flip_header(path: Path) -> None:
    weights = path / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"k_proj.bias", b"K_proj.bias", 1))


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no such path": (shutil.rmtree, ("package", "no such")),
    "another version": (
        edit_manifest(lambda m: m.update(format_version=99)),
        ("version 99", "export the checkpoint again"),
    ),
    "another format": (edit_manifest(lambda m: m.update(format="zip")), ("qwenport.json",)),
    "no JSON": (lambda p: (p / "qwenport.json").write_text("{"), ("qwenport.json", "manifest")),
    "a list": (lambda p: (p / "qwenport.json").write_text("[]"), ("qwenport.json", "manifest")),
    "lacks weights": (edit_manifest(lambda m: m.pop("weights")), ("weights",)),
    "model edited": (append("model.onnx"), ("model.onnx", "changed")),
    "config edited": (append("config.json"), ("config.json", "changed")),
    "weights truncated": (halve("weights/model.safetensors"), ("model.safetensors", "truncated")),
    "other weights": (flip_header, ("model.safetensors", "changed")),
    "weights gone": (lambda p: shutil.rmtree(p / "weights"), ("model.safetensors", "missing")),
    "tables gone": (lambda p: (p / "rope.safetensors").unlink(), ("rope.safetensors", "missing")),
    "empty": (emptied, ("package", "qwenport.json")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_changed_package_is_refused(name: str, package: Path, capsys: Capture) -> None:
    damage, words = DAMAGE[name]
    damage(package)
    line = refused(capsys, "inspect", package)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", ["another version", "model edited", "tables gone"])
def test_every_command_refuses_a_changed_package(name: str, package: Path, capsys: Capture) -> None:
    damage, words = DAMAGE[name]
    damage(package)
    engine = package.parent / "engine"
    for arguments in (
        ("generate", package, "--prompt", "Hello"),
        ("bench", package),
        ("perplexity", package, TINY / "config.json"),
        ("validate", package, "--reference", TINY),
        ("build", package, engine, "--target", "tensorrt-rtx"),
    ):
        line = refused(capsys, *arguments)
        assert all(word in line for word in words), line
    assert [path.name for path in package.parent.iterdir()] == ["package"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (edit_manifest(lambda m: m.update(format_version=99)), ("version 99", "build the engine")),
        (append("engine.plan"), ("engine.plan", "changed")),
        (append("tokenizer.json"), ("tokenizer.json", "changed")),
        (lambda path: (path / "config.json").unlink(), ("config.json", "missing")),
    ],
)
def test_changed_engine_is_refused(
    damage: Callable[[Path], None],
    words: tuple[str, ...],
    built: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    engine = Path(shutil.copytree(built, tmp_path / "engine"))
    damage(engine)
    for arguments in (("inspect", engine), ("generate", engine, "--prompt", "Hello")):
        line = refused(capsys, *arguments)
        assert all(word in line for word in words), line


# requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "tensorrt-rtx", "--gpu", "sm999"], ("sm999", "sm86")),
        (["--target", "tensorrt-rtx", "--gpu", "RTX 4090"], ("RTX 4090", "sm86")),
        (["--target", "tensorrt-rtx", "--gpu", "sm90"], ("sm90", "tensorrt-rtx")),
        (["--target", "tensorrt-rtx", "--gpu", "sm75"], ("sm75", "fp16")),
        (["--target", "tensorrt-rtx", "--max-seq-len", "513"], ("513", "512")),
        (["--target", "tensorrt-rtx", "--max-batch", "9"], ("9", "8")),
        (["--target", "openvino"], ("openvino", "tensorrt-rtx")),
        ([], ("--target",)),
    ],
)
def test_build_request_is_refused(
    options: list[str], words: tuple[str, ...], exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    line = refused(capsys, "build", exported, tmp_path / "engine", *options)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_build_over_something_that_exists_is_refused(
    exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "engine").mkdir()
    line = refused(capsys, "build", exported, tmp_path / "engine", "--target", "tensorrt-rtx")
    assert "exists already" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], ("prompt", "empty")),
        (["--prompt", "fox " * 600], ("prompt", "tokens", "512")),
        (["--prompt", "\udcff"], ("UTF-8",)),
        (["--prompt", "x", "--top-p", "2"], ("top_p", "2")),
        (["--prompt", "x", "--temperature", "-1"], ("temperature", "-1")),
        (["--prompt", "x", "--top-k", "-1"], ("top_k", "-1")),
        (["--prompt", "x", "--repetition-penalty", "0"], ("repetition_penalty", "0")),
        (["--prompt", "x", "--temperature", "1", "--seed", "-1"], ("seed", "-1")),
        (["--prompt", "x", "--max-new-tokens", "0"], ("--max-new-tokens",)),
        ([], ("--prompt",)),
    ],
)
def test_generate_request_is_refused(
    options: list[str], words: tuple[str, ...], exported: Path, capsys: Capture
) -> None:
    line = refused(capsys, "generate", exported, *options)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "arguments", [("generate", "--prompt", "Hello"), ("validate", "--reference", TINY)]
)
def test_a_checkpoint_is_not_a_target_and_the_line_says_what_to_do(
    arguments: tuple[object, ...], capsys: Capture
) -> None:
    command, *options = arguments
    line = refused(capsys, command, TINY, *options)
    assert "is a checkpoint; export it first: qwenport export" in line


def test_validate_against_another_checkpoint_is_refused(
    exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = Path(shutil.copytree(TINY, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    report = tmp_path / "report"
    line = refused(capsys, "validate", exported, "--reference", other, "--report", report)
    assert "was not made from" in line
    assert not report.exists()


def test_report_that_is_a_file_is_refused_before_the_work(
    exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "report").touch()
    options = ["--reference", TINY, "--report", tmp_path / "report"]
    assert "not a directory" in refused(capsys, "validate", exported, *options)


def test_a_report_is_not_written_into_a_package_or_a_checkpoint(
    exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    for place in (exported, shutil.copytree(TINY, tmp_path / "checkpoint")):
        before = sorted(place.rglob("*"))
        options = ["--reference", TINY, "--report", place]
        assert "a directory of its own" in refused(capsys, "validate", exported, *options)
        assert sorted(place.rglob("*")) == before


def test_a_checkpoint_is_not_built(tmp_path: Path, capsys: Capture) -> None:
    line = refused(capsys, "build", TINY, tmp_path / "engine", "--target", "tensorrt-rtx")
    assert "is a checkpoint; export it first" in line


# the tokenizer, which is data and never a program


def replace(package: Path, name: str, content: str | None) -> None:
    """Replace, add or remove a companion file as if the checkpoint had come like that."""
    (package / name).unlink(missing_ok=True)
    if content is None:
        edit_manifest(lambda m: m["files"].pop(name))(package)
        return
    (package / name).write_text(content)
    recorded = {"bytes": (package / name).stat().st_size, "sha256": sha256(package / name)}
    edit_manifest(lambda m: m["files"].update({name: recorded}))(package)


def test_code_that_a_tokenizer_brings_is_never_run(
    package: Path, tmp_path: Path, capsys: Capture
) -> None:
    settings = json.loads((package / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}
    replace(package, "tokenizer_config.json", json.dumps(settings))
    code = f"open({str(tmp_path / 'run')!r}, 'w')\nclass Tokenizer: pass\n"
    replace(package, "evil.py", code)
    cli.main(["generate", str(package), "--prompt", "Hello", "--max-new-tokens", "1"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "options", "word"),
    [
        ("tokenizer.json", None, [], "no tokenizer"),
        ("tokenizer.json", "{}", [], "tokenizer cannot be loaded"),
        ("generation_config.json", '{"eos_token_id": "end"}', [], "eos_token_id"),
        ("generation_config.json", "[]", [], "generation_config.json"),
        ("tokenizer_config.json", '{"tokenizer_class": "Qwen2Tokenizer"}', ["--chat"], "template"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "Qwen2Tokenizer", "chat_template": "{{ raise_exception(1) }}"}',
            ["--chat"],
            "template",
        ),
    ],
)
def test_damaged_tokenizer_or_generation_config_is_refused(
    name: str, content: str | None, options: list[str], word: str, package: Path, capsys: Capture
) -> None:
    replace(package, name, content)
    assert word in refused(capsys, "generate", package, "--prompt", "Hello", *options)
