"""Which decoder layers are one graph: a change in one of them makes it a kind of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from defects.tools import constant, given, insert, node, replace_uses, seed

from qwenport.exporter import Package, export, load_package
from qwenport.validate.layer_kinds import layer_kinds

EXAMPLES = Path(__file__).parents[2] / "examples"
Change = Callable[[ir.Model], None]


@pytest.fixture(scope="module", params=["bf16", "fp16", "fp32"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("kinds") / "package"
    return export(EXAMPLES / "tiny-qwen2.5", folder, dtype=request.param)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return export(EXAMPLES / "tiny-qwen2.5", tmp_path_factory.mktemp("kinds") / "package")


def test_all_layers_of_a_dense_model_are_one_kind(dense: Package) -> None:
    assert layer_kinds(dense, 5) == {0: (0, 1, 2, 3, 4)}
    assert layer_kinds(dense, 2) == {0: (0, 1)}


def test_a_mixture_has_a_kind_for_sparse_and_one_for_dense_layers(tmp_path: Path) -> None:
    package = export(EXAMPLES / "tiny-qwen2-moe", tmp_path / "package")
    assert layer_kinds(package, 4) == {0: (0, 2, 3), 1: (1,)}


def epsilon(model: ir.Model) -> None:
    norm = node(model, "model.layers.3.post_attention_layernorm.RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def one_more_node(model: ir.Model) -> None:
    norm = node(model, "model.layers.3.input_layernorm.RMSNormalization")
    value = given(norm.inputs[0])
    same = insert(model, norm, "Identity", [value], "same")
    replace_uses(value, same, by=lambda n: n is norm)


def another_operator(model: ir.Model) -> None:
    node(model, "model.layers.3.mlp.gate_proj.MatMul").op_type = "Gemm"


def inputs_in_another_order(model: ir.Model) -> None:
    (total,) = [n for n in model.graph if n.outputs[0].name == "model.layers.3.residual_1"]
    a, b = total.inputs
    total.replace_input_with(0, b)
    total.replace_input_with(1, a)


def a_small_constant(model: ir.Model) -> None:
    for layer in range(5):
        norm = node(model, f"model.layers.{layer}.input_layernorm.RMSNormalization")
        value = given(norm.inputs[0])
        factor = constant(model, f"factor.{layer}", 1.0 if layer != 3 else 1.5, np.float32)
        cast = insert(model, norm, "CastLike", [factor, value], f"like.{layer}")
        scaled = insert(model, norm, "Mul", [value, cast], f"scaled.{layer}")
        replace_uses(value, scaled, by=lambda n, norm=norm: n is norm)


def no_bias(model: ir.Model) -> None:
    add = node(model, "model.layers.3.self_attn.q_proj.Add")
    (product,) = [v for v in add.inputs if "MatMul" in str(given(v).name)]
    replace_uses(add.outputs[0], given(product), by=lambda n: n is not add)


def replace_weight(product: ir.Node, other: ir.Node) -> None:
    """Let a MatMul read the weight of another, whatever lies between it and the initializer."""
    (index,) = [i for i, v in enumerate(product.inputs) if not reads_activations(given(v))]
    product.replace_input_with(index, other.inputs[index])


def reads_activations(value: ir.Value) -> bool:
    pending = [value]
    while pending:
        found = pending.pop()
        if found.is_graph_input() and found.const_value is None:
            return True
        producer = found.producer()
        pending += [] if producer is None else [v for v in producer.inputs if v is not None]
    return False


def a_weight_of_another_layer_s_shape(model: ir.Model) -> None:
    product = node(model, "model.layers.3.self_attn.k_proj.MatMul")
    other = node(model, "model.layers.3.self_attn.o_proj.MatMul")
    replace_weight(product, other)


CHANGES: list[Change] = [
    epsilon, one_more_node, another_operator, inputs_in_another_order, a_small_constant, no_bias,
    a_weight_of_another_layer_s_shape,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_layer_that_is_changed_is_a_kind_of_its_own(
    change: Change, bf16: Package, tmp_path: Path
) -> None:
    faulty = load_package(seed(bf16.path, tmp_path / "faulty", change))
    assert layer_kinds(faulty, 5) == {0: (0, 1, 2, 4), 3: (3,)}


def test_another_layer_s_weights_of_the_same_shape_are_no_other_kind(
    bf16: Package, tmp_path: Path
) -> None:
    """What a weight holds is `identity`'s to compare."""

    def swap(model: ir.Model) -> None:
        one, other = (node(model, f"model.layers.{i}.mlp.up_proj.MatMul") for i in (1, 3))
        replace_weight(one, other)

    faulty = load_package(seed(bf16.path, tmp_path / "faulty", swap))
    assert layer_kinds(faulty, 5) == {0: (0, 1, 2, 3, 4)}


def test_a_layer_without_hidden_states_is_a_kind_of_its_own(bf16: Package, tmp_path: Path) -> None:
    def rename(model: ir.Model) -> None:
        (value,) = [
            v for n in model.graph for v in n.outputs if v.name == "model.layers.3.residual_2"
        ]
        value.name = "elsewhere"

    faulty = load_package(seed(bf16.path, tmp_path / "faulty", rename))
    kinds = layer_kinds(faulty, 5)
    assert kinds[3] == (3,) and kinds[0][:3] == (0, 1, 2)
