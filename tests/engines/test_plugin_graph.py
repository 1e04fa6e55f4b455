"""Operators as plugins: which, with what attributes, and that the graph still computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qwenport import engines, exporter
from qwenport.engines import plugin_library
from qwenport.engines.lowering import UsePlugins, check_graph, for_tensorrt, plugin_layers
from qwenport.engines.targets import FLAVOURS
from qwenport.plugins import moe_experts, moe_router, rotary_embedding
from qwenport.plugins.operator import operators

from . import stand_in_tensorrt

CAPACITY = 64


@pytest.fixture(scope="module", params=["llama", "qwen2_moe", "qwen3_moe"])
def package(request, tmp_path_factory: pytest.TempPathFactory) -> exporter.Package:
    folder = tmp_path_factory.mktemp("plugins")
    checkpoint = checkpoints.write_checkpoint(folder / "c", checkpoints.mini(request.param))
    return exporter.export(checkpoint, folder / "package", dtype="fp32")


def lowered(package: exporter.Package, *, plugins: bool) -> ir.Model:
    model, _ = for_tensorrt(
        ir.load(package.model),
        dtype=package.dtype,
        capacity=CAPACITY,
        rope_rows=CAPACITY,
        kv_heads=package.config.num_key_value_heads,
        plugins=plugins,
    )
    return model


def with_functions(model: ir.Model) -> ir.Model:
    """A lowered model whose plugins are defined: by the operators' own bodies."""
    opset = model.opset_imports[""]
    inputs = [ir.Value(name=n) for n in ("q", "k", "cos", "sin", "positions")]
    nodes = [
        ir.node("RotaryEmbedding", [x, *inputs[2:]], attributes={"interleaved": 0}, name=x.name)
        for x in inputs[:2]
    ]
    outputs = [node.outputs[0] for node in nodes]
    for output, name in zip(outputs, ("q_out", "k_out"), strict=True):
        output.name = name
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset}, name="qk")
    functions = [
        ir.Function("qwenport", "RotaryEmbeddingQK", "", graph=graph, attributes=[]),
        *(operator.function_body(opset) for operator in operators()),
    ]
    used = {node.op_type for node in model.graph}
    for function in functions:
        if function.name in used:
            model.functions[function.identifier()] = function
    for node in model.graph:
        for name in ("plugin_version", "plugin_namespace"):
            node.attributes.pop(name, None)
    return model


def run(model: ir.Model, package: exporter.Package) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(package.path)
    )
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    random = np.random.default_rng(0)
    rows, width = 2, 5
    config = package.config
    feeds: dict[str, np.ndarray] = {
        "input_ids": random.integers(0, config.vocab_size, (rows, width)),
        "position_ids": np.arange(width)[None] + np.array([[0], [7]]),
        "write_indices": np.array([0, 7]),
        "key_positions": np.arange(CAPACITY),
        "logits_indices": np.full((rows, 1), width - 1),
    }
    shape = (rows, config.num_key_value_heads, CAPACITY, config.head_dim)
    for binding in session.get_inputs():
        if binding.name.startswith("past_key_values."):
            feeds[binding.name] = random.standard_normal(shape).astype(np.float32)
    return session.run(None, feeds)


def test_a_graph_with_plugins_computes_what_it_did(package: exporter.Package) -> None:
    plain = run(lowered(package, plugins=False), package)
    fused = run(with_functions(lowered(package, plugins=True)), package)
    for mine, theirs in zip(fused, plain, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_every_operator_becomes_a_plugin_that_the_parser_can_find(
    package: exporter.Package,
) -> None:
    model = lowered(package, plugins=True)
    check_graph(model)
    config = package.config
    sparse = len(config.moe.layers) if config.moe is not None else 0
    expected = {"RotaryEmbeddingQK": config.num_hidden_layers}
    if sparse:
        expected |= {"MoERouter": sparse, "MoEExperts": sparse}
    assert plugin_layers(model) == expected
    served = {operator.name for operator in operators() if operator.plugin}
    kept = {function.name for function in model.functions.values()}
    assert not kept & served  # the parser would take a node for a function of its name
    for node in model.graph:
        if node.domain != "qwenport" or node.op_type in kept:
            continue
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert attributes.pop("plugin_version") == "1"
        assert attributes.pop("plugin_namespace") == "qwenport"
        if node.op_type == "MoERouter":
            assert config.moe is not None
            assert attributes == {
                "k": config.moe.experts_per_token,
                "normalize": int(config.moe.normalize),
            }
        else:
            assert attributes == {}
    assert plugin_layers(lowered(package, plugins=False)) == {}


def value(name: str, *shape: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def model_of(nodes: list[ir.Node], inputs: list[ir.Value], *functions: ir.Function) -> ir.Model:
    outputs = [output for node in nodes for output in node.outputs]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 24, "qwenport": 1}, name="g")
    return ir.Model(graph, ir_version=10, functions=functions)


@pytest.mark.parametrize(
    ("experts", "attributes", "served"),
    [
        (512, {"kind": "top_k", "k": 16}, True),
        (513, {"kind": "top_k", "k": 16}, False),
        (512, {"kind": "top_k", "k": 17}, False),
        ("experts", {"kind": "top_k", "k": 2}, False),
        (8, {"kind": "switch"}, False),
    ],
)
def test_a_router_that_the_kernels_do_not_serve_keeps_its_body(
    experts: int | str, attributes: dict[str, Any], served: bool
) -> None:
    logits = value("logits", "tokens", experts)
    node = ir.node(
        "MoERouter", [logits], attributes=attributes, domain="qwenport", num_outputs=2, name="r"
    )
    model = model_of([node], [logits], moe_router.function_body(24, attributes["kind"]))
    UsePlugins()(model)
    assert plugin_layers(model) == ({"MoERouter": 1} if served else {})
    assert bool(model.functions) != served


