"""Experts that round to FP8 inside their operator: a layer alone passes, and each seeded mistake in it is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from float_quantized import write_float_quantized
from safetensors.torch import load_file

from qwenport import engines
from qwenport.contract import BF16, E4M3, ENGINE_WEIGHTS, MOE_EXPERTS, no_progress
from qwenport.exporter import Package, export, open_checkpoint, read_safetensors_header
from qwenport.validate.candidate import Candidate
from qwenport.validate.pieces import check_distance, run_layer_alone
from qwenport.validate.reference import Reference
from qwenport.validate.report import Check
from qwenport.validate.sites import router_choices
from qwenport.validate.target import open_target
from qwenport.validate.thresholds import FP32_REL_L2, HALF_ROUTER_MARGIN
from qwenport.validate.weights_identity import compare_engine_weights, compare_weights

MIXTURE = Path(__file__).parents[2] / "examples" / "tiny-qwen2-moe"
GATES = ("lm_head", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
DENSE, SPARSE = 1, 2  # layers
TOKENS = np.random.default_rng(0).integers(0, 2048, 192).tolist()


SCHEMES = ("dynamic", "static")
Made = tuple[Package, Reference, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """(activations) -> a package of a mixture in FP8, the oracle, the checkpoint. Tests must not change them."""
    folder, known = tmp_path_factory.mktemp("fp8-experts"), dict[str, Made]()

    def make(name: str) -> Made:
        if name not in known:
            checkpoint = write_float_quantized(
                MIXTURE, folder / name, activations=name, ignore=GATES
            )
            package = export(checkpoint, folder / f"{name}.package")
            known[name] = package, Reference(open_target(package.path), checkpoint), checkpoint
        return known[name]

    return make


def alone(package: Package, reference: Reference, layer: int) -> dict[str, Check]:
    target = open_target(package.path)
    assert target.compute_dtype == E4M3
    candidate = Candidate(target, layers=reference.num_layers, streamed=False)
    router = router_choices(target.config, layer + 1).get(layer)
    run = run_layer_alone(candidate, layer, TOKENS, router, len(TOKENS))
    checks = check_distance(run, reference, layer, HALF_ROUTER_MARGIN)
    return {check.metric: check for check in checks}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("layer", [0, DENSE, SPARSE])
def test_a_correct_layer_passes(layer: int, name: str, made: Callable[[str], Made]) -> None:
    package, reference, _ = made(name)
    checks = alone(package, reference, layer)
    assert all(check.passed for check in checks.values()), checks
    assert (checks["rel-L2"].bound == FP32_REL_L2) == (layer == DENSE)


def test_every_static_scale_is_compared(made: Callable[[str], Made], tmp_path: Path) -> None:
    """In the package and in an engine, also those that an equal one stands for."""
    package, _, checkpoint = made("static")
    source = open_checkpoint(checkpoint)
    model = onnx.load(package.model, load_external_data=False)
    compared = compare_weights(model, package.path, source, no_progress)
    assert all(check.passed for check in compared.checks), compared.checks
    engine = engines.build(package.path, tmp_path / "engine", target="onnxruntime").path
    lowered = onnx.load(engine / "model.onnx", load_external_data=False)
    compared = compare_engine_weights(lowered, engine, source, BF16, no_progress)
    assert all(check.passed for check in compared.checks), compared.checks
    name = f"model.layers.{SPARSE}.mlp.experts.5.up_proj.weight.input_scale"
    (entry,) = [e for e in read_safetensors_header(engine / ENGINE_WEIGHTS)[1] if e.name == name]
    with (engine / ENGINE_WEIGHTS).open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.float32(0.03125).tobytes())
    compared = compare_engine_weights(lowered, engine, source, BF16, no_progress)
    assert not all(check.passed for check in compared.checks)


def test_a_static_scale_is_each_expert_s_own_linear_s(made: Callable[[str], Made]) -> None:
    """Against the checkpoint's tensors, in the order that the operator has them."""
    package, _, checkpoint = made("static")
    stored = load_file(checkpoint / "model.safetensors")
    model = package.read_model()
    (node,) = [n for n in _experts(model) if f".layers.{SPARSE}." in str(n.name)]
    reshape = node.inputs[5].producer()  # type: ignore[union-attr]
    concat = reshape.inputs[0].producer()  # type: ignore[union-attr]
    assert concat is not None
    values = [bits_of(value) for value in concat.inputs]
    wanted = [
        stored[f"model.layers.{SPARSE}.mlp.experts.{expert}.{linear}_proj.input_scale"]
        for expert in range(len(values) // 3)
        for linear in ("gate", "up", "down")
    ]
    assert len({float(scale) for scale in wanted}) > len(wanted) / 3
    assert torch.equal(torch.tensor(values, dtype=torch.int16), torch.cat(wanted).view(torch.int16))


def bits_of(value: ir.Value | None) -> int:
    tensor = None if value is None else value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with open(tensor.path, "rb") as stream:
        stream.seek(tensor.offset or 0)
        return int(np.frombuffer(stream.read(2), np.int16)[0])


def _experts(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == MOE_EXPERTS]


def _unrounded(model: ir.Model) -> None:
    for node in _experts(model):
        node.attributes.pop("round_inner", None)
        node.resize_inputs(5)


def _scales_of_experts(order: Callable[[int], int]) -> Callable[[ir.Model], None]:
    """Input scales in another order."""

    def seed(model: ir.Model) -> None:
        for node in _experts(model):
            concat = node.inputs[5].producer().inputs[0].producer()  # type: ignore[union-attr]
            assert concat is not None
            given = list(concat.inputs)
            for index in range(len(given)):
                concat.replace_input_with(index, given[order(index)])

    return seed


def _scales_of_a_neighbour(model: ir.Model) -> None:
    name = f"model.layers.{SPARSE}.mlp.experts.{{}}.down_proj.DequantizeLinear"
    first, second = (
        next(node for node in model.graph if node.name == name.format(expert)) for expert in (3, 4)
    )
    first.replace_input_with(1, second.inputs[1])


def _input_not_rounded(model: ir.Model) -> None:
    """What gate and up multiply."""
    (node,) = [
        node
        for node in model.graph
        if node.op_type == MOE_EXPERTS and f".layers.{SPARSE}." in str(node.name)
    ]
    value = node.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0]
        if producer.op_type == "Div":
            break
    node.replace_input_with(0, value)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("dynamic", _unrounded),
        ("dynamic", _scales_of_a_neighbour),
        ("dynamic", _input_not_rounded),
        ("static", _unrounded),
        ("static", _scales_of_a_neighbour),
        ("static", _scales_of_experts(lambda i: 3 * (i // 3) + (1, 0, 2)[i % 3])),
        ("static", _scales_of_experts(lambda i: 3 * (i // 3) + (2, 1, 0)[i % 3])),
        ("static", _scales_of_experts(lambda i: (i + 3) % 36)),
    ],
)
def test_a_mistake_in_experts_shows_in_their_layer(
    name: str,
    seed: Callable[[ir.Model], None],
    made: Callable[[str], Made],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package, reference, _ = made(name)
    model = package.read_model()
    seed(model)
    for method in ("read_model", "check_graph"):
        monkeypatch.setattr(Package, method, lambda package: model.clone())
    check = alone(package, reference, SPARSE)["rel-L2"]
    assert not check.passed and check.value > 1.5 * check.bound
