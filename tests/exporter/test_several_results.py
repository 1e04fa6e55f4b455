"""Operators with several results: all of them are recorded, and each reader reads the right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwenport.exporter import TracingError, emission, tracing
from qwenport.exporter.tracing import Ref, TensorType

AXES = [{0: "b", 1: "s"}]
ROWS = 6


class Module(nn.Module):
    """A function of one tensor [b, s, 6]."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def traced(function: Callable[[torch.Tensor], Any]) -> tracing.Trace:
    return tracing.trace(Module(function), [torch.empty(2, 3, ROWS, device="meta")], AXES)


Operator = Callable[[torch.Tensor], Sequence[torch.Tensor]]

OPERATORS: dict[str, Operator] = {
    "chunk in 1": lambda a: a.chunk(1, dim=-1),
    "chunk in 3": lambda a: a.chunk(3, dim=-1),
    "split in unequal parts": lambda a: a.split([1, 2, 3], dim=-1),
    "unbind": lambda a: a.unbind(-1),
    "topk": lambda a: a.topk(2, dim=-1),
    "topk of another namespace": lambda a: torch.topk(a, 4, dim=-1),
    "sort": lambda a: a.sort(dim=-1, descending=True),
    "max": lambda a: a.max(dim=-1),
    "aminmax": lambda a: torch.aminmax(a, dim=-1),
    "var_mean": lambda a: torch.var_mean(a, dim=-1),
    "frexp": lambda a: torch.frexp(a),
}


# --- what is recorded


@pytest.mark.parametrize("name", OPERATORS)
def test_every_result_is_recorded_with_its_dtype_and_shape(name: str) -> None:
    function = OPERATORS[name]
    trace = traced(lambda a: tuple(function(a)))
    expected = function(torch.zeros(11, 13, ROWS))
    (call,) = trace.calls
    assert call.results == tuple(Ref(1 + number) for number in range(len(expected)))
    assert trace.outputs == call.results
    axes = {11: "b", 13: "s"}
    assert trace.types[1:] == tuple(
        TensorType(t.dtype, tuple(axes.get(size, size) for size in t.shape)) for t in expected
    )


@given(data=st.data())
def test_a_reader_of_a_result_reads_that_one_whatever_came_between(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(OPERATORS)), min_size=1, max_size=4))
    picks = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
    expected: list[tuple[int, int]] = []  # (call, result) of each reading

    def function(a: torch.Tensor) -> Any:
        made = [OPERATORS[name](a) for name in names]
        read = []
        expected.clear()
        for first, second in picks:
            call = first % len(made)
            result = second % len(made[call])
            expected.append((call, result))
            read.append(made[call][result].unsqueeze(0))
        return (a + a, *read)

    trace = traced(function)
    results = [call.results for call in trace.calls]
    assert [ref.index for refs in results for ref in refs] == list(range(1, len(trace.types)))
    readers = trace.calls[len(names) : -1] if picks else ()
    assert len(trace.calls) == len(names) + len(picks) + 1
    assert [reader.args[0] for reader in readers] == [results[c][r] for c, r in expected]
    assert trace.calls[-1].args == (Ref(0), Ref(0))
    assert trace.outputs == (trace.calls[-1].results[0], *(r.results[0] for r in readers))


def test_a_list_of_results_is_as_good_as_a_tuple() -> None:
    first, second = (
        traced(lambda a, kind=kind: (lambda parts: parts[1])(kind(a.chunk(2, dim=-1))))
        for kind in (list, tuple)
    )
    assert first.types == second.types and first.outputs == second.outputs


def test_results_that_are_all_known_already_are_not_recorded_again() -> None:
    trace = traced(lambda a: torch.atleast_2d(a, a)[0] + a)
    assert len(trace.calls) == 1


def test_a_call_without_tensors_among_its_results_is_not_recorded() -> None:
    trace = traced(lambda a: a + a if a.is_floating_point() and a.size(-1) == ROWS else a * a)
    assert len(trace.calls) == 1


# --- what is refused


def mixed(a: torch.Tensor) -> torch.Tensor:
    """A call whose results are tensors, numbers and None."""
    heads = a.unsqueeze(1)
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    return operator(heads, heads, heads)[0]


