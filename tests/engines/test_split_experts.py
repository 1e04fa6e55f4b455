"""Experts one by one on onnxruntime: the operator's own values, and nothing done for experts nobody chose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwenport.engines.errors import LoweringError
from qwenport.engines.lowering import SplitExperts, for_onnxruntime
from qwenport.plugins import moe_experts, moe_router

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
FILE = "experts.safetensors"


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Name -> (offset, length) of each tensor's bytes."""
    import json
    import struct

    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (8 + length + entry["data_offsets"][0], np.diff(entry["data_offsets"]).item())
        for name, entry in header.items()
    }


def experts_model(
    folder: Path,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    k: int,
    *,
    single: bool,
    round_inner: bool = False,
    scales: torch.Tensor | None = None,
) -> ir.Model:
    """x, indices, weights -> one MoEExperts; weights in a file, stacked or one by one under a Concat."""
    experts, inner, hidden = gate_up.shape[0], gate_up.shape[1] // 2, gate_up.shape[2]
    stored = {"gate_up": gate_up, "down": down}
    if single:
        stored = {
            **{
                f"{e}.{p}": gate_up[e, p * inner : (p + 1) * inner]
                for e in range(experts)
                for p in (0, 1)
            },
            **{f"{e}.2": down[e] for e in range(experts)},
        }
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / FILE)
    element = {torch.float32: FLOAT, torch.bfloat16: ir.DataType.BFLOAT16}[gate_up.dtype]
    initializers = {}
    for name, (offset, length) in offsets(folder / FILE).items():
        tensor = ir.ExternalTensor(
            FILE, offset, length, element, shape=ir.Shape(stored[name].shape), name=name
        )
        made = value(name, element, *stored[name].shape)
        made.const_value = tensor
        initializers[name] = made
    nodes: list[ir.Node] = []
    if single:
        stacks = []
        for name, parts, shape in (
            ("gate_up", [f"{e}.{p}" for e in range(experts) for p in (0, 1)], gate_up.shape),
            ("down", [f"{e}.2" for e in range(experts)], down.shape),
        ):
            concat = ir.node(
                "Concat", [initializers[p] for p in parts], attributes={"axis": 0}, name=f"c.{name}"
            )
            target = value(f"shape.{name}", INT64, 3)
            target.const_value = ir.tensor(np.array(shape, dtype=np.int64), name=target.name)
            initializers[target.name] = target
            reshape = ir.node("Reshape", [concat.outputs[0], target], name=f"r.{name}")
            concat.outputs[0].name, reshape.outputs[0].name = f"flat.{name}", f"stack.{name}"
            for made, size in (
                (concat.outputs[0], (shape[0] * shape[1], shape[2])),
                (reshape.outputs[0], shape),
            ):
                made.type, made.shape = ir.TensorType(element), ir.Shape(size)
            nodes += [concat, reshape]
            stacks.append(reshape.outputs[0])
    else:
        stacks = [initializers["gate_up"], initializers["down"]]
    inputs = [
        value("x", element, "batch", "seq", hidden),
        value("indices", INT64, "batch", "seq", k),
        value("weights", FLOAT, "batch", "seq", k),
    ]
    if scales is not None:
        made = value("input_scales", element, *scales.shape)
        made.const_value = ir.tensor(scales, name=made.name)
        initializers[made.name] = made
        stacks.append(made)
    call = ir.node(moe_experts.NAME, [*inputs, *stacks], domain="qwenport", name="layer")
    if round_inner:
        call.attributes["round_inner"] = ir.AttrInt64("round_inner", 1)
    (y,) = call.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(element), inputs[0].shape
    graph = ir.Graph(
        inputs,
        [y],
        nodes=[*nodes, call],
        initializers=list(initializers.values()),
        opset_imports={"": 24, "qwenport": 1},
        name="g",
    )
    body = moe_experts.function_body(24, round_inner=round_inner, input_scales=scales is not None)
    return ir.Model(graph, ir_version=11, functions=[body])


