"""The graph of a package, and the logits that it computes."""

from __future__ import annotations

import collections
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from checkpoints import (
    mini,
    tensor_shapes,
    write_checkpoint,
)
from packaged import (
    Exported,
    assert_logits_are_transformers,
    graph_of,
    layer_nodes,
)

from qwenport.exporter import (
    TracingError,
    export,
    load_package,
    parse_config,
)
from qwenport.exporter.graph import build_graph
from qwenport.plugins.operator import operators

MAX_NODES_A_LAYER, MAX_NODES_A_SPARSE_LAYER = 45, 60


# --- the graph


def test_a_decoder_layer_is_few_nodes(exported: Exported) -> None:
    model, config = graph_of(exported.package), load_package(exported.package).config
    layers = layer_nodes(model)
    assert len(layers.pop("")) <= MAX_NODES_A_LAYER
    assert len(layers) == config.num_hidden_layers
    counts = collections.defaultdict(set)
    for layer, nodes in layers.items():
        counts[config.moe_of(int(layer))].add(len(nodes))
    for moe, (count,) in counts.items():
        assert count <= (MAX_NODES_A_SPARSE_LAYER if moe else MAX_NODES_A_LAYER)


def test_each_operator_has_one_body_and_is_called_where_a_layer_needs_it(
    exported: Exported,
) -> None:
    model, config = graph_of(exported.package), load_package(exported.package).config
    sparse = len(config.moe.layers) if config.moe else 0
    expected = {"RotaryEmbedding": 2 * config.num_hidden_layers}
    if sparse:
        expected |= {"MoERouter": sparse, "MoEExperts": sparse}
    assert [(f.domain, f.name) for f in model.functions] == [("qwenport", n) for n in expected]
    calls = [n.op_type for n in model.graph.node if n.domain == "qwenport"]
    assert collections.Counter(calls) == expected
    assert {o.domain: o.version for o in model.opset_import} == {"": 24, "qwenport": 1}


@pytest.fixture
def registered_schema() -> Iterator[None]:
    schemas = [operator.schema() for operator in operators()]
    for schema in schemas:
        onnx.defs.register_schema(schema)
    yield
    for schema in schemas:
        onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


@pytest.mark.usefixtures("registered_schema")
def test_onnx_s_checker_accepts_the_model(exported: Exported, tmp_path: Path) -> None:
    # a copy, because the checker takes a hard link for an attack
    shutil.copytree(exported.package, tmp_path / "package")
    onnx.checker.check_model(str(tmp_path / "package" / "model.onnx"), full_check=True)


@pytest.mark.usefixtures("registered_schema")
def test_strict_shape_inference_agrees_with_the_declared_outputs(exported: Exported) -> None:
    model = graph_of(exported.package)
    declared = {o.name: o.type.SerializeToString() for o in model.graph.output}
    known = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    bare = onnx.ModelProto.FromString(model.SerializeToString())
    del bare.graph.value_info[:]
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    options = {"strict_mode": True, "check_type": True, "data_prop": True}
    inferred = onnx.shape_inference.infer_shapes(bare, **options)
    onnx.shape_inference.infer_shapes(model, **options)  # must not contradict what is declared
    for output in inferred.graph.output:
        expected = onnx.TypeProto.FromString(declared[output.name]).tensor_type
        assert output.type.tensor_type.elem_type == expected.elem_type
        ranks = len(output.type.tensor_type.shape.dim), len(expected.shape.dim)
        assert ranks[0] == ranks[1]
        for ours, theirs in zip(expected.shape.dim, output.type.tensor_type.shape.dim, strict=True):
            if theirs.HasField("dim_value"):
                assert ours.dim_value == theirs.dim_value
    for value in inferred.graph.value_info:
        if value.name in known:
            assert value.type.tensor_type.elem_type == known[value.name], value.name


