"""Experts whose columns are sorted by group: both lowerings compute what the operator computes with the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenport.contract import DOMAIN, no_progress
from qwenport.engines import LoweringError
from qwenport.engines.lowering import (
    CODES_FILE,
    MadeFile,
    ReadExpertsOnce,
    SplitExperts,
    UseMatMulNBits,
    UseSignedCodes,
    write_tensors,
)
from qwenport.plugins.moe_experts import function_body, moe_experts

from .quantized_graphs import (
    Quantized,
    count,
    dequantize_linear,
    difference,
    in_file,
    random_weight,
)

FP32_ERROR = 3e-6
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
PARTS = ("gate", "up", "down")
Orders = list[dict[str, Any]]
"""Of each expert and part: the column of the weight that each column of its codes is; None if that is its own."""


@dataclass(frozen=True)
class Mixture:
    """Experts of `inner` rows for inputs of `hidden` values, and the orders of their columns."""

    hidden: int
    inner: int
    block: int
    bits: int
    symmetric: bool
    orders: Orders

    def stored(self, expert: int, part: str) -> Quantized:
        n, k = (self.hidden, self.inner) if part == "down" else (self.inner, self.hidden)
        return random_weight(
            n,
            k // self.block,
            self.block,
            bits=self.bits,
            dtype="fp32",
            symmetric=self.symmetric,
            seed=3 * expert + PARTS.index(part),
        )

    def weight(self, expert: int, part: str) -> torch.Tensor:
        """In its own order of columns."""
        found = torch.from_numpy(self.stored(expert, part).exact)
        order = self.orders[expert][part]
        if order is not None:
            found[:, torch.from_numpy(order)] = found.clone()
        return found.float()

    def stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up and down."""
        experts = range(len(self.orders))
        gate_up = [torch.cat([self.weight(e, part) for part in PARTS[:2]]) for e in experts]
        return torch.stack(gate_up), torch.stack([self.weight(e, "down") for e in experts])


def shuffled(experts: int, hidden: int, inner: int, seed: int = 0) -> Orders:
    """Each expert's own, with one for gate and up."""
    random = np.random.default_rng(seed)
    made: Orders = []
    for _ in range(experts):
        first, second = random.permutation(hidden), random.permutation(inner)
        made.append({"gate": first, "up": first, "down": second})
    return made


def small(**changes: Any) -> Mixture:
    shape: dict[str, Any] = {"hidden": 32, "inner": 48, "block": 16, "bits": 4, "symmetric": True}
    return Mixture(**shape | {"orders": shuffled(3, 32, 48)} | changes)