def run(
    folder: Path, model: ir.Model, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    feeds = {"x": x.numpy(), "indices": indices.numpy(), "weights": weights.numpy()}
    return torch.from_numpy(session.run(None, feeds)[0])


@st.composite
def layers(draw: st.DrawFn):
    """gate_up, down, x [batch, seq, H], indices, weights."""
    experts = draw(st.integers(2, 40))
    k = draw(st.integers(1, min(8, experts)))
    hidden, inner = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator)
    down = torch.randn(experts, hidden, inner, generator=generator)
    x = torch.randn(batch, seq, hidden, generator=generator)
    # few experts in use, many empty groups
    logits = torch.randn(batch, seq, experts, generator=generator)
    logits[..., : experts // 2] += draw(st.sampled_from([0.0, 9.0]))
    weights, indices = moe_router.moe_router(logits, k=k)
    return gate_up, down, x, indices, weights


@settings(max_examples=40, deadline=None)
@given(drawn=layers(), single=st.booleans())
def test_split_experts_compute_what_the_operator_computes(drawn, single, tmp_path_factory):
    gate_up, down, x, indices, weights = drawn
    folder = tmp_path_factory.mktemp("split")
    model = for_onnxruntime(
        experts_model(folder, gate_up, down, indices.shape[-1], single=single), on_cpu=True
    )
    expected = moe_experts.moe_experts(x, indices, weights, gate_up, down)
    got = run(folder, model, x, indices, weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(drawn=layers(), single=st.booleans())
def test_split_experts_round_what_the_operator_rounds(drawn, single, tmp_path_factory):
    """Integers of few bits: no sum is rounded, so that both round the same values."""
    gate_up, down, x, indices, weights = drawn
    x, down = x.round(), down.round()
    x[0, 0] = 0
    gate, up = gate_up.round().chunk(2, dim=1)
    gate_up = torch.cat([64 * gate.abs(), up], dim=1)  # silu(gate) is gate or, nearly, 0
    x = x.abs()
    folder = tmp_path_factory.mktemp("split")
    k = indices.shape[-1]
    model = for_onnxruntime(
        experts_model(folder, gate_up, down, k, single=single, round_inner=True), on_cpu=True
    )
    expected = moe_experts.moe_experts(x, indices, weights, gate_up, down, round_inner=True)
    got = run(folder, model, x, indices, weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(drawn=layers(), single=st.booleans(), exponents=st.randoms(use_true_random=False))
def test_split_experts_round_with_the_scales_of_their_linears(
    drawn, single, exponents, tmp_path_factory
):
    """Integers of few bits, and scales that are powers of two: no sum is rounded."""
    gate_up, down, x, indices, weights = drawn
    x, down = x.round().abs(), down.round()
    gate, up = gate_up.round().chunk(2, dim=1)
    gate_up = torch.cat([64 * gate.abs(), up], dim=1)  # silu(gate) is gate or, nearly, 0
    scales = torch.tensor([[2.0 ** exponents.randint(-6, 0) for _ in range(3)] for _ in gate_up])
    folder = tmp_path_factory.mktemp("split")
    model = experts_model(folder, gate_up, down, indices.shape[-1], single=single, scales=scales)
    expected = moe_experts.moe_experts(x, indices, weights, gate_up, down, scales)
    got = run(folder, for_onnxruntime(model, on_cpu=True), x, indices, weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_that_split_experts_round_shows(tmp_path):
    torch.manual_seed(0)
    gate_up, down, x = torch.randn(6, 32, 24), torch.randn(6, 24, 16), torch.randn(1, 9, 24)
    weights, indices = moe_router.moe_router(torch.randn(1, 9, 6), k=2)
    model = experts_model(tmp_path, gate_up, down, 2, single=True, round_inner=True)
    got = run(tmp_path, for_onnxruntime(model, on_cpu=True), x, indices, weights)
    rounded, exact = (
        moe_experts.moe_experts(x, indices, weights, gate_up, down, round_inner=wanted)
        for wanted in (True, False)
    )
    torch.testing.assert_close(got, rounded, rtol=1e-4, atol=1e-4)
    assert torch.linalg.norm(exact - rounded) > 1e-2 * torch.linalg.norm(rounded)


@pytest.mark.parametrize("single", [False, True])
def test_bf16_weights_are_computed_with_in_float32(single, tmp_path):
    gate_up, down = torch.randn(5, 8, 6).bfloat16(), torch.randn(5, 6, 4).bfloat16()
    x, weights = torch.randn(1, 7, 6), torch.rand(1, 7, 2)
    indices = torch.tensor([[[0, 3]] * 7])
    model = for_onnxruntime(experts_model(tmp_path, gate_up, down, 2, single=single), on_cpu=True)
    expected = moe_experts.moe_experts(x, indices, weights, gate_up.float(), down.float())
    torch.testing.assert_close(run(tmp_path, model, x, indices, weights), expected)


@pytest.mark.parametrize("single", [False, True])
def test_no_weight_of_an_expert_without_tokens_is_read(single, tmp_path):
    gate_up, down = torch.full((9, 8, 6), torch.nan), torch.full((9, 6, 4), torch.nan)
    used = [2, 7]
    gate_up[used], down[used] = torch.randn(2, 8, 6), torch.randn(2, 6, 4)
    x, weights = torch.randn(1, 5, 6), torch.rand(1, 5, 2)
    indices = torch.tensor([[[2, 7]] * 5])
    model = for_onnxruntime(experts_model(tmp_path, gate_up, down, 2, single=single), on_cpu=True)
    y = run(tmp_path, model, x, indices, weights)
    assert y.isfinite().all()
    torch.testing.assert_close(y, moe_experts.moe_experts(x, indices, weights, gate_up, down))


@pytest.mark.parametrize("single", [False, True])
def test_the_rows_multiplied_are_the_tokens_times_k(single, tmp_path):
    """Counted in the products' own outputs: no expert gets a row that was not sent to it."""
    gate_up, down = torch.randn(6, 8, 6), torch.randn(6, 6, 4)
    x, weights = torch.randn(1, 10, 6), torch.rand(1, 10, 2)
    indices = torch.stack([torch.randperm(6)[:2] for _ in range(10)])[None]
    model = SplitExperts()(experts_model(tmp_path, gate_up, down, 2, single=single)).model
    products = [node.outputs[0] for node in model.graph if node.op_type == "MatMul"]
    assert len(products) == 3 * 6
    model.graph.outputs.extend(products)
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tmp_path)
    )
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    feeds = {"x": x.numpy(), "indices": indices.numpy(), "weights": weights.numpy()}
    rows = [len(array) for array in session.run(None, feeds)[1:]]
    assert sorted(rows) == sorted(3 * indices.flatten().bincount(minlength=6).tolist())


@pytest.mark.parametrize("single", [False, True])
def test_weights_stay_in_their_file_and_stacks_disappear(single, tmp_path):
    gate_up, down = torch.randn(6, 8, 6), torch.randn(6, 6, 4)
    model = SplitExperts()(experts_model(tmp_path, gate_up, down, 2, single=single)).model
    assert "MoEExperts" not in {node.op_type for node in model.graph}
    assert all(node.op_type != "Concat" or len(node.inputs) == 6 for node in model.graph)
    assert ("qwenport", "MoEExperts", "") not in model.functions
    matrices = [v.const_value for v in model.graph.initializers.values() if len(v.shape) == 2]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in matrices)
    assert sum(tensor.length for tensor in matrices) == 4 * (gate_up.numel() + down.numel())


def test_experts_that_choose_tokens_are_refused(tmp_path):
    model = experts_model(tmp_path, torch.randn(3, 4, 2), torch.randn(3, 2, 2), 1, single=False)
    (call,) = model.graph
    call.attributes["by_expert"] = ir.AttrInt64("by_expert", 1)
    with pytest.raises(LoweringError, match="layer: experts that choose tokens"):
        SplitExperts()(model)


@pytest.mark.parametrize("op_type", ["Sum", "Mean"])
def test_a_stack_that_is_no_concatenation_is_refused(op_type, tmp_path):
    model = experts_model(tmp_path, torch.randn(3, 4, 2), torch.randn(3, 2, 2), 1, single=True)
    concat = next(node for node in model.graph if node.name == "c.down")
    concat.op_type = op_type
    with pytest.raises(LoweringError, match=r"layer: stack\.down is not a stack"):
        SplitExperts()(model)


def test_a_stack_that_is_computed_is_refused_by_name(tmp_path):
    model = experts_model(tmp_path, torch.randn(3, 4, 2), torch.randn(3, 2, 2), 1, single=False)
    (call,) = model.graph
    stack = call.inputs[3]
    copy = ir.node("Identity", [stack], name="copy")
    copy.outputs[0].name, copy.outputs[0].type = "copied", stack.type
    copy.outputs[0].shape = stack.shape
    model.graph.insert_before(call, copy)
    call.replace_input_with(3, copy.outputs[0])
    with pytest.raises(LoweringError, match="layer: copied is not a stack of single experts"):
        SplitExperts()(model)