NOT_RECORDED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "tensors and numbers": (mixed, "returns more than tensors"),
    "an input among the results": (
        lambda a: torch.atleast_2d(a[:, 0, 0], a)[0],
        "atleast_2d returns one of its inputs",
    ),
}


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_results_that_are_not_all_new_tensors_are_refused(name: str) -> None:
    function, words = NOT_RECORDED[name]
    with pytest.raises(TracingError, match=words):
        traced(function)


AS_MANY_AS: dict[str, Callable[[torch.Tensor], Any]] = {
    "all given back": lambda a: a.unbind(1),
    "all given back as a list": lambda a: list(a.unbind(0)),
    "all of a split": lambda a: a.split(500, dim=1),
    "all of a chunk, which are always 3": lambda a: a.chunk(3, dim=1),
    "all read at once": lambda a: torch.cat(a.unbind(1)),
    "the first of them": lambda a: a.unbind(1)[0] + a.unbind(1)[0],
    "the first of a split": lambda a: a.split(500, dim=1)[0] * 2,
    "the last of a split": lambda a: a.split(500, dim=1)[-1],
    "the first, and a call after it": lambda a: (a.split(500, dim=0)[0], a + a),
}


@pytest.mark.parametrize("name", AS_MANY_AS)
def test_as_many_results_as_a_dynamic_size_says_are_refused(name: str) -> None:
    with pytest.raises(TracingError):
        traced(AS_MANY_AS[name])


@pytest.mark.parametrize("name", [name for name in OPERATORS if "namespace" not in name])
def test_an_operator_of_several_results_without_translation_is_refused_by_name(name: str) -> None:
    trace = traced(lambda a: next(iter(OPERATORS[name](a))))
    operator = name.split()[0]
    with pytest.raises(TracingError, match=rf"no ONNX translation for .*{operator}"):
        emit(trace)


def test_a_result_that_nobody_reads_does_not_hide_a_missing_translation() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        a.topk(2, dim=-1)
        return a + a

    with pytest.raises(TracingError, match="topk"):
        emit(traced(function))


# --- what is emitted


def emit(trace: tracing.Trace) -> ir.Model:
    builder = emission.GraphBuilder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", ROWS]))
    outputs = emission.emit(trace, builder, [x], {}, "mini")
    graph = ir.Graph(
        [x],
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": 24},
        name="mini",
    )
    return ir.Model(graph, ir_version=11)


def run(model: ir.Model, x: torch.Tensor) -> list[torch.Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.array(y)) for y in session.run(None, {"x": x.numpy()})]


def _chunk(e: Any, x: Ref, chunks: int, dim: int = 0) -> Sequence[ir.Value]:
    return e.ops("Split", x, domain="", axis=dim, num_outputs=chunks)


@settings(max_examples=25)
@given(data=st.data())
def test_translated_results_are_read_in_any_order_as_torch_reads_them(data: st.DataObject) -> None:
    """chunk, of which the exporter itself has no translation, as Split."""
    counts = data.draw(st.lists(st.sampled_from([1, 2, 3, 6]), min_size=1, max_size=3))
    picks = data.draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5)
    )

    def function(a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = [(a + a).chunk(count, dim=-1) for count in counts]
        chosen = [made[c % len(made)][r % counts[c % len(made)]] for c, r in picks]
        return tuple(part * part for part in chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(emission.HANDLERS, torch.Tensor.chunk, _chunk)
        model = emit(traced(function))
    x = torch.randn(2, 3, ROWS, generator=torch.Generator().manual_seed(len(picks)))
    for found, expected in zip(run(model, x), function(x), strict=True):
        assert torch.equal(found, expected)
    names = [output.name for node in model.graph for output in node.outputs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("made", [0, 1, 3])
def test_a_translation_with_another_number_of_results_is_an_error(
    made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values after it would stand in for one another."""

    def handler(e: Any, x: Ref, chunks: int, dim: int = 0) -> Sequence[ir.Value]:
        return [e.op("Identity", x) for _ in range(made)]

    monkeypatch.setitem(emission.HANDLERS, torch.Tensor.chunk, handler)
    trace = traced(lambda a: (lambda parts: parts[0] + parts[1])(a.chunk(2, dim=-1)))
    with pytest.raises(TracingError, match="chunk"):
        emit(trace)
