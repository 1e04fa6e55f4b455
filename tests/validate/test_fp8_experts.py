"""Experts that round to FP8 inside their operator: a layer alone passes, and each seeded mistake in it is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from float_quantized import write_float_quantized

from qwenport.contract import E4M3, MOE_EXPERTS
from qwenport.exporter import Package, export
from qwenport.validate.candidate import Candidate
from qwenport.validate.pieces import check_distance, run_layer_alone
from qwenport.validate.reference import Reference
from qwenport.validate.report import Check
from qwenport.validate.sites import router_choices
from qwenport.validate.target import open_target
from qwenport.validate.thresholds import FP32_REL_L2, HALF_ROUTER_MARGIN

MIXTURE = Path(__file__).parents[2] / "examples" / "tiny-qwen2-moe"
GATES = ("lm_head", r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")
DENSE, SPARSE = 1, 2  # layers
TOKENS = np.random.default_rng(0).integers(0, 2048, 192).tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, Reference]:
    """A package of a mixture in FP8 with dynamic activations, and the oracle. Tests must not change them."""
    folder = tmp_path_factory.mktemp("fp8-experts")
    checkpoint = write_float_quantized(
        MIXTURE, folder / "checkpoint", activations="dynamic", ignore=GATES
    )
    package = export(checkpoint, folder / "package")
    return package, Reference(open_target(package.path), checkpoint)


def alone(package: Package, reference: Reference, layer: int) -> dict[str, Check]:
    target = open_target(package.path)
    assert target.compute_dtype == E4M3
    candidate = Candidate(target, layers=reference.num_layers, streamed=False)
    router = router_choices(target.config, layer + 1).get(layer)
    run = run_layer_alone(candidate, layer, TOKENS, router, len(TOKENS))
    checks = check_distance(run, reference, layer, HALF_ROUTER_MARGIN)
    return {check.metric: check for check in checks}


@pytest.mark.parametrize("layer", [0, DENSE, SPARSE])
def test_a_correct_layer_passes(layer: int, made: tuple[Package, Reference]) -> None:
    checks = alone(*made, layer)
    assert all(check.passed for check in checks.values()), checks
    assert (checks["rel-L2"].bound == FP32_REL_L2) == (layer == DENSE)


def _unrounded(model: ir.Model) -> None:
    for node in model.graph:
        node.attributes.pop("round_inner", None)


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


@pytest.mark.parametrize("seed", [_unrounded, _scales_of_a_neighbour, _input_not_rounded])
def test_a_mistake_in_experts_shows_in_their_layer(
    seed: Callable[[ir.Model], None],
    made: tuple[Package, Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package, reference = made
    model = package.read_model()
    seed(model)
    for method in ("read_model", "check_graph"):
        monkeypatch.setattr(Package, method, lambda package: model.clone())
    check = alone(package, reference, SPARSE)["rel-L2"]
    assert not check.passed and check.value > 1.5 * check.bound
