"""What is compared byte for byte before anything is computed: every attack here leaves the manifest's hashes right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwenport.contract import MANIFEST
from qwenport.exporter import COMPANIONS, PackageError, export, sha256
from qwenport.exporter.safetensors_file import read_safetensors_header
from qwenport.validate import ValidationError
from qwenport.validate import identity as judged
from qwenport.validate.identity import Identity, check_identity
from qwenport.validate.report import ScenarioResult
from qwenport.validate.target import Target, open_target

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
EMBEDDING = "model.embed_tokens.weight"
WAYS: dict[str, tuple[Path, dict[str, Any]]] = {
    "dense link": (DENSE, {}),
    "dense copy": (DENSE, {"weights": "copy"}),
    "dense fp16": (DENSE, {"dtype": "fp16", "max_seq_len": 100}),
    "dense fp32": (DENSE, {"dtype": "fp32"}),
    "mixture link": (MIXTURE, {}),
    "mixture copy": (MIXTURE, {"weights": "copy", "max_batch": 3}),
    "mixture pack": (MIXTURE, {"weights": "pack"}),
    "mixture fp16": (MIXTURE, {"dtype": "fp16"}),
}


def rows(found: Identity) -> dict[str, ScenarioResult]:
    return {row.name: row for row in found.rows}


def failures(found: Identity) -> dict[str, str]:
    """Row -> why it failed."""
    return {row.name: "; ".join(row.failures) for row in found.rows if row.status == "failed"}


def judge(package: Path, checkpoint: Path = DENSE) -> Identity:
    return check_identity(open_target(package), checkpoint)


def fix_manifest(package: Path, change: Callable[[dict[str, Any]], Any] = lambda m: None) -> None:
    """Make every size and hash in the manifest right again."""
    manifest = json.loads((package / MANIFEST).read_text())
    for name in manifest["files"]:
        file = package / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    for name in manifest["weights"]["files"]:
        file, _ = read_safetensors_header(package / name)
        manifest["weights"]["files"][name] = {
            "bytes": file.size,
            "header_sha256": file.header_sha256,
        }
    change(manifest)
    (package / MANIFEST).write_text(json.dumps(manifest))


def change_model(package: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    change(model)
    (package / "model.onnx").write_bytes(model.SerializeToString())
    fix_manifest(package)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def point(tensor: onnx.TensorProto, **places: Any) -> None:
    for entry in tensor.external_data:
        if entry.key in places:
            entry.value = str(places[entry.key])


def bytes_of(package: Path, name: str) -> tuple[Path, int, int]:
    """(file, offset, length) of an initializer."""
    model = onnx.load(package / "model.onnx", load_external_data=False)
    places = {e.key: e.value for e in initializer(model, name).external_data}
    return package / places["location"], int(places["offset"]), int(places["length"])


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


@pytest.fixture(scope="module")
def package_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The package of a way; do not change it."""
    made: dict[str, Path] = {}

    def package(way: str) -> Path:
        if way not in made:
            checkpoint, options = WAYS[way]
            own = tmp_path_factory.mktemp("identity") / "package"
            made[way] = export(checkpoint, own, **options).path
        return made[way]

    return package