def test_bindings_are_those_of_the_design_and_of_the_manifest(exported: Exported) -> None:
    model, package = graph_of(exported.package), load_package(exported.package)
    config, dtype = package.config, package.dtype

    def described(values: Any) -> list[tuple[str, str, list[Any]]]:
        return [
            (
                value.name,
                onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
                [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            )
            for value in values
        ]

    element = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float"}[dtype]
    cache = (element, ["batch", config.num_key_value_heads, "capacity", config.head_dim])
    layers = range(config.num_hidden_layers)
    inputs = [
        ("input_ids", "int64", ["batch", "seq"]),
        ("position_ids", "int64", ["batch", "seq"]),
        ("write_indices", "int64", ["batch"]),
        ("key_positions", "int64", ["span"]),
        ("logits_indices", "int64", ["batch", "n"]),
        *((f"past_key_values.{i}.{p}", *cache) for i in layers for p in ("key", "value")),
    ]
    outputs = [
        ("logits", "float", ["batch", "n", config.vocab_size]),
        *((f"present.{i}.{p}", *cache) for i in layers for p in ("key", "value")),
    ]
    assert described(model.graph.input) == inputs
    assert described(model.graph.output) == outputs
    for direction, expected in (("inputs", inputs), ("outputs", outputs)):
        bindings = package.manifest["bindings"][direction]
        assert [(b["name"], b["dtype"], b["shape"]) for b in bindings] == expected


def test_every_input_is_used_and_every_name_is_given_once(exported: Exported) -> None:
    graph = graph_of(exported.package).graph
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    given = [i.name for i in graph.input] + [i.name for i in graph.initializer]
    given += [name for node in graph.node for name in node.output]
    assert set(given) <= used
    assert len(given) == len(set(given))
    assert len({node.name for node in graph.node}) == len(graph.node)


def stand_in(raw: dict[str, Any]) -> Callable[[str], ir.TensorProtocol]:
    """Tensors of the right shapes that are nowhere."""
    shapes = tensor_shapes({**raw, "num_hidden_layers": 1})
    table = (raw["max_position_embeddings"], raw["head_dim"] // 2)

    def tensor(name: str) -> ir.TensorProtocol:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = "0"
        shape = shapes.get(".".join(parts), table)
        return ir.ExternalTensor(
            "nowhere", 0, 1, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
        )

    return tensor


def test_tracing_costs_the_same_at_any_depth_and_nodes_grow_by_the_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwenport.exporter import tracing

    calls, real = [], tracing.trace

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(tracing, "trace", counted)
    nodes, traced = {}, {}
    for depth in (1, 2, 40):
        calls.clear()
        raw = mini("llama", num_hidden_layers=depth)
        nodes[depth] = len(list(build_graph(parse_config(raw), "fp32", stand_in(raw)).graph))
        traced[depth] = len(calls)
    assert traced == {1: 3, 2: 3, 40: 3}
    a_layer = nodes[2] - nodes[1]
    assert nodes[40] - nodes[2] == 38 * a_layer
    assert a_layer <= MAX_NODES_A_LAYER


def test_an_operator_without_translation_leaves_no_package(
    small: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenport.exporter import emission

    monkeypatch.delitem(emission.HANDLERS, torch.nn.functional.silu)
    with pytest.raises(TracingError, match="silu"):
        export(small, out)
    assert not os.listdir(out.parent)


# --- the numbers


def test_a_llama_with_every_bias_and_its_own_head_dim_computes_transformers_logits(
    llama: Exported,
) -> None:
    config = load_package(llama.package).config
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert_logits_are_transformers(llama.checkpoint, llama.package)


def test_a_yarn_qwen2_converted_to_fp32_computes_transformers_logits(
    qwen2: Exported, out: Path
) -> None:
    export(qwen2.checkpoint, out, dtype="fp32")
    assert_logits_are_transformers(qwen2.checkpoint, out)


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 16),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            16,
        ),
    ],
)
def test_a_scaled_llama_computes_transformers_logits(
    tmp_path: Path, out: Path, scaling: dict[str, Any], length: int
) -> None:
    raw = mini("llama", rope_scaling=scaling, num_hidden_layers=1, num_key_value_heads=4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw)
    export(checkpoint, out, max_seq_len=length)
    assert_logits_are_transformers(checkpoint, out)