def model_of(folder: Path, mixture: Mixture, k: int) -> ir.Model:
    """The operator as an exporter writes it: x, indices, weights -> y."""
    nodes: list[ir.Node] = []
    values: dict[str, ir.Value] = {}
    inverses: dict[int, ir.Value] = {}

    def add(op: str, inputs: list[ir.Value], name: str, shape: Any, **given: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes=given, name=name)
        (made,) = node.outputs
        made.name, made.type, made.shape = name, ir.TensorType(FLOAT), ir.Shape(shape)
        nodes.append(node)
        return made

    def constant(name: str, *numbers: int) -> ir.Value:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        kind = ir.TensorType(INT64)
        made = ir.Value(name=name, type=kind, shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
        return values.setdefault(name, made)

    def inverse(name: str, order: Any) -> ir.Value:
        if id(order) not in inverses:
            size, data = len(order), order.astype(np.int64).tobytes()
            stored = in_file(folder, "weights.bin", f"{name}.permutation", data, INT64, (size,))
            values[str(stored.name)] = stored
            inputs = [stored, constant(f"size{size}", size)]
            sort = ir.node("TopK", inputs, {"largest": 0}, num_outputs=2, name=f"{name}.TopK")
            for index, output in enumerate(sort.outputs):
                output.name, output.type = f"{name}.TopK.{index}", ir.TensorType(INT64)
                output.shape = ir.Shape((size,))
            nodes.append(sort)
            inverses[id(order)] = sort.outputs[1]
        return inverses[id(order)]

    def part(expert: int, kind: str) -> ir.Value:
        name = f"{expert}.{kind}"
        parts, node = dequantize_linear(folder, name, mixture.stored(expert, kind))
        values.update({str(value.name): value for value in parts})
        nodes.append(node)
        order = mixture.orders[expert][kind]
        if order is None:
            return node.outputs[0]
        inputs = [node.outputs[0], inverse(name, order)]
        return add("Gather", inputs, f"{name}.Gather", node.outputs[0].shape, axis=1)

    def stack(name: str, kinds: tuple[str, ...], rows: int, columns: int) -> ir.Value:
        parts = [part(expert, kind) for expert in range(experts) for kind in kinds]
        flat = add("Concat", parts, f"{name}.Concat", (experts * rows, columns), axis=0)
        sizes = (experts, rows, columns)
        return add("Reshape", [flat, constant(f"{name}.sizes", *sizes)], name, sizes)

    experts, hidden, inner = len(mixture.orders), mixture.hidden, mixture.inner
    kinds = {"x": (FLOAT, hidden), "indices": (INT64, k), "weights": (FLOAT, k)}
    inputs = [
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(("t", size)))
        for name, (kind, size) in kinds.items()
    ]
    stacks = [
        stack("gate_up", PARTS[:2], 2 * inner, hidden),
        stack("down", PARTS[2:], hidden, inner),
    ]
    call = ir.node("MoEExperts", [*inputs, *stacks], domain=DOMAIN, name="experts")
    (y,) = call.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(FLOAT), ir.Shape(("t", hidden))
    graph = ir.Graph(
        inputs,
        [y],
        nodes=[*nodes, call],
        initializers=list(values.values()),
        opset_imports={"": 24, DOMAIN: 1},
        name="g",
    )
    return ir.Model(graph, ir_version=11, functions=[function_body(24)])


def for_onnxruntime(model: ir.Model, folder: Path) -> ir.Model:
    SplitExperts()(model)
    UseMatMulNBits(exact=False)(model)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return model


def for_tensorrt(model: ir.Model, folder: Path) -> ir.Model:
    made = MadeFile()
    UseSignedCodes(made)(model)
    write_tensors(folder / CODES_FILE, made.tensors, no_progress)
    ReadExpertsOnce()(model)
    return model


LOWERINGS: dict[str, Callable[[ir.Model, Path], ir.Model]] = {
    "onnxruntime": for_onnxruntime,
    "tensorrt": for_tensorrt,
}


