"""Packages of FP8 checkpoints against the oracle, and seeded mistakes in them: each is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fine_grained_fp8 import write_fine_grained_fp8
from float_quantized import write_float_quantized

from qwenport.contract import no_progress
from qwenport.engines import OnnxRuntimeSession
from qwenport.engines.errors import LoweringError
from qwenport.exporter import Package, export, open_checkpoint
from qwenport.validate.candidate import Candidate
from qwenport.validate.reference import Choices, Reference, Text
from qwenport.validate.target import Target, open_target
from qwenport.validate.thresholds import FP32_REL_L2
from qwenport.validate.weights_identity import compare_weights

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, MIXTURE = EXAMPLES / "tiny-qwen2.5", EXAMPLES / "tiny-qwen2-moe"
GATES = (r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
EXPERTS = r"re:.*\.experts\..*"
SCHEMES: dict[str, tuple[Path, Any, dict[str, Any]]] = {
    "rows": (DENSE, write_float_quantized, {}),
    "static": (DENSE, write_float_quantized, {"activations": "static", "by_row": False}),
    "dynamic": (DENSE, write_float_quantized, {"activations": "dynamic"}),
    "blocks": (DENSE, write_fine_grained_fp8, {}),
    "experts": (MIXTURE, write_float_quantized, {"ignore": ("lm_head", *GATES)}),
    "mixture, dynamic": (
        MIXTURE,
        write_float_quantized,
        {"activations": "dynamic", "ignore": ("lm_head", *GATES, EXPERTS)},
    ),
    "head": (MIXTURE, write_float_quantized, {"ignore": (*GATES, EXPERTS)}),
}
TOKENS = [*range(3, 40), 1, 900, 11]
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Package]]:
    """(scheme) -> a bundled checkpoint in it, and its package. Tests must not change them."""
    folder, done = tmp_path_factory.mktemp("fp8"), {}

    def make(name: str) -> tuple[Path, Package]:
        if name not in done:
            source, write, how = SCHEMES[name]
            checkpoint = write(source, folder / name, **how)
            done[name] = checkpoint, export(checkpoint, folder / f"{name}.package")
        return done[name]

    return make


def distance(checkpoint: Path, package: Package) -> tuple[float, int]:
    """(rel-L2 of a package's logits from the oracle's, with its codes taken over in ties; their number)."""
    target: Target = dataclasses.replace(open_target(package.path), package=package)
    reference = Reference(target, checkpoint)
    candidate = Candidate(target, layers=reference.num_layers, streamed=False)
    names = candidate.rounded_inputs(reference.num_layers)
    observe = list(dict.fromkeys(name for paths in names.values() for name in paths.values()))
    session = OnnxRuntimeSession(package, max_batch=1, capacity=64, observe=observe)
    found = np.concatenate(session.prefill([TOKENS], all_logits=True))
    rounded = {
        layer: {path: session.observed[name][0] for path, name in paths.items()}
        for layer, paths in names.items()
    }
    choices = Choices({}, 0.0, rounded)
    (right,) = reference.logits([Text.ending(TOKENS, len(TOKENS))], choices=[choices])
    return float(np.linalg.norm(found - right) / np.linalg.norm(right)), reference.replayed


@pytest.mark.parametrize("name", SCHEMES)
def test_a_package_computes_what_the_oracle_does(
    name: str, made: Callable[[str], tuple[Path, Package]]
) -> None:
    checkpoint, package = made(name)
    error, taken = distance(checkpoint, package)
    assert error < FP32_REL_L2 / 3
    assert taken < 100  # of several 100,000
    model = onnx.load(package.model, load_external_data=False)
    compared = compare_weights(model, package.path, open_checkpoint(checkpoint), no_progress)
    assert all(check.passed for check in compared.checks), compared.checks


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def _static_scale_ignored(model: ir.Model) -> None:
    node = _nodes(model, "QuantizeLinear")[5]
    (use,) = node.outputs[0].uses()
    use.node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]


def _scale_of_another_input(model: ir.Model) -> None:
    first, second = _nodes(model, "QuantizeLinear")[:2]
    for node in (second, next(u.node for u in second.outputs[0].uses())):
        node.replace_input_with(1, first.inputs[1])


def _over_the_wrong_axis(model: ir.Model) -> None:
    _nodes(model, "ReduceMax")[3].replace_input_with(1, _constant(model, [1]))


def _over_all(model: ir.Model) -> None:
    _nodes(model, "ReduceMax")[3].replace_input_with(1, _constant(model, [1, 2]))


def _constant(model: ir.Model, axes: list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(axes, dtype=np.int64), name="seeded")
    value = ir.Value(
        name="seeded",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([len(axes)]),
        const_value=tensor,
    )
    model.graph.initializers["seeded"] = value
    return value


def _e5m2(op_type: str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        other = int(ir.DataType.FLOAT8E5M2)
        for node in _nodes(model, op_type):
            key = "to" if op_type == "Cast" else "output_dtype"
            if node.attributes[key].as_int() == int(ir.DataType.FLOAT8E4M3FN):
                node.attributes[key] = ir.AttrInt64(key, other)
                node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT8E5M2)

    return change


def _no_saturation(model: ir.Model) -> None:
    for node in _nodes(model, "QuantizeLinear"):
        node.attributes["saturate"] = ir.AttrInt64("saturate", 0)


def _input_of_one_linear_not_rounded(model: ir.Model) -> None:
    (node,) = [node for node in model.graph if node.name == f"{DOWN}.MatMul"]
    rounded = node.inputs[0]
    assert rounded is not None
    (division,) = [n for n in _nodes(model, "Div") if n.outputs[0].name == f"{rounded.name}.Div_2"]
    node.replace_input_with(0, division.inputs[0])


def _inverse_scales(model: ir.Model) -> None:
    _initializer(model, f"{UP}.weight.scales", lambda scales: 1 / scales)


def _scales_of_neighbours(model: ir.Model) -> None:
    _initializer(model, f"{UP}.weight.scales", lambda scales: scales.roll(1))


def _initializer(
    model: ir.Model, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    value = model.graph.initializers[name]
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with open(tensor.path, "rb") as stream:
        stream.seek(tensor.offset or 0)
        data = bytearray(stream.read(tensor.nbytes))
    stored = torch.frombuffer(data, dtype=torch.bfloat16)
    value.const_value = ir.tensor(change(stored.float()).bfloat16(), name=name)


def _another_weight_s_scales(model: ir.Model) -> None:
    (node,) = [n for n in model.graph if n.name == f"{UP}.DequantizeLinear"]
    gate = UP.replace("up_proj", "gate_proj")
    node.replace_input_with(1, model.graph.initializers[f"{gate}.weight.scales"])


DEFECTS: list[tuple[str, Callable[[ir.Model], None]]] = [
    ("static", _static_scale_ignored),
    ("static", _scale_of_another_input),
    ("static", _no_saturation),
    ("dynamic", _over_the_wrong_axis),
    ("dynamic", _over_all),
    ("dynamic", _e5m2("Cast")),
    ("dynamic", _input_of_one_linear_not_rounded),
    ("rows", _inverse_scales),
    ("rows", _scales_of_neighbours),
    ("rows", _another_weight_s_scales),
]
"""(scheme, what is changed in the graph)."""


@pytest.mark.parametrize(("name", "seed"), DEFECTS)
def test_a_mistake_in_the_graph_shows_in_the_logits(
    name: str,
    seed: Callable[[ir.Model], None],
    made: Callable[[str], tuple[Path, Package]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the oracle takes over codes in ties."""
    checkpoint, package = made(name)
    model = package.read_model()
    seed(model)
    monkeypatch.setattr(Package, "read_model", lambda package: model.clone())
    monkeypatch.setattr(Package, "check_graph", lambda package: model.clone())
    error, _ = distance(checkpoint, package)
    assert not error < 10 * FP32_REL_L2


