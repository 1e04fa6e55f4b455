"""Packages of mixtures of experts: their graph, and experts stacked there or in a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from checkpoints import (
    library_bytes,
    mini,
    random_tensors,
    stack_experts,
    tensor_shapes,
    to_bytes,
    write_checkpoint,
)
from packaged import (
    DTYPES,
    STATED,
    Exported,
    assert_logits_are_transformers,
    external,
    graph_of,
    layer_nodes,
    state,
)
from safetensors.torch import load_file

from qwenport import QwenportError
from qwenport.exporter import (
    ExportError,
    PackageError,
    export,
    load_package,
    open_checkpoint,
    parse_config,
)
from qwenport.exporter.families import FAMILIES as EVERY_FAMILY
from qwenport.exporter.graph import build_graph
from qwenport.exporter.weights import PACKED

MOE_TYPES = tuple(name for name, family in EVERY_FAMILY.items() if family.sparse)

MAX_NODES_A_SPARSE_LAYER = 60
STACKS = ("experts.gate_up_proj", "experts.down_proj")
FAMILIES = pytest.mark.parametrize("family", MOE_TYPES)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        found |= load_file(file)
    return found


# --- the graph


@FAMILIES
@pytest.mark.parametrize("stacked", [False, True])
def test_a_sparse_layer_has_as_many_nodes_for_four_experts_as_for_two_hundred(
    family: str, stacked: bool, tmp_path: Path
) -> None:
    counts = {}
    for experts in (4, 200):
        raw = mini(family, num_experts=experts)
        tensors = random_tensors(tensor_shapes(raw, stacked=stacked), torch.float32)
        checkpoint = write_checkpoint(tmp_path / f"{experts}", raw, tensors)
        config = export(checkpoint, tmp_path / f"{experts}.package").config
        assert config.moe is not None and config.moe.num_experts == experts
        nodes = layer_nodes(graph_of(tmp_path / f"{experts}.package"))
        counts[experts] = {layer: len(nodes[str(layer)]) for layer in config.moe.layers}
    assert counts[4] == counts[200]
    assert max(counts[4].values()) <= MAX_NODES_A_SPARSE_LAYER


@pytest.mark.parametrize("depth", [2, 3, 48])
def test_each_kind_of_layer_is_traced_once_at_any_depth(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenport.exporter import tracing

    calls, real = [], tracing.trace

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(tracing, "trace", counted)
    raw = mini("qwen2_moe", num_hidden_layers=depth, decoder_sparse_step=2)
    config, shapes = parse_config(raw), tensor_shapes(raw)

    def tensor(name: str) -> ir.TensorProtocol | None:
        """One that is nowhere; None for a stack."""
        if name.startswith("model.layers.") and name not in shapes:
            return None
        shape = ir.Shape(shapes.get(name, (64, 4)))  # or a rotary table
        return ir.ExternalTensor("nowhere", 0, 1, ir.DataType.FLOAT, shape=shape, name=name)

    build_graph(config, "fp32", tensor)
    kinds = {config.moe_of(layer) for layer in range(depth)}
    assert len(kinds) == (2 if depth > 3 else 1)
    assert len(calls) == 2 + len(kinds)  # and what comes before and after the layers


def stacks_of(model: onnx.ModelProto) -> list[tuple[str, onnx.NodeProto | None]]:
    """(name, its Reshape or None) of each stack that an experts operator reads."""
    made = {name: node for node in model.graph.node for name in node.output}
    experts = [node for node in model.graph.node if node.op_type == "MoEExperts"]
    return [(name, made.get(name)) for node in experts for name in node.input[3:]]


def test_single_experts_are_stacked_by_one_concat_in_their_order(qwen2_moe: Exported) -> None:
    model, raw = graph_of(qwen2_moe.package), mini("qwen2_moe")
    shapes = tensor_shapes(raw, stacked=True)
    made = {name: node for node in model.graph.node for name in node.output}
    stored = [tensor for tensor in model.graph.initializer if not tensor.external_data]
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored}
    stacks = stacks_of(model)
    assert [name for name, _ in stacks] == [n for n in shapes if n.endswith(STACKS)]
    for name, reshape in stacks:
        assert reshape is not None and reshape.op_type == "Reshape"
        assert tuple(constants[reshape.input[1]]) == shapes[name]
        concat = made[reshape.input[0]]
        assert concat.op_type == "Concat" and [a.i for a in concat.attribute] == [0]
        prefix, kind = name.rsplit(".", 1)
        parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
        assert list(concat.input) == [
            f"{prefix}.{expert}.{part}.weight"
            for expert in range(raw["num_experts"])
            for part in parts
        ]
    concats = [node for node in model.graph.node if node.op_type == "Concat"]
    assert len(concats) == len(stacks) == 2 * 2


def test_stacked_experts_are_read_as_they_lie(qwen3_moe: Exported) -> None:
    model = graph_of(qwen3_moe.package)
    shapes = tensor_shapes(mini("qwen3_moe"), stacked=True)
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    stacks = stacks_of(model)
    assert len(stacks) == 2 * 2
    for name, reshape in stacks:
        assert reshape is None and dims[name] == shapes[name]
    assert not [node for node in model.graph.node if node.op_type == "Concat"]


# --- pack


@pytest.fixture
def packed(qwen2_moe: Exported, tmp_path: Path) -> Exported:
    """A package of the sharded mixture with its experts stacked in a file."""
    export(qwen2_moe.checkpoint, tmp_path / "package", weights="pack")
    return Exported(qwen2_moe.checkpoint, tmp_path / "package")


def test_packed_stacks_are_the_single_experts_one_after_the_other(packed: Exported) -> None:
    stacked = stack_experts(tensors_of(packed.checkpoint))
    expected = {n: t for n, t in stacked.items() if n.endswith(STACKS)}
    found = load_file(packed.package / "weights" / PACKED)
    assert len(expected) == 2 * 2 and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_what_is_not_packed_is_by_reference(packed: Exported, qwen2_moe: Exported) -> None:
    ours = {t.name: t for t in graph_of(packed.package).graph.initializer}
    linked = {t.name: t for t in graph_of(qwen2_moe.package).graph.initializer}
    stacks = [name for name, _ in stacks_of(graph_of(packed.package))]
    for name, tensor in ours.items():
        if name in stacks:
            assert external(tensor)["location"] == f"weights/{PACKED}"
        elif tensor.external_data:
            assert external(tensor) == external(linked[name])
    weights = [name for name, t in linked.items() if t.external_data]
    rest = [name for name, t in ours.items() if t.external_data and name not in stacks]
    assert set(rest) == {name for name in weights if ".experts." not in name}
    for file in packed.checkpoint.glob("*.safetensors"):
        first = qwen2_moe.package / "weights" / file.name
        hard = os.path.samefile(first, file)
        assert not hard or os.path.samefile(packed.package / "weights" / file.name, file)


def test_every_packed_and_referenced_tensor_has_the_bytes_the_library_reads(
    packed: Exported,
) -> None:
    expected = {n: to_bytes(t) for n, t in stack_experts(tensors_of(packed.checkpoint)).items()}
    initializers = {
        t.name: external(t) for t in graph_of(packed.package).graph.initializer if t.external_data
    }
    assert initializers.keys() - expected.keys() == {"rope.cos", "rope.sin"}
    for name, content in expected.items():
        offset, length = int(initializers[name]["offset"]), int(initializers[name]["length"])
        data = (packed.package / initializers[name]["location"]).read_bytes()
        assert data[offset : offset + length] == content, name


def test_a_packed_graph_has_no_concat_and_its_manifest_says_pack(packed: Exported) -> None:
    model, package = graph_of(packed.package), load_package(packed.package)
    assert not [node for node in model.graph.node if node.op_type == "Concat"]
    checkpoint = open_checkpoint(packed.checkpoint)
    weights = package.manifest["weights"]
    assert weights["mode"] == "pack"
    assert weights["bytes"] == checkpoint.weight_bytes
    assert weights["tensors"] == len(stack_experts(tensors_of(packed.checkpoint)))
    assert weights["files"].keys() == {
        f"weights/{name}" for name in (PACKED, *(file.name for file in checkpoint.files))
    }


def test_packing_and_converting_change_nothing_about_the_checkpoint(
    qwen2_moe: Exported, tmp_path: Path
) -> None:
    before = state(qwen2_moe.checkpoint)
    export(qwen2_moe.checkpoint, tmp_path / "packed", weights="pack")
    export(qwen2_moe.checkpoint, tmp_path / "converted", weights="pack", dtype="bf16")
    assert state(qwen2_moe.checkpoint) == before


def test_only_layers_of_single_experts_are_packed(tmp_path: Path) -> None:
    raw = mini("qwen3_moe")
    single = random_tensors(tensor_shapes(raw), torch.float32)
    stacked = stack_experts(single)
    first = "model.layers.0."
    tensors = {n: t for n, t in stacked.items() if n.startswith(first)}
    tensors |= {n: t for n, t in single.items() if not n.startswith(first)}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    export(checkpoint, tmp_path / "package", weights="pack")
    found = load_file(tmp_path / "package" / "weights" / PACKED)
    assert found.keys() == {
        f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate_up", "down")
    }
    assert all(torch.equal(tensor, stacked[name]) for name, tensor in found.items())
    export(checkpoint, tmp_path / "linked")
    reference = write_checkpoint(tmp_path / "reference", raw, single)  # transformers reads one form
    for package in ("package", "linked"):
        assert_logits_are_transformers(reference, tmp_path / package)


@pytest.mark.parametrize(
    ("family", "changes", "stacked"),
    [
        ("qwen2", {}, False),
        ("llama", {}, False),
        ("qwen2_moe", {"num_experts": 0}, False),
        ("qwen2_moe", {}, True),
        ("qwen3_moe", {}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_packing_what_has_no_single_experts_is_refused_in_one_line(
    family: str, changes: dict[str, Any], stacked: bool, dtype: str | None, tmp_path: Path
) -> None:
    raw = mini(family, **changes, torch_dtype="float32")
    tensors = random_tensors(tensor_shapes(raw, stacked=stacked), torch.float32)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    with pytest.raises(ExportError, match="--weights pack") as error:
        export(checkpoint, tmp_path / "package", weights="pack", dtype=dtype)
    assert "\n" not in str(error.value) and "--weights link" in str(error.value)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_checkpoint_s_file_of_the_name_of_the_packed_one_is_not_written_to(
    tmp_path: Path,
) -> None:
    raw = mini("qwen3_moe")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, shards=2)
    shard = checkpoint / "model-00001-of-00002.safetensors"
    shard.rename(checkpoint / PACKED)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, PACKED))
    open_checkpoint(checkpoint)
    before = state(checkpoint)
    with pytest.raises(QwenportError, match=PACKED):
        export(checkpoint, tmp_path / "package", weights="pack")
    assert state(checkpoint) == before
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_packing_tells_how_far_it_is_and_an_interruption_leaves_nothing(
    qwen2_moe: Exported, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    export(
        qwen2_moe.checkpoint,
        tmp_path / "whole",
        weights="pack",
        progress=lambda *news: told.append(news),
    )
    stacking = [news[1:] for news in told if news[0] == "stacking experts"]
    size = (tmp_path / "whole" / "weights" / PACKED).stat().st_size
    totals = {total for _, total in stacking}
    assert stacking == sorted(stacking) and totals == {stacking[-1][0]}
    assert 0 < size - totals.pop() < 2000  # the header

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(qwen2_moe.checkpoint, tmp_path / "half", weights="pack", progress=interrupt)
    assert os.listdir(tmp_path) == ["whole"]


def test_a_packed_file_that_was_changed_is_named(packed: Exported) -> None:
    file = packed.package / "weights" / PACKED
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PackageError, match=PACKED):
        load_package(packed.package)


# --- another dtype


@FAMILIES
@pytest.mark.parametrize("stacked", [False, True], ids=["single", "stacked"])
@pytest.mark.parametrize(("source", "target"), [("bf16", "fp32"), ("fp32", "bf16")])
@pytest.mark.parametrize("chunk", [4, 100, 1 << 24])
def test_a_converted_mixture_is_stacked_and_rounded_as_torch_rounds(
    family: str,
    stacked: bool,
    source: str,
    target: str,
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwenport.exporter.safetensors_file.CHUNK_BYTES", chunk)
    raw = mini(family, torch_dtype=STATED[source], hidden_size=8, vocab_size=5)
    single = random_tensors(tensor_shapes(raw), DTYPES[source])
    tensors = stack_experts(single) if stacked else single
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    package = export(checkpoint, tmp_path / "package", dtype=target)
    (file,) = (tmp_path / "package" / "weights").iterdir()
    expected = {n: to_bytes(t.to(DTYPES[target])) for n, t in stack_experts(single).items()}
    assert library_bytes(file) == expected
    shapes = tensor_shapes(raw, stacked=True)
    assert {name: tuple(t.shape) for name, t in load_file(file).items()} == shapes
    assert package.manifest["weights"]["mode"] == "convert"


def test_a_value_beyond_the_dtype_names_the_expert_that_has_it(tmp_path: Path) -> None:
    raw = mini("qwen2_moe")
    tensors = random_tensors(tensor_shapes(raw), torch.float32)
    name = "model.layers.2.mlp.experts.4.up_proj.weight"
    tensors[name][-1, -1] = 1e5
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, tensors)
    with pytest.raises(ExportError, match=name):
        export(checkpoint, tmp_path / "package", dtype="fp16")
    assert os.listdir(tmp_path) == ["checkpoint"]