@pytest.mark.parametrize(
    ("experts", "k", "by_expert", "served"),
    [(512, 16, 0, True), (513, 2, 0, False), (8, 17, 0, False), (8, 2, 1, False), (8, 2, 0, True)],
)
def test_experts_that_the_kernels_do_not_serve_keep_their_body(
    experts: int, k: int, by_expert: int, served: bool
) -> None:
    inputs = [
        value("x", "tokens", 16),
        value("indices", "tokens", k, dtype=ir.DataType.INT64),
        value("weights", "tokens", k),
        value("gate_up", experts, 12, 16),
        value("down", experts, 16, 6),
    ]
    attributes = {"by_expert": by_expert}
    node = ir.node("MoEExperts", inputs, attributes=attributes, domain="qwenport", name="e")
    model = model_of([node], inputs, moe_experts.function_body(24, by_expert=bool(by_expert)))
    UsePlugins()(model)
    assert plugin_layers(model) == ({"MoEExperts": 1} if served else {})


def rotations(*angles: str, chained: bool = False) -> ir.Model:
    """Rotations one after the other, each by its angles; chained: each of the one before's result."""
    x = value("x", 1, 2, 3, 8)
    tables = {name: value(name, 9, 4) for name in angles}
    positions = value("positions", 1, 3, dtype=ir.DataType.INT64)
    nodes, given = [], x
    for index, name in enumerate(angles):
        inputs = [given, tables[name], tables[name], positions]
        node = ir.node("RotaryEmbedding", inputs, domain="qwenport", name=f"n{index}")
        node.outputs[0].name = f"y{index}"
        nodes.append(node)
        given = node.outputs[0] if chained else x
    body = rotary_embedding.function_body(24)
    return model_of(nodes, [x, *tables.values(), positions], body)


@pytest.mark.parametrize(
    ("angles", "chained", "pairs", "single"),
    [
        ("a", False, 0, 1),
        ("aa", False, 1, 0),
        ("ab", False, 0, 2),
        ("aab", False, 1, 1),
        ("aaaa", False, 2, 0),
        ("aa", True, 0, 2),
        ("aaa", True, 0, 3),
    ],
)
def test_only_independent_rotations_by_the_same_angles_are_fused(
    angles: str, chained: bool, pairs: int, single: int
) -> None:
    model = rotations(*angles, chained=chained)
    UsePlugins()(model)
    assert plugin_layers(model).get("RotaryEmbeddingQK", 0) == pairs
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph) == single
    assert bool(model.functions) == bool(single)
    assert [output.name for output in model.graph.outputs] == [f"y{i}" for i in range(len(angles))]


class Registry:
    """A plugin registry that notes what it is given."""

    def __init__(self, *, loads: bool = True, without: str = "") -> None:
        self.loaded: list[Path] = []
        self._loads, self._without = loads, without

    def load_library(self, path: str) -> object:
        self.loaded.append(Path(path))
        return object() if self._loads else None

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        assert (version, namespace) == ("1", "qwenport")
        return None if name == self._without else object()


def tensorrt_with(registry: Registry) -> Any:
    return SimpleNamespace(get_plugin_registry=lambda: registry, __version__="10.16")


@pytest.fixture
def library(tmp_path: Path) -> Callable[[str], Path]:
    def make(content: str) -> Path:
        path = tmp_path / f"{content}.so"
        path.write_text(content)
        return path

    return make


def test_a_library_is_registered_once_a_process(library) -> None:
    registry = Registry()
    trt = tensorrt_with(registry)
    plugin_library.register_for_build(trt, library("one"))
    plugin_library.register_for_build(trt, library("one"))
    assert registry.loaded == [library("one")]
    with pytest.raises(
        engines.BuildError, match=r"two\.so: this process has built with other plugins"
    ):
        plugin_library.register_for_build(trt, library("two"))


@pytest.mark.parametrize(
    ("registry", "complaint"),
    [
        (Registry(loads=False), r"TensorRT 10\.16 cannot load these plugins"),
        (Registry(without="MoERouter"), "does not find the plugin MoERouter"),
    ],
)
def test_a_library_that_tensorrt_does_not_take_is_an_error(library, registry, complaint) -> None:
    with pytest.raises(engines.BuildError, match=complaint):
        plugin_library.register_for_build(tensorrt_with(registry), library("one"))


def test_tensorrt_rtx_has_no_plugins(library) -> None:
    with pytest.raises(
        engines.BuildError, match="tensorrt-rtx has no plugins: build with --target"
    ):
        plugin_library.check_library(library("one"), FLAVOURS["tensorrt-rtx"], ("sm86",))


@pytest.mark.parametrize("loads", [True, False])
def test_a_session_loads_the_plugins_of_its_engine(
    engine_of, package_of, monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    plain = engine_of("fp32")
    manifest = {**plain.manifest, "plugins": ["libqwenport_plugins.so"]}
    engine = engines.Engine(plain.path, manifest)
    trt = stand_in_tensorrt.stand_in(plain, package_of("fp32"))
    registry = Registry(loads=loads)
    monkeypatch.setattr(trt.Runtime, "get_plugin_registry", lambda self: registry, raising=False)
    if loads:
        engines.TensorRTSession(engine, tensorrt=trt, gpu=trt.gpu)
    else:
        with pytest.raises(engines.EngineError, match="cannot load the engine's plugins"):
            engines.TensorRTSession(engine, tensorrt=trt, gpu=trt.gpu)
    assert registry.loaded == [plain.path / "libqwenport_plugins.so"]
