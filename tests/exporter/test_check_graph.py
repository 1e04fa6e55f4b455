"""A package whose files were changed and whose hashes were put right: every command says so, in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qwenport import cli
from qwenport.engines import open_session
from qwenport.exporter import PackageError, export, load_package

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2.5"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(TINY, tmp_path_factory.mktemp("whole") / "package", weights="copy").path


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "package"))


def put_right(package: Path, name: str) -> None:
    """Record a file's new size and hash."""
    manifest = json.loads((package / "qwenport.json").read_text())
    data = (package / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (package / "qwenport.json").write_text(json.dumps(manifest))


def refused_everywhere(package: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What inspect, generate and build say; each one line and exit code 2."""
    said = []
    engine = package.parent / "engine"
    for arguments in (
        ["inspect", package],
        ["generate", package, "--prompt", "x", "-q"],
        ["build", package, engine, "--target", "tensorrt-rtx", "-q"],
    ):
        assert cli.main([str(argument) for argument in arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and len(line) <= 300
        said.append(line)
    assert not engine.exists()
    with pytest.raises(PackageError):
        open_session(package)
    return said


def external(tensor: onnx.TensorProto, **changes: object) -> None:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    facts |= {key: str(value) for key, value in changes.items()}
    del tensor.external_data[:]
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=value)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(each for each in model.graph.initializer if each.name == name)


NORM = "model.layers.0.input_layernorm.weight"
CHANGES: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "table elsewhere": lambda m: external(initializer(m, "rope.cos"), location="../p/x"),
    "table absolute": lambda m: external(initializer(m, "rope.cos"), location="/etc/passwd"),
    "table in config": lambda m: external(initializer(m, "rope.cos"), location="config.json"),
    "table nowhere": lambda m: external(initializer(m, "rope.cos"), location="nope"),
    "table in the folder": lambda m: external(initializer(m, "rope.cos"), location="weights"),
    "table in the weights": lambda m: external(
        initializer(m, "rope.cos"), location="weights/../weights/model.safetensors"
    ),
    "table in the header": lambda m: external(initializer(m, "rope.cos"), offset=8),
    "table far away": lambda m: external(initializer(m, "rope.cos"), offset=99999999999),
    "table of one byte": lambda m: external(initializer(m, "rope.cos"), length=1),
    "table too long": lambda m: external(initializer(m, "rope.cos"), length=99999999999),
    "table of a billion rows": lambda m: initializer(m, "rope.cos").dims.__setitem__(0, 10**12),
    "tables exchanged": lambda m: external(
        initializer(m, "rope.cos"),
        offset=next(e.value for e in initializer(m, "rope.sin").external_data if e.key == "offset"),
    ),
    "weight shifted": lambda m: external(initializer(m, NORM), offset=24),
    "weight too short": lambda m: initializer(m, NORM).dims.__setitem__(0, 8),
    "weight of another type": lambda m: setattr(
        initializer(m, NORM), "data_type", onnx.TensorProto.FLOAT16
    ),
    "inputs gone": lambda m: _clear(m.graph.input),
    "outputs gone": lambda m: _clear(m.graph.output),
    "output of nothing": lambda m: setattr(m.graph.output[0], "name", "nothing\x1b[31m"),
    "a node without its input": lambda m: m.graph.node[3].input.__setitem__(0, "nobody"),
    "another opset": lambda m: setattr(m.opset_import[0], "version", 21),
}


def _clear(field: Any) -> None:
    del field[:]


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_graph_is_refused_by_every_command(
    name: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    CHANGES[name](model)
    (package / "model.onnx").write_bytes(model.SerializeToString())
    put_right(package, "model.onnx")
    assert all("\x1b" not in line for line in refused_everywhere(package, capsys))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.123, 2.0])
@pytest.mark.parametrize("row", [0, 7, -1])
def test_one_wrong_value_of_a_rope_table_is_refused(
    value: float, row: int, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {
        name: np.array(table) for name, table in load_file(package / "rope.safetensors").items()
    }
    tables["rope.cos"][row, 3] = value
    save_file(tables, package / "rope.safetensors")
    put_right(package, "rope.safetensors")
    for line in refused_everywhere(package, capsys):
        assert "rope.safetensors" in line


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dtype": lambda m: m.update(dtype="fp32"),
    "opset": lambda m: m.update(opset=23),
    "a huge opset": lambda m: m.update(opset=10**30),
    "a huge batch": lambda m: m.update(max_batch=10**9),
    "a version that is no integer": lambda m: m.update(format_version=float(m["format_version"])),
    "no bindings": lambda m: m["bindings"].update(inputs=[], outputs=[]),
    "a binding's shape": lambda m: m["bindings"]["inputs"][0].update(shape=["batch", 10**30]),
    "a binding's dtype": lambda m: m["bindings"]["inputs"][0].update(dtype="/etc/passwd"),
    "no source": lambda m: m["source"].update(files=[]),
    "bytes": lambda m: m["weights"].update(bytes=10**30),
    "operators": lambda m: m.update(ops={}),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_the_graph_contradicts_is_refused_by_every_command(
    name: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((package / "qwenport.json").read_text())
    MANIFESTS[name](manifest)
    (package / "qwenport.json").write_text(json.dumps(manifest))
    refused_everywhere(package, capsys)


def test_a_manifest_that_says_something_twice_is_refused(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (package / "qwenport.json").read_text()
    (package / "qwenport.json").write_text(text.replace("{", '{"dtype": "fp32",', 1))
    assert all("given twice" in line for line in refused_everywhere(package, capsys))


@given(data=st.data())
def test_whatever_a_graph_s_tensor_says_only_what_was_exported_is_taken(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One fact of one tensor, anything else."""
    package = Path(shutil.copytree(whole, tmp_path_factory.mktemp("drawn") / "package"))
    model = onnx.load(package / "model.onnx", load_external_data=False)
    tensor = data.draw(st.sampled_from([t for t in model.graph.initializer if t.external_data]))
    facts = {entry.key: entry.value for entry in tensor.external_data}
    key = data.draw(st.sampled_from(["offset", "length", "location"]))
    values = st.text(max_size=8) if key == "location" else st.integers(-(2**62), 2**62).map(str)
    value = data.draw(values)
    external(tensor, **{key: value})
    (package / "model.onnx").write_bytes(model.SerializeToString())
    put_right(package, "model.onnx")
    if facts[key] == value:
        load_package(package).check_graph()
        return
    with pytest.raises(PackageError):
        load_package(package).check_graph()