@pytest.fixture
def copy_of(package_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of it to change, which shares no file with a checkpoint."""

    def copy(way: str) -> Path:
        return Path(shutil.copytree(package_of(way), tmp_path / "package"))

    return copy


@pytest.fixture
def package(copy_of: Callable[[str], Path]) -> Path:
    return copy_of("dense copy")


@pytest.mark.parametrize("way", WAYS)
def test_what_the_exporter_wrote_is_identical(
    way: str, package_of: Callable[[str], Path], copy_of: Callable[[str], Path]
) -> None:
    checkpoint = WAYS[way][0]
    for package in (package_of(way), copy_of(way)):
        seen: list[tuple[str, int, int]] = []
        target = open_target(package)
        found = check_identity(target, checkpoint, lambda *step, seen=seen: seen.append(step))
        assert not failures(found) and found.safe
        assert [(row.name, row.status) for row in found.rows] == [
            ("weights", "passed"), ("graph", "passed"), ("files", "passed"),
        ]  # fmt: skip
        assert seen[-1][1] == seen[-1][2] and all(done <= total for _, done, total in seen)
        whole = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
        assert found.weights_sha256["model.safetensors"] == whole
        own = {
            f"weights/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (package / "weights").iterdir()
        }
        own = {name: digest for name, digest in own.items() if digest != whole}
        assert found.weights_sha256 == {"model.safetensors": whole, **own}
        assert len(own) == (way.endswith(("pack", "fp16", "fp32")))


def test_shards_in_a_hugging_face_cache_are_hashed_and_compared(tmp_path: Path) -> None:
    tensors = load_file(DENSE / "model.safetensors")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for name in COMPANIONS:
        if (DENSE / name).is_file():
            shutil.copyfile(DENSE / name, snapshot / name)
    weight_map = {}
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        name = f"model-{number + 1:05}-of-00002.safetensors"
        save_file(part, blobs / str(number))
        (snapshot / name).symlink_to(blobs / str(number))
        weight_map |= dict.fromkeys(part, name)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    package = export(snapshot, tmp_path / "package", weights="copy").path
    found = judge(package, snapshot)
    assert not failures(found)
    assert found.weights_sha256 == {
        name: sha256(snapshot / name) for name in sorted(set(weight_map.values()))
    }
    file, offset, _ = bytes_of(package, EMBEDDING)
    overwrite(file, offset, b"\1\2\3\4")
    changed = judge(package, snapshot)
    assert changed.weights_sha256[f"weights/{file.name}"] == sha256(file)
    assert f"first: {EMBEDDING}: 2 of" in failures(changed)["weights"]


# attacks on the weights


def test_a_location_outside_the_package_is_not_safe_and_not_read(package: Path) -> None:
    outside = package.parent.parent / "outside.safetensors"
    shutil.copyfile(package / "weights" / "model.safetensors", outside)
    absolute = str(outside.resolve())
    for location in ("../../outside.safetensors", absolute, "weights/../../../outside.safetensors"):
        change_model(package, lambda m, to=location: point(initializer(m, EMBEDDING), location=to))
        found = judge(package)
        assert not found.safe
        assert f"{EMBEDDING} is in {location}" in failures(found)["files"]
        assert f"{EMBEDDING}: lies outside the package" in failures(found)["weights"]
        assert "location" in failures(found)["graph"]


def test_a_location_outside_hidden_in_a_function_is_not_safe(package: Path) -> None:
    def hide(model: onnx.ModelProto) -> None:
        hidden = onnx.TensorProto(name="hidden", data_type=1, dims=[1])
        hidden.data_location = onnx.TensorProto.EXTERNAL
        hidden.external_data.add(key="location", value="../x")
        node = onnx.helper.make_node("Constant", [], ["hidden"], value=hidden)
        model.functions[0].node.insert(0, node)

    change_model(package, hide)
    found = judge(package)
    assert not found.safe and set(failures(found)) == {"files", "graph"}
    assert "in function qwenport.RotaryEmbedding" in failures(found)["graph"]


def test_a_weight_file_that_is_a_symbolic_link_is_refused(package: Path) -> None:
    file = package / "weights" / "model.safetensors"
    elsewhere = package.parent / "elsewhere.safetensors"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(PackageError, match="symbolic link"):
        judge(package)


def test_a_megabyte_of_other_weights_is_counted(package: Path) -> None:
    file = package / "weights" / "model.safetensors"
    data = np.frombuffer(file.read_bytes()[-1_000_000:], np.uint16)
    overwrite(file, file.stat().st_size - 1_000_000, (data ^ 1).tobytes())
    found = judge(package)
    assert set(failures(found)) == {"weights"} and found.safe
    assert found.weights_sha256["weights/model.safetensors"] == sha256(file)
    assert found.weights_sha256["model.safetensors"] == sha256(DENSE / "model.safetensors")


@pytest.mark.parametrize("value", [b"\0\0", b"\xc0\x7f"], ids=["zero", "nan"])
def test_one_other_embedding_row_is_named(package: Path, value: bytes) -> None:
    file, offset, _ = bytes_of(package, EMBEDDING)
    overwrite(file, offset + 77 * 192 * 2, value * 192)
    found = judge(package)
    text = failures(found)["weights"]
    assert "tensors that differ 1," in text and f"first: {EMBEDDING}: 192 of 393216 values" in text


def test_equal_nans_are_equal_and_another_nan_is_not(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(DENSE, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[EMBEDDING][5] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors")
    package = export(checkpoint, tmp_path / "package", weights="copy").path
    assert not failures(judge(package, checkpoint))
    file, offset, _ = bytes_of(package, EMBEDDING)
    overwrite(file, offset + 5 * 192 * 2, b"\xc1\x7f")
    assert f"{EMBEDDING}: 1 of" in failures(judge(package, checkpoint))["weights"]


def test_exchanged_tensors_of_one_shape_are_named(package: Path) -> None:
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    (file, first, length), (_, second, _) = (bytes_of(package, name) for name in names)
    data = file.read_bytes()
    overwrite(file, first, data[second : second + length])
    overwrite(file, second, data[first : first + length])
    found = judge(package)
    assert set(failures(found)) == {"weights"}
    assert "tensors that differ 2," in failures(found)["weights"]
    assert names[0] in failures(found)["weights"]


def test_another_tensor_s_offset_is_seen_in_bytes_and_in_the_graph(
    copy_of: Callable[[str], Path],
) -> None:
    package, name = copy_of("dense link"), "model.layers.0.input_layernorm.weight"
    _, offset, _ = bytes_of(package, "model.layers.1.input_layernorm.weight")
    change_model(package, lambda m: point(initializer(m, name), offset=offset))
    found = judge(package)
    assert set(failures(found)) == {"weights", "graph"}
    assert name in failures(found)["weights"]
    assert f"initializer {name} has offset" in failures(found)["graph"]


def test_an_inline_initializer_in_place_of_a_weight_is_foreign(package: Path) -> None:
    def replace(model: onnx.ModelProto) -> None:
        own = np.ones(192, np.float32)
        extra = onnx.helper.make_tensor("gain", onnx.TensorProto.BFLOAT16, [192], own)
        model.graph.initializer.append(extra)
        for node in model.graph.node:
            node.input[:] = ["gain" if i == "model.norm.weight" else i for i in node.input]

    change_model(package, replace)
    found = judge(package)
    text = failures(found)["weights"]
    assert "without use: model.norm.weight" in text
    assert "tensors that the checkpoint does not have 1," in text and "gain" in text
    assert "graph" in failures(found)


def test_a_weight_written_into_model_onnx_is_compared(package: Path) -> None:
    file, offset, length = bytes_of(package, "model.norm.weight")
    data = file.read_bytes()[offset : offset + length]

    def inline(values: bytes) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            tensor = initializer(model, "model.norm.weight")
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = values

        return change

    change_model(package, inline(data))
    assert set(failures(judge(package))) == {"graph"}
    change_model(package, inline(b"\0\0" + data[2:]))
    assert "model.norm.weight: 1 of 192 values" in failures(judge(package))["weights"]


@pytest.mark.parametrize("way", ["dense fp16", "dense fp32", "mixture fp16"])
def test_one_wrong_value_after_a_dtype_change_is_counted(
    way: str, copy_of: Callable[[str], Path]
) -> None:
    package = copy_of(way)
    file, offset, length = bytes_of(package, "model.norm.weight")
    last = file.read_bytes()[offset + length - 1]
    overwrite(file, offset + length - 1, bytes([last ^ 1]))
    found = judge(package, WAYS[way][0])
    assert set(failures(found)) == {"weights"}
    assert "model.norm.weight: 1 of" in failures(found)["weights"]


@pytest.mark.parametrize("way", ["mixture pack", "mixture fp16"])
def test_experts_stacked_in_another_order_are_seen(
    way: str, copy_of: Callable[[str], Path]
) -> None:
    package = copy_of(way)
    name = next(
        t.name
        for t in onnx.load(package / "model.onnx", load_external_data=False).graph.initializer
        if t.name.endswith("experts.gate_up_proj")
    )
    file, _, _ = bytes_of(package, name)
    with safe_open(file, framework="pt") as opened:
        metadata, names = opened.metadata(), list(opened.keys())
    tensors = load_file(file)
    assert name in names and metadata is None
    _, offset, _ = bytes_of(package, name)
    gate, up = tensors[name].chunk(2, dim=1)
    swapped = torch.cat([up, gate], dim=1).contiguous().view(torch.uint8).numpy().tobytes()
    overwrite(file, offset, swapped)
    found = judge(package, MIXTURE)
    assert set(failures(found)) == {"weights"} and f"first: {name}" in failures(found)["weights"]


# attacks on the graph


def first_node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


GRAPH_CHANGES: dict[str, tuple[Callable[[onnx.ModelProto], Any], str]] = {
    "attribute": (
        lambda m: setattr(first_node(m, "Attention").attribute[0], "f", 0.5),
        "Attention node model.layers.0.self_attn",
    ),
    "operator": (
        lambda m: setattr(first_node(m, "Add"), "op_type", "Sub"),
        "Add node model.layers.0",
    ),
    "input": (
        lambda m: first_node(m, "MatMul").input.reverse(),
        "q_proj.MatMul has input 0 model.layers.0.self_attn.q_proj.Transpose, not model.layers.0",
    ),
    "missing node": (lambda m: m.graph.node.remove(first_node(m, "Add")), "is missing"),
    "extra node": (
        lambda m: m.graph.node.append(onnx.helper.make_node("Neg", ["logits"], ["x"], name="n")),
        "Neg node n is not in the exporter's graph",
    ),
    "function": (
        lambda m: m.functions[0].node[0].input.reverse(),
        "in function qwenport.RotaryEmbedding",
    ),
    "opset": (lambda m: setattr(m.opset_import[0], "version", 23), "the model has opset_import"),
    "output": (
        lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 10),
        "output logits has type",
    ),
}


@pytest.mark.parametrize("change", GRAPH_CHANGES)
def test_a_changed_graph_is_named_in_words(package: Path, change: str) -> None:
    make, words = GRAPH_CHANGES[change]
    change_model(package, make)
    found = judge(package)
    assert words in failures(found)["graph"], failures(found)["graph"]
    assert "differ 1" not in failures(found).get("weights", "")


def test_another_version_s_graph_is_not_compared(package: Path) -> None:
    fix_manifest(package, lambda m: m.update(qwenport_version="0.0.1"))
    row = rows(judge(package))["graph"]
    assert row.status == "not run" and "written by Qwenport 0.0.1; this is" in (row.reason or "")


@pytest.mark.parametrize("content", [b"\xff" * 100, b"", b"x" * 10_000])
def test_a_file_that_is_no_model_cannot_be_judged(content: bytes, package: Path) -> None:
    (package / "model.onnx").write_bytes(content)
    fix_manifest(package)
    with pytest.raises(ValidationError, match=r"model.onnx: not an ONNX model: "):
        judge(package)


# attacks on the files


def test_a_swapped_tokenizer_is_named(package: Path) -> None:
    tokenizer = json.loads((package / "tokenizer.json").read_text())
    (package / "tokenizer.json").write_text(json.dumps(tokenizer))
    fix_manifest(package)
    found = judge(package)
    assert set(failures(found)) == {"files"}
    assert "tokenizer.json differs" in failures(found)["files"]


def test_an_extra_file_is_named(package: Path) -> None:
    (package / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(PackageError, match=r"chat_template\.jinja is not in the manifest"):
        judge(package)
    fix_manifest(package, lambda m: m["files"].update({"chat_template.jinja": {
        "bytes": 14, "sha256": sha256(package / "chat_template.jinja")}}))  # fmt: skip
    text = failures(judge(package))["files"]
    assert "chat_template.jinja is only in the target" in text


def test_a_missing_companion_is_named(package: Path) -> None:
    (package / "generation_config.json").unlink()
    manifest = json.loads((package / MANIFEST).read_text())
    del manifest["files"]["generation_config.json"]
    (package / MANIFEST).write_text(json.dumps(manifest))
    text = failures(judge(package))["files"]
    assert "generation_config.json is only in the checkpoint" in text


def _half(manifest: dict[str, Any]) -> None:
    """Say fp16 wherever the manifest says bf16."""
    manifest["dtype"] = "fp16"
    for binding in (*manifest["bindings"]["inputs"], *manifest["bindings"]["outputs"]):
        binding["dtype"] = binding["dtype"].replace("bfloat16", "float16")


MANIFEST_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "dtype": (
        lambda m: _half(m),
        "the graph's 4, must be == 0 (first: bindings: inputs: 5: dtype: float16 in the manifest",
    ),
    "opset": (lambda m: m.update(opset=23), "opset: 23 in the manifest, 24 in the graph"),
    "operators": (lambda m: m.update(ops={}), "ops: qwenport.RotaryEmbedding: None"),
    "bindings": (
        lambda m: m["bindings"]["outputs"][0].update(dtype="float16"),
        "bindings: outputs: 0: dtype: float16 in the manifest, float in the graph",
    ),
    "mode": (lambda m: m["weights"].update(mode="convert"), "mode convert in the manifest"),
}


@pytest.mark.parametrize("change", MANIFEST_CHANGES)
def test_a_manifest_that_says_what_the_graph_does_not_is_named(package: Path, change: str) -> None:
    make, words = MANIFEST_CHANGES[change]
    fix_manifest(package, make)
    assert words in failures(judge(package))["files"], failures(judge(package))["files"]


# engines


def test_an_engine_s_companion_files_are_compared(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_target(package)
    engine = Target(**{**vars(opened), "judged_as": "engine", "package": None, "device": "cuda"})
    found = check_identity(engine, DENSE)
    assert [row.status for row in found.rows] == ["not run", "not run", "passed"]
    assert rows(found)["weights"].reason == judged.IN_THE_PLAN
    assert found.weights_sha256 == {"model.safetensors": sha256(DENSE / "model.safetensors")}
    os.remove(package / "tokenizer.json")
    assert (
        "tokenizer.json is only in the checkpoint"
        in failures(check_identity(engine, DENSE))["files"]
    )
