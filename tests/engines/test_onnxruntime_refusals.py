"""Builds for onnxruntime that are refused, interrupted or out of space, and engines that were changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_header
from command_line import Capture, refused

from qwenport import engines, exporter
from qwenport.contract import ENGINE_WEIGHTS, MANIFEST, MODEL
from qwenport.engines import EngineError, SessionError, build, load_engine, open_session


@pytest.fixture(scope="module")
def built(package_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "engine"
    return build(package_of("bf16").path, folder, target="onnxruntime", max_seq_len=96).path


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"gpus": "sm86"}, "--gpu is for TensorRT; target onnxruntime runs on CPUs"),
        ({"plugins": "lib.so"}, "--plugins is for TensorRT; target onnxruntime runs on CPUs"),
        ({"max_seq_len": 513}, "max sequence length 513"),
        ({"max_seq_len": 0}, "max sequence length 0"),
        ({"max_batch": 9}, "max batch 9"),
    ],
)
def test_a_refused_build_leaves_nothing(
    package_of: Any, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(engines.BuildError, match=complaint):
        build(package_of("bf16").path, tmp_path / "engine", target="onnxruntime", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--gpu", "sm86"], ["--plugins", "lib.so"]])
def test_options_for_gpus_are_one_line(
    options: list[str], package_of: Any, tmp_path: Path, capsys: Capture
) -> None:
    target = ["--target", "onnxruntime", *options]
    line = refused(capsys, "build", package_of("bf16").path, tmp_path / "engine", *target)
    assert f"{options[0]} is for TensorRT" in line


def test_an_output_that_exists_is_left_alone(package_of: Any, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    with pytest.raises(exporter.ExportError, match="exists already"):
        build(package_of("bf16").path, tmp_path / "engine", target="onnxruntime")
    assert not list((tmp_path / "engine").iterdir())


def test_an_interrupted_build_leaves_nothing(package_of: Any, tmp_path: Path) -> None:
    seen = []

    def interrupt(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(
            package_of("bf16").path, tmp_path / "engine", target="onnxruntime", progress=interrupt
        )
    assert not list(tmp_path.iterdir())
    assert {what for what, _, _ in seen} == {"writing weights"}
    assert len({total for _, _, total in seen}) == 1 and len(seen) > 3


def test_progress_ends_at_the_bytes_of_the_weights(package_of: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    engine = build(
        package_of("fp32").path,
        tmp_path / "engine",
        target="onnxruntime",
        progress=lambda what, done, total: seen.append((done, total)),
    )
    size = engine.manifest["weights"]["bytes"]
    assert seen == sorted(seen) and seen[-1] == (size, size)


def test_a_disk_that_is_too_small_is_noticed_before_writing(
    package_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(exporter.ExportError, match="not enough disk space"):
        build(package_of("bf16").path, tmp_path / "engine", target="onnxruntime")
    assert not list(tmp_path.iterdir())


def test_a_package_whose_weights_were_cut_is_refused(package_of: Any, tmp_path: Path) -> None:
    package = Path(shutil.copytree(package_of("fp16").path, tmp_path / "package"))
    weights = package / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(exporter.PackageError, match="truncated"):
        build(package, tmp_path / "engine", target="onnxruntime")


def edit(**changes: Any) -> Callable[[Path], None]:
    def damage(engine: Path) -> None:
        manifest = json.loads((engine / MANIFEST).read_text())
        (engine / MANIFEST).write_text(json.dumps(manifest | changes))

    return damage


def cut(engine: Path) -> None:
    weights = engine / ENGINE_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4])


def rename_a_tensor(engine: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.norm.weigth"] = header.pop("model.norm.weight")

    edit_header(engine / ENGINE_WEIGHTS, change)


def append(name: str) -> Callable[[Path], None]:
    def damage(engine: Path) -> None:
        with (engine / name).open("ab") as stream:
            stream.write(b" ")

    return damage


def profiles(least: int, span: int) -> list[dict[str, Any]]:
    """One, for steps of so many tokens and more, and spans of so many slots and fewer."""
    tokens = {"min": [1, least], "max": [8, 96]}
    return [
        {
            "input_ids": tokens,
            "logits_indices": tokens,
            "key_positions": {"max": [span]},
        }
    ]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "another form of attention": (
        edit(attention={"form": "chunked", "span_multiple": 96, "slots": 96}),
        "attention of form masked",
    ),
    "no such form": (
        edit(attention={"form": "x", "span_multiple": 64, "slots": 96}),
        "attention.form is 'x'",
    ),
    "other slots": (
        edit(attention={"form": "masked", "span_multiple": 64, "slots": 128}),
        "attention of form masked over 128 slots in spans of 64, and max_seq_len 96",
    ),
    "queries that are not there": (
        edit(attention={"form": "direct", "span_multiple": 96, "slots": 96}),
        "attention of form direct, but the outputs of queries are not one per layer",
    ),
    "no profile": (edit(profiles=[]), "profiles is empty"),
    "a profile of fewer rows": (
        edit(profiles=[{"input_ids": {"max": [1, 96]}}]),
        "a profile's input_ids is not of max_batch rows",
    ),
    "no profile for single tokens": (
        edit(profiles=profiles(2, 96)),
        "no profile is for single tokens over all slots",
    ),
    "no profile over all slots": (
        edit(profiles=profiles(1, 64)),
        "no profile is for single tokens over all slots",
    ),
    "older format": (edit(format_version=2), "format version 2.*build the engine again"),
    "unknown flavour": (edit(flavour="openvino"), "flavour is 'openvino'"),
    "another flavour": (edit(flavour="tensorrt"), "does not list engine.plan"),
    "half precision": (edit(dtype="bf16"), "an engine for onnxruntime is in fp32"),
    "for a GPU": (edit(gpus=["sm86"]), "without GPUs and plugins"),
    "no weights": (edit(weights={"bytes": 1, "files": {}}), "does not list weights.safetensors"),
    "weights of no shape": (edit(weights=7), "the manifest.weights is 7"),
    "truncated weights": (cut, "weights.safetensors: truncated or corrupt"),
    "weights gone": (lambda path: (path / ENGINE_WEIGHTS).unlink(), "weights.safetensors is miss"),
    "another header": (rename_a_tensor, "weights.safetensors does not match the manifest"),
    "changed graph": (append(MODEL), "model.onnx does not match the manifest"),
    "changed tokenizer": (append("tokenizer.json"), "tokenizer.json does not match the manifest"),
    "longer than its tables": (
        edit(
            max_seq_len=97,
            attention={"form": "masked", "span_multiple": 64, "slots": 97},
            profiles=profiles(1, 97),
        ),
        "max_seq_len is 97, and the rope tables",
    ),
    "another file": (lambda path: (path / "more").touch(), "more is not in the manifest"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_changed_engine_is_refused(name: str, engine: Path) -> None:
    damage, words = DAMAGE[name]
    damage(engine)
    with pytest.raises(EngineError, match=words):
        load_engine(engine)


@pytest.mark.parametrize("name", ["truncated weights", "changed graph", "half precision"])
def test_every_command_refuses_a_changed_engine(name: str, engine: Path, capsys: Capture) -> None:
    damage, words = DAMAGE[name]
    damage(engine)
    for arguments in (
        ("inspect", engine),
        ("generate", engine, "--prompt", "Hello"),
        ("validate", engine, "--reference", "examples/tiny-qwen2.5"),
    ):
        line = refused(capsys, *arguments)
        assert words.partition(":")[0] in line


def test_an_older_onnxruntime_is_one_line(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.24.1")
    line = refused(capsys, "generate", built, "--prompt", "Hello")
    assert "onnxruntime here is 1.24.1; 1.26 or newer is needed" in line


def test_a_manifest_without_weights_is_refused(engine: Path) -> None:
    manifest = json.loads((engine / MANIFEST).read_text())
    del manifest["weights"]
    (engine / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="lacks weights"):
        load_engine(engine)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("bindings", "inputs", -1, "shape", -1), 33, "its inputs are not those in"),
        (("model", "num_hidden_layers"), 2**31, "2147483648 layers, but 10 aliases"),
        (("runtime_version",), "x", "runtime_version is 'x'"),
        (("bindings", "outputs", 0, "dtype"), "float16", "its outputs are not those in"),
        (("model", "head_dim"), 31, "its model does not have its bindings' shapes"),
        (("model", "num_hidden_layers"), 4, "4 layers, but 10 aliases"),
        (("model", "vocab_size"), 5, "text.stop_tokens has ids beyond the vocabulary of 5"),
    ],
)
def test_a_manifest_that_is_not_the_graph_s_is_refused(
    keys: tuple[Any, ...], value: Any, words: str, engine: Path
) -> None:
    manifest = json.loads((engine / MANIFEST).read_text())
    inner: Any = manifest
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (engine / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match=words):
        open_session(engine)


def test_an_engine_that_needs_a_newer_onnxruntime_is_refused(engine: Path) -> None:
    manifest = json.loads((engine / MANIFEST).read_text())
    (engine / MANIFEST).write_text(json.dumps(manifest | {"runtime_version": "9.99"}))
    with pytest.raises(SessionError, match=r"9\.99 or newer is needed"):
        open_session(engine)


@pytest.mark.parametrize("device", ["cuda", "xx", None])
def test_another_device_is_refused(engine: Path, device: Any) -> None:
    with pytest.raises(SessionError, match=r"runs on the CPU only|device must be one of cpu, cuda"):
        open_session(engine, device=device)