def test_inputs_rounded_to_another_type_are_refused(
    made: Callable[[str], tuple[Path, Package]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, package = made("static")
    model = package.read_model()
    _e5m2("QuantizeLinear")(model)
    for method in ("read_model", "check_graph"):
        monkeypatch.setattr(Package, method, lambda package: model.clone())
    with pytest.raises(LoweringError, match="rounded"):
        distance(checkpoint, package)


def _wrong_weights(checkpoint: Path, package: Package) -> int:
    model = onnx.load(package.model, load_external_data=False)
    compared = compare_weights(model, package.path, open_checkpoint(checkpoint), no_progress)
    return sum(not check.passed for check in compared.checks)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda factors: 1 / factors,
        lambda factors: factors.flatten().view(factors.T.shape).T,  # laid out along columns
        lambda factors: factors.roll(1, 1),
        lambda factors: factors.roll(1, 0),
    ],
    ids=["inverse", "transposed", "neighbour in the row", "neighbour in the column"],
)
def test_factors_that_are_applied_otherwise_show_in_the_weights(
    wrong: Callable[[torch.Tensor], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwenport.exporter.quantization.fine_grained_fp8 import FineGrainedFP8

    right = FineGrainedFP8._dequantized

    def seeded(self: Any, sources: Any, dtype: str, read: Any) -> bytes:
        factors = torch.frombuffer(bytearray(read[1]), dtype=torch.bfloat16).view(sources[1].shape)
        changed = wrong(factors.float()).bfloat16().contiguous()
        return right(self, sources, dtype, [read[0], changed.view(torch.uint8).numpy().tobytes()])

    checkpoint = write_fine_grained_fp8(DENSE, tmp_path / "checkpoint", block=(64, 64))
    assert not _wrong_weights(checkpoint, export(checkpoint, tmp_path / "right"))
    monkeypatch.setattr(FineGrainedFP8, "_dequantized", seeded)
    assert _wrong_weights(checkpoint, export(checkpoint, tmp_path / "package"))


def test_an_input_scale_that_is_shared_wrongly_is_no_tensor_in_use(
    tmp_path: Path, made: Callable[[str], tuple[Path, Package]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two linears with scales of their own, one's stands for both."""
    from qwenport.exporter import weights

    checkpoint, _ = made("static")
    right = weights._equal_input_scales

    def seeded(checkpoint: Any, parts: Any) -> dict[str, str]:
        gate = UP.replace("up_proj", "gate_proj")
        other = {f"{DOWN}.weight.input_scale": f"{gate}.weight.input_scale"}
        return right(checkpoint, parts) | other

    monkeypatch.setattr(weights, "_equal_input_scales", seeded)
    assert _wrong_weights(checkpoint, export(checkpoint, tmp_path / "package"))
