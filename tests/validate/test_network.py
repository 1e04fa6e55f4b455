"""What a build does not catch: TensorRT's parser takes the model, and understands another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from defects.tools import node, seed

from qwenport.cli import main
from qwenport.engines import LoweringError
from qwenport.engines.lowering import check_graph
from qwenport.exporter import export, load_package
from qwenport.validate import Report, validate
from qwenport.validate.network import parse_package
from qwenport.validate.scenarios import SCENARIOS

from .bundled import row, status

EXACT: dict[str, Any] = {"judged_as": "tensorrt-network", "exact": True, "budget": "quick"}
CACHED = ("decode", "chunked prefill", "batches", "whole context", "greedy")


@pytest.fixture(scope="module")
def tiny_package(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with little room, so that it is soon judged."""
    folder = tmp_path_factory.mktemp("small")
    options: dict[str, Any] = {"weights": "copy", "max_seq_len": 96, "max_batch": 2}
    return export(tiny_checkpoint, folder / "package", **options).path


def attentions(model: ir.Model) -> list[ir.Node]:
    found = [n for n in model.graph if n.op_type == "Attention"]
    assert found
    return found


def causal_without_mask(model: ir.Model) -> None:
    """What one writes who does not know that `is_causal` begins at the first slot."""
    for attention in attentions(model):
        attention.replace_input_with(3, None)
        attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def causal_with_lengths(model: ir.Model) -> None:
    """ONNX's own way: `nonpad_kv_seqlen` says how much of the cache is valid, and aligns `is_causal` to its end."""
    graph = model.graph
    by_name = {value.name: value for value in graph.inputs}
    first = attentions(model)[0]
    last = ir.Value(
        name="last",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([1]),
        const_value=ir.tensor(np.array([-1], dtype=np.int64), name="last"),
    )
    graph.register_initializer(last)
    one = ir.tensor(np.array([1], dtype=np.int64), name="one")
    one_value = ir.Value(
        name="one", type=ir.TensorType(one.dtype), shape=ir.Shape([1]), const_value=one
    )
    graph.register_initializer(one_value)
    highest = ir.node(
        "ReduceMax", [by_name["position_ids"], last], attributes={"keepdims": 0}, name="highest"
    )
    lengths = ir.node("Add", [highest.outputs[0], one_value], name="lengths")
    for made in (highest, lengths):
        made.outputs[0].name = made.name
        made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        made.outputs[0].shape = ir.Shape(["batch"])
        graph.insert_before(first, made)
    causal_without_mask(model)
    for attention in attentions(model):
        attention.resize_inputs(7)
        attention.replace_input_with(6, lengths.outputs[0])


def operator_of_nobody(model: ir.Model) -> None:
    """A plugin node for which there is no plugin."""
    sigmoid = node(model, "model.layers.0.mlp.Sigmoid")
    sigmoid.op_type, sigmoid.domain = "Mystery", "somebody"
    model.graph.opset_imports["somebody"] = 1


def judged(package: Path, checkpoint: Path, folder: Path, change: Any) -> tuple[Path, Report]:
    faulty = seed(package, folder / "faulty", change)
    return faulty, validate(faulty, checkpoint, **EXACT)


@pytest.mark.parametrize(
    "change", [causal_without_mask, pytest.param(causal_with_lengths, marks=pytest.mark.slow)]
)
def test_a_causal_attention_over_a_cache_is_parsed_and_fails(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path, change: Any
) -> None:
    faulty, report = judged(tiny_package, tiny_checkpoint, tmp_path, change)
    assert parse_package(load_package(faulty), 64).network.num_layers  # TensorRT has no objection
    found = status(report)
    assert found["parsed network"] == "failed"
    assert {name for name in CACHED if found[name] != "failed"} == set()
    assert found["prefill"] == "passed"  # a prompt that fills the span: upper left is right there
    assert report.fault is not None
    assert (report.fault.layer, report.fault.operator) == (0, "self_attn.attention")


def test_the_lengths_that_the_parser_drops_reach_no_layer(
    tiny_package: Path, tmp_path: Path
) -> None:
    faulty = seed(tiny_package, tmp_path / "faulty", causal_with_lengths)
    parsed = parse_package(load_package(faulty), 64)
    read = {
        layer.get_input(index).name
        for layer, _ in parsed.layers()
        for index in range(layer.num_inputs)
        if layer.get_input(index) is not None
    }
    makers = {
        layer.get_output(index).name
        for layer, _ in parsed.layers()
        for index in range(layer.num_outputs)
    }
    assert "lengths" in makers and "lengths" not in read
    assert any("after the mask" in line or "mask" in line for line in parsed.complaints)


def test_an_operator_that_nobody_implements_fails_in_tensorrts_words(
    tiny_checkpoint: Path,
    tiny_package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty, report = judged(tiny_package, tiny_checkpoint, tmp_path, operator_of_nobody)
    assert not report.passed
    assert report.fault is None
    (failed,) = [s for s in report.scenarios if s.status == "failed"]
    assert failed.name == "parsed network" and failed.reason is not None
    assert "Plugin not found" in failed.reason and "Mystery" in failed.reason
    assert all(row(report, s.name).status == "not run" for s in SCENARIOS)
    assert report.verdict.startswith("parity does NOT hold") and report.coverage is None
    arguments = ["validate", faulty, "--reference", tiny_checkpoint, "--as", "tensorrt-network"]
    assert main([str(a) for a in arguments]) == 1
    out, err = capsys.readouterr()
    assert "Mystery" in out and "Traceback" not in out + err


def test_a_function_that_bears_the_name_of_an_operator_and_is_another_is_refused(
    tiny_package: Path,
) -> None:
    model = ir.load(load_package(tiny_package).model)
    check_graph(model)
    (function,) = [f for f in model.functions.values() if f.name == "RotaryEmbedding"]
    (inner,) = list(function)
    inner.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
    with pytest.raises(LoweringError, match=r"RotaryEmbedding.*which its body is not"):
        check_graph(model)


def test_a_cache_that_is_read_beside_its_update_is_a_complaint(
    tiny_package: Path, tmp_path: Path
) -> None:
    """Whether the reader runs before or after the update in place, nobody can say."""

    def read_the_past(model: ir.Model) -> None:
        (past,) = [v for v in model.graph.inputs if v.name == "past_key_values.1.key"]
        node(model, "model.layers.1.self_attn.Slice").replace_input_with(0, past)

    parsed = parse_package(load_package(seed(tiny_package, tmp_path / "f", read_the_past)), 64)
    assert any("past_key_values.1.key" in line for line in parsed.complaints)
    assert parse_package(load_package(tiny_package), 64).complaints == ()
