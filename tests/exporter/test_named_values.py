"""Names that a module gives to its values: in the graph as given, without a node of their own, none of them twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from packaged import Exported, graph_of, layer_nodes
from torch import nn

from qwenport.exporter import TracingError, emission, load_package, tracing
from qwenport.exporter.tracing import Ref, named
from qwenport.plugins import moe_router


class Part(nn.Module):
    """a @ weight.T, and that squared, named "square"; its parameter is called "weight"."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(a, self.weight)
        return named(product * product, "square")


class Module(nn.Module):
    """A function of itself and a tensor [b, s, 6]."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.part, self.other = Part(), Part()

    def forward(self, a: torch.Tensor) -> Any:
        return self.function(self, a)


def traced(function: Callable[[Any, torch.Tensor], Any]) -> tracing.Trace:
    example = torch.empty(2, 3, 6, device="meta")
    return tracing.trace(Module(function).to("meta"), [example], [{0: "b", 1: "s"}])


def emitted(trace: tracing.Trace, *scopes: str) -> list[ir.Node]:
    """The nodes of a module that is stamped once in each scope."""
    builder, kind = emission.GraphBuilder(), ir.TensorType(ir.DataType.FLOAT)
    value = ir.Value(name="a", type=kind, shape=ir.Shape(["b", "s", 6]))
    weights = {n: ir.Value(name=n, type=kind, shape=ir.Shape([6, 6])) for n in trace.parameters}
    for scope in scopes:
        emission.emit(trace, builder, [value], weights, scope)
    return builder.nodes


def names(nodes: list[ir.Node]) -> list[str | None]:
    """Of the nodes' results."""
    return [value.name for node in nodes for value in node.outputs]


# --- in the graph


def test_a_value_and_its_node_have_the_name_behind_the_scope() -> None:
    nodes = emitted(traced(lambda m, a: named(a + a, "twice") * a), "model.layers.3")
    assert names(nodes) == ["model.layers.3.twice", "model.layers.3.Mul"]
    assert [node.name for node in nodes] == names(nodes)


def test_a_name_is_of_the_submodule_that_gives_it() -> None:
    nodes = emitted(traced(lambda m, a: (m.part(a), named(m.other(a) + a, "square"))), "model")
    found = [name for name in names(nodes) if name and name.endswith("square")]
    assert found == ["model.part.square", "model.other.square", "model.square"]