def tokens_for(mixture: Mixture, count: int, k: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    weights, indices = torch.rand(count, len(mixture.orders), generator=generator).topk(k)
    return torch.randn(count, mixture.hidden, generator=generator), indices, weights


def run(model: ir.Model, folder: Path, given_tokens: tuple[torch.Tensor, ...]) -> Any:
    ir.save(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # no activations in int8
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    names = ("x", "indices", "weights")
    feeds = {name: t.numpy() for name, t in zip(names, given_tokens, strict=True)}
    return session.run(None, feeds)[0]


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    hidden, inner = (draw(st.sampled_from([32, 48, 64])) for _ in range(2))
    orders: Orders = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.none() | st.permutations(range(hidden)).map(np.array))
        second = draw(st.none() | st.permutations(range(inner)).map(np.array))
        orders.append({"gate": first, "up": first, "down": second})
    bits, symmetric = draw(st.sampled_from([4, 8])), draw(st.booleans())
    return Mixture(hidden, inner, 16, bits, symmetric, orders)


@pytest.mark.parametrize("target", LOWERINGS)
@settings(max_examples=25, deadline=None)
@given(mixture=mixtures(), tokens=st.integers(0, 9), data=st.data())
def test_a_lowered_mixture_computes_what_the_operator_computes(
    target: str,
    mixture: Mixture,
    tokens: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("g")
    k = data.draw(st.integers(1, len(mixture.orders)))
    drawn = tokens_for(mixture, tokens, k)
    found = run(LOWERINGS[target](model_of(folder, mixture, k), folder), folder, drawn)
    wanted = moe_experts(*drawn, *mixture.stacks())
    assert found.shape == wanted.shape
    assert not tokens or difference(found, wanted) < FP32_ERROR


@pytest.mark.parametrize("shared", [True, False])
def test_an_expert_s_rows_are_gathered_once_for_weights_that_share_an_order(
    tmp_path: Path, shared: bool
) -> None:
    mixture = small()
    if not shared:
        for expert, order in enumerate(mixture.orders):
            order["up"] = np.random.default_rng(expert).permutation(mixture.hidden)
    model = model_of(tmp_path, mixture, 2)
    drawn = tokens_for(mixture, 5, 2)
    wanted = moe_experts(*drawn, *mixture.stacks())
    plain = small(orders=[dict.fromkeys(PARTS) for _ in mixture.orders])
    (tmp_path / "plain").mkdir()
    without = for_onnxruntime(model_of(tmp_path / "plain", plain, 2), tmp_path / "plain")
    assert difference(run(for_onnxruntime(model, tmp_path), tmp_path, drawn), wanted) < FP32_ERROR
    assert count(model, "MatMulNBits") == 3 * 3
    assert count(model, "Gather") == count(without, "Gather") + 3 * (2 if shared else 3)
    assert count(model, "TopK") == count(without, "TopK")
    assert not count(model, "DequantizeLinear")


def test_for_tensorrt_an_expert_s_columns_are_a_tensor_beside_its_codes(tmp_path: Path) -> None:
    mixture = small(bits=8, symmetric=False)
    mixture.orders[1]["down"] = None
    model = model_of(tmp_path, mixture, 2)
    made = MadeFile()
    UseSignedCodes(made)(model)
    assert [weight.columns for weight in made.weights] == ["gate_up.columns", "down.columns"]
    assert not {"Gather", "TopK", "Concat"} & {node.op_type for node in model.graph}
    assert not any("permutation" in name for name in model.graph.initializers)
    write_tensors(tmp_path / CODES_FILE, made.tensors, no_progress)
    tensor = model.graph.initializers["down.columns"].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
    data = np.fromfile(tmp_path / CODES_FILE, np.int32, 3 * 48, offset=tensor.offset)
    first, _, last = (order["down"] for order in mixture.orders)
    assert np.array_equal(data.reshape(3, 48), np.stack([first, np.arange(48), last]))


def test_in_their_own_order_experts_have_no_columns(tmp_path: Path) -> None:
    mixture = small(orders=[dict.fromkeys(PARTS)] * 3)
    model = for_tensorrt(model_of(tmp_path, mixture, 2), tmp_path)
    assert [name for _, name, _ in model.functions] == ["MoEExperts"]
    assert not any("columns" in name for name in model.graph.initializers)


def test_tensorrt_refuses_gate_and_up_in_two_orders(tmp_path: Path) -> None:
    mixture = small()
    mixture.orders[2]["up"] = mixture.orders[2]["gate"][::-1].copy()
    with pytest.raises(LoweringError, match=r"^gate_up: .*different orders; --target onnxruntime"):
        UseSignedCodes(MadeFile())(model_of(tmp_path, mixture, 2))


def _largest(model: ir.Model) -> None:
    sort = next(node for node in model.graph if node.op_type == "TopK")
    sort.attributes["largest"] = ir.AttrInt64("largest", 1)


def _forward(model: ir.Model) -> None:
    gather = next(node for node in model.graph if node.op_type == "Gather")
    assert gather.inputs[1] is not None
    sort = gather.inputs[1].producer()
    assert sort is not None
    gather.replace_input_with(1, sort.inputs[0])


def _of_rows(model: ir.Model) -> None:
    gather = next(node for node in model.graph if node.op_type == "Gather")
    gather.attributes["axis"] = ir.AttrInt64("axis", 0)


@pytest.mark.parametrize("change", [_largest, _forward, _of_rows])
@pytest.mark.parametrize(
    "lower", [SplitExperts, partial(UseSignedCodes, MadeFile())], ids=["split", "signed"]
)
def test_columns_that_are_gathered_in_another_way_are_refused(
    tmp_path: Path, lower: Callable[[], Any], change: Callable[[ir.Model], None]
) -> None:
    model = model_of(tmp_path, small(), 2)
    change(model)
    with pytest.raises(LoweringError, match=r"^0\.gate\.Gather: .*inverse of a stored permutation"):
        lower().call(model)
