"""No traceback is a verdict: what cannot be judged is exit code 2 and one line; a verdict says what it is about."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from command_line import Capture
from defects import rows
from defects.tools import seed
from random_model import make_checkpoint

import qwenport.validate
from qwenport import cli
from qwenport.contract import MANIFEST
from qwenport.exporter import export, sha256
from qwenport.validate import Validation
from qwenport.validate import report as reports

from .bundled import DENSE, strict_json

NETWORK = ("--as", "tensorrt-network")
WAYS = ((), NETWORK)
MOST = 300  # characters of a message


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(package, checkpoint) of two layers."""
    folder = tmp_path_factory.mktemp("exit")
    checkpoint = make_checkpoint(folder / "checkpoint", positions=96)
    return export(checkpoint, folder / "package", weights="copy", max_batch=2).path, checkpoint


@pytest.fixture
def broken(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(pair[0], tmp_path / "package")), pair[1]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be opened or loaded."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(qwenport.validate, "open_target", fail)
    monkeypatch.setattr(Validation, "run", fail)


def run(package: Path, checkpoint: Path, *options: object) -> int:
    arguments = ["validate", package, "--reference", checkpoint, "--budget", "quick", *options]
    return cli.main([str(argument) for argument in arguments])


def refused(capsys: Capture, package: Path, checkpoint: Path, *options: object) -> str:
    """The one line of what must not be a verdict."""
    capsys.readouterr()
    assert run(package, checkpoint, *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err[-1] == "\n"
    line = err.removeprefix("error: ").rstrip("\n")
    assert 0 < len(line) <= MOST and "Traceback" not in line
    return line


def fix_hashes(package: Path, **changes: Any) -> None:
    manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
    for name in manifest["files"]:
        file = package / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (package / MANIFEST).write_text(json.dumps({**manifest, **changes}), encoding="utf-8")


# configs that transformers rejects


@pytest.mark.parametrize("way", WAYS, ids=["package", "network"])
@pytest.mark.parametrize(
    "change",
    [
        {"attention_dropout": None},
        {"initializer_range": 0},
        {"bos_token_id": [1]},
        {"use_cache": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_transformers_rejects_is_no_verdict(
    change: dict[str, Any],
    way: tuple[str, ...],
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """Export takes it, since the field means nothing to the model."""
    checkpoint = Path(shutil.copytree(pair[1], tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps({**config, **change}))
    package = export(checkpoint, tmp_path / "package").path
    line = refused(capsys, package, checkpoint, *way)
    assert next(iter(change)) in line and str(checkpoint / "config.json")[-40:] in line


# graphs that are none


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeros(file: Path) -> None:
    file.write_bytes(bytes(1000))


def overwritten(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100:200] = b"\xff" * 100
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def no_nodes(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    del model.graph.node[:]
    file.write_bytes(model.SerializeToString())


def a_text(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\n" * 100)


def a_node_twice(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    model.graph.node.append(model.graph.node[3])
    file.write_bytes(model.SerializeToString())


def external(key: str, value: str) -> Callable[[Path], None]:
    """Another place for one weight."""

    def change(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        weight = next(t for t in model.graph.initializer if t.name.endswith("q_proj.bias"))
        places = {entry.key: entry.value for entry in weight.external_data} | {key: value}
        del weight.external_data[:]
        for name, text in places.items():
            weight.external_data.add(key=name, value=text)
        file.write_bytes(model.SerializeToString())

    change.__name__ = f"{key}_{value.replace('/', '_')}"
    return change


DAMAGE = (
    truncated,
    zeros,
    overwritten,
    empty,
    no_nodes,
    a_text,
    a_node_twice,
    external("location", "weights/missing.safetensors"),
    external("offset", "999999999999"),
    external("offset", "-5"),
    external("length", "many"),
)


@pytest.mark.parametrize("way", WAYS, ids=["package", "network"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_graph_under_a_right_hash_is_no_verdict(
    damage: Callable[[Path], None],
    way: tuple[str, ...],
    broken: tuple[Path, Path],
    capsys: Capture,
) -> None:
    damage(broken[0] / "model.onnx")
    fix_hashes(broken[0])
    assert "model.onnx" in refused(capsys, *broken, *way)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_seq_len": "x"},
        {"max_seq_len": -5},
        {"max_batch": 1.5},
        {"dtype": ["bf16"]},
        {"rope_scaling": 5},
        {"source": {}},
        {"source": {"config_sha256": 1, "dtype": "bf16", "files": []}},
        {"weights": {"mode": 3, "files": {}}},
        {"files": []},
        {"model": None},
    ],
    ids=str,
)
def test_a_manifest_of_odd_types_is_no_verdict(
    changes: dict[str, Any], broken: tuple[Path, Path], capsys: Capture
) -> None:
    fix_hashes(broken[0], **changes)
    assert MANIFEST in refused(capsys, *broken)


def test_a_package_without_its_manifest_is_not_taken_for_a_checkpoint(
    broken: tuple[Path, Path], capsys: Capture
) -> None:
    (broken[0] / MANIFEST).unlink()
    assert f"has no {MANIFEST}" in refused(capsys, *broken)


def unknown_operator(model: ir.Model) -> None:
    model.graph.node(0).op_type = "Mystery" + "y" * 500


def missing_value(model: ir.Model) -> None:
    """An input that no node makes."""
    model.graph.node(-1).replace_input_with(0, ir.Value(name="nowhere"))


def unknown_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 999


@pytest.mark.parametrize("change", [unknown_operator, missing_value, unknown_opset])
@pytest.mark.parametrize("other_version", [False, True])
@pytest.mark.parametrize("streamed", [(), ("--stream",)], ids=["whole", "streamed"])
def test_a_graph_that_onnxruntime_does_not_load_is_no_verdict(
    change: Callable[[ir.Model], None],
    other_version: bool,
    streamed: tuple[str, ...],
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    faulty = seed(pair[0], tmp_path / "faulty", change, other_version=other_version)
    line = refused(capsys, faulty, pair[1], *streamed)
    assert "does not load" in line or "cannot be read" in line


# reports


def test_a_report_that_cannot_be_written_is_refused_before_any_work(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Capture, no_work: None
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below", file / "below" / "that", Path("/proc/qwenport/report")):
        assert f"--report {place}" in refused(capsys, *pair, "--report", place)
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_before_any_work(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Capture, no_work: None
) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, *pair, "--report", tmp_path)


def test_a_full_disk_is_refused_before_any_work(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: Capture,
    no_work: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reports.tempfile, "NamedTemporaryFile", fail)
    line = refused(capsys, *pair, "--report", tmp_path)
    assert "No space left on device" in line and f"--report {tmp_path}" in line


def test_an_old_report_does_not_survive_a_refusal(
    broken: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    for name in ("report.json", "report.html", "notes.txt"):
        (folder / name).write_text("old")
    truncated(broken[0] / "model.onnx")
    fix_hashes(broken[0])
    refused(capsys, *broken, "--report", folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_report_appears_whole_or_not_at_all(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "report"
    with monkeypatch.context() as patch:
        patch.setattr(reports.os, "fsync", fail)
        assert "disk is full" in refused(capsys, *pair, "--layers", 1, "--report", folder)
    assert list(folder.iterdir()) == []
    assert run(*pair, "--layers", 1, "--report", folder, "--quiet") == 0
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.html"}
    data = strict_json((folder / "report.json").read_text(encoding="utf-8"))
    assert data["verdict"].startswith("parity holds for the first 1 of 2 layers: ")


# verdicts


def test_an_adapter_that_export_ignored_is_ignored_by_validate(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    """transformers would apply it where peft is installed."""
    checkpoint = Path(shutil.copytree(pair[1], tmp_path / "checkpoint"))
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
    (checkpoint / "adapter_model.safetensors").write_bytes(b"no tensors")
    package = export(checkpoint, tmp_path / "package", adapter="ignore").path
    assert run(package, checkpoint) == 0
    assert "parity holds: " in capsys.readouterr().out


def overflowing(folder: Path) -> tuple[Path, Path]:
    """(package in fp16, checkpoint) whose hidden states are too large for fp16 behind its first layer."""
    from safetensors.torch import load_file, save_file

    checkpoint = make_checkpoint(folder / "checkpoint", positions=96, initializer_range=0.05)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 30000  # itself within fp16's range
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return export(checkpoint, folder / "package", dtype="fp16", max_batch=2).path, checkpoint


def test_fp16_that_overflows_fails_as_a_network_and_is_not_judged_as_a_package(
    tmp_path: Path, capsys: Capture
) -> None:
    package, checkpoint = overflowing(tmp_path)
    assert run(package, checkpoint) == 0
    out = capsys.readouterr().out
    assert "not judged: the range and rounding of fp16" in out
    assert run(package, checkpoint, *NETWORK, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fault"]["layer"] == 0
    told = json.dumps(report["scenarios"])
    assert "transformers' own run in fp16 is not finite either, from layer 0 on" in told
    assert report["verdict"].startswith("parity does NOT hold: ")


@pytest.mark.parametrize("way", WAYS, ids=["package", "network"])
def test_parity_never_holds_without_saying_what_was_judged(
    way: tuple[str, ...], pair: tuple[Path, Path], capsys: Capture
) -> None:
    assert run(*pair, *way) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("parity holds: ") and "; judged: steps of 1 to " in lines[-1]
    assert [line for line in lines[:-1] if "parity" in line] == []


def test_seed_and_budget_decide_what_is_run(pair: tuple[Path, Path], capsys: Capture) -> None:
    found = {}
    for name, options in {
        "quick": (),
        "again": ("--seed", 0),
        "other": ("--seed", 7),
        "standard": ("--budget", "standard"),
    }.items():
        assert run(*pair, *options, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        walk = next(s for s in report["scenarios"] if s["name"] == "random walk")
        found[name] = report["coverage"], walk["by_position"]
    assert found["quick"] == found["again"]
    assert found["quick"][1] != found["other"][1]
    assert (found["other"][0]["seed"], found["other"][0]["budget"]) == (7, "quick")
    assert found["standard"][0]["budget"] == "standard"
    assert found["standard"][0]["single_steps"] > found["quick"][0]["single_steps"]


@pytest.mark.parametrize(
    "way", [(), pytest.param(NETWORK, marks=pytest.mark.slow)], ids=["package", "network"]
)
def test_a_failing_random_walk_prints_a_script_that_replays(
    way: tuple[str, ...], tmp_path: Path, capsys: Capture
) -> None:
    """It runs as it stands, and prints how far the logits are from transformers'."""
    package = export(DENSE, tmp_path / "package", weights="copy", max_seq_len=128, max_batch=3).path
    faulty = seed(package, tmp_path / "faulty", rows.last_row_of_several_damped)
    assert run(faulty, DENSE, *way) == 1
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("The random walk fails"))
    script = [line.removeprefix("    ") for line in lines[start + 1 : -1]]
    off = {}
    for target in (package, faulty):
        exec("\n".join(script), {"TARGET": str(target), "CHECKPOINT": str(DENSE)})
        printed = capsys.readouterr().out.splitlines()
        off[target] = [float(line.rpartition(": ")[2]) for line in printed]
    assert max(off[package]) < 1e-3 < max(off[faulty])