def test_the_result_of_a_submodule_can_be_named_outside_of_it() -> None:
    class Sum(nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return a + a

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = Sum()

        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return named(self.sum(a), "twice")

    trace = tracing.trace(Outer(), [torch.empty(2, 6, device="meta")], [{0: "b"}])
    assert names(emitted(trace, "model")) == ["model.twice"]


def test_no_node_is_added_and_the_other_names_stay() -> None:
    def function(m: Any, a: torch.Tensor, name: Callable[..., torch.Tensor]) -> torch.Tensor:
        first = name(a + a, "first")
        second = name(torch.sigmoid(first) * first, "second")
        return (first + second) * second

    plain = emitted(traced(lambda m, a: function(m, a, lambda tensor, name: tensor)), "model")
    nodes = emitted(traced(lambda m, a: function(m, a, named)), "model")
    assert [node.op_type for node in nodes] == [node.op_type for node in plain]
    new = {"model.Add": "model.first", "model.Mul": "model.second"}
    for ours, theirs in zip(nodes, plain, strict=True):
        assert names([ours]) == [new.get(str(name), name) for name in names([theirs])]
        inputs = [value.name for value in theirs.inputs if value]
        assert [v.name for v in ours.inputs if v] == [new.get(str(n), n) for n in inputs]
        assert dict(ours.attributes) == dict(theirs.attributes)


def test_one_of_several_results_has_its_name_alone() -> None:
    def function(m: Any, a: torch.Tensor) -> Any:
        weights, indices = moe_router.moe_router(a, k=2)
        return weights, named(indices, "chosen")

    (node,) = emitted(traced(function), "model")
    assert node.name == "model.MoERouter"
    assert names([node]) == ["model.MoERouter.0", "model.chosen"]


def test_a_module_with_names_is_stamped_in_every_scope_once() -> None:
    trace = traced(lambda m, a: m.part(a))
    found = names(emitted(trace, "model.layers.0", "model.layers.1"))
    assert [n for n in found if n and "square" in n] == [
        "model.layers.0.part.square",
        "model.layers.1.part.square",
    ]
    with pytest.raises(TracingError, match=r"two values are named model\.layers\.0\.part\.square"):
        emitted(trace, "model.layers.0", "model.layers.0")


def test_what_is_named_is_recorded_and_is_the_tensor_itself() -> None:
    same = []

    def function(m: Any, a: torch.Tensor) -> torch.Tensor:
        total = a + a
        same.append(named(total, "twice") is total)
        return total

    trace = traced(function)
    assert trace.names == {Ref(trace.num_inputs + len(trace.parameters)): "twice"}
    assert len(trace.calls) == 1 and all(same)


def test_outside_of_tracing_a_name_does_nothing() -> None:
    a = torch.ones(2)
    for _ in range(2):
        assert named(a, "Any name") is a
    with torch.device("meta"):
        assert named(a, "x") is a


# --- refused

REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "a name twice": (
        lambda m, a: named(a + a, "x") * named(a * a, "x"),
        "x: the name is taken",
    ),
    "a name twice in a submodule": (
        lambda m, a: m.part(a) + m.part(a),
        r"part\.square: the name is taken",
    ),
    "a tensor twice": (
        lambda m, a: named(named(a + a, "x"), "y"),
        "y: the tensor is already named x",
    ),
    "a tensor that is another's cast to its own dtype": (
        lambda m, a: named(named(a + a, "x").to(a.dtype), "y"),
        "y: the tensor is already named x",
    ),
    "an input": (lambda m, a: named(a, "x") + a, "x: only a result can be named"),
    "a parameter": (
        lambda m, a: nn.functional.linear(a, named(m.part.weight, "x")),
        "x: only a result can be named",
    ),
    "a tensor from elsewhere": (
        lambda m, a: a + named(torch.Tensor(6), "x"),
        "neither input, parameter nor result",
    ),
    "an operator's name": (lambda m, a: named(a + a, "Mul"), "'Mul': a name has lower-case"),
    "a name with a dot": (lambda m, a: named(a + a, "x.y"), "lower-case"),
    "no name": (lambda m, a: named(a + a, ""), "lower-case"),
    "a name that depends on a size": (
        lambda m, a: named(a + a, f"x{a.shape[1]}"),
        "what `named` is given depends on a dynamic size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_name_that_is_not_one_values_own_is_refused(case: str) -> None:
    function, message = REFUSED[case]
    with pytest.raises(TracingError, match=message):
        traced(function)


def test_a_parameters_name_is_taken() -> None:
    class Naming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return named(a * self.weight, "weight")

    with pytest.raises(TracingError, match="weight: the name is taken"):
        tracing.trace(Naming().to("meta"), [torch.empty(2, 6, device="meta")], [{0: "b"}])


# --- in a package

ALWAYS = {
    "self_attn.rope_q": "RotaryEmbedding",
    "self_attn.rope_k": "RotaryEmbedding",
    "self_attn.attention": "Attention",
    "residual_1": "Add",
    "residual_2": "Add",
}
DENSE = {"mlp.gated": "Mul"}
SPARSE = {
    "mlp.router_weights": "MoERouter",
    "mlp.router_indices": "MoERouter",
    "mlp.experts_sum": "MoEExperts",
}
SHARED = {"mlp.shared_expert.gated": "Mul", "mlp.mixed": "Add"}
STACKING = {"Concat", "Reshape"}  # called after the parameter that they make
ENDS = {"TensorScatter", "MatMul", "Cast"}  # called after the graph's output that they make


def test_the_named_values_of_a_package_are_these(exported: Exported) -> None:
    config, nodes = load_package(exported.package).config, layer_nodes(graph_of(exported.package))

    def given(prefix: str, layer: str) -> dict[str, str]:
        """Name -> operator of the values that are not called after an operator."""
        found = {
            name.removeprefix(prefix): node.op_type for node in nodes[layer] for name in node.output
        }
        return {n: op for n, op in found.items() if n == n.lower() and op not in STACKING | ENDS}

    assert given("model.", "") == {"embedding": "Gather"}
    for layer in range(config.num_hidden_layers):
        moe = config.moe_of(layer)
        expected = ALWAYS | (DENSE if moe is None else SPARSE)
        if moe is not None and moe.shared_expert_size is not None:
            expected |= SHARED
        assert given(f"model.layers.{layer}.", str(layer)) == expected
