"""A vocabulary head whose input is rounded to FP8: it is judged alone too, and each seeded mistake in it is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from float_quantized import write_float_quantized

from qwenport.contract import E4M3, no_progress
from qwenport.exporter import Package, export, open_checkpoint
from qwenport.validate.candidate import Candidate
from qwenport.validate.judge import status_of
from qwenport.validate.pieces import check_head, run_head_alone
from qwenport.validate.reference import Reference
from qwenport.validate.report import Check
from qwenport.validate.target import open_target
from qwenport.validate.thresholds import FP32_REL_L2
from qwenport.validate.weights_identity import compare_weights

MIXTURE = Path(__file__).parents[2] / "examples" / "tiny-qwen2-moe"
GATES = (r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$", r"re:.*\.experts\..*")
TOKENS = np.random.default_rng(0).integers(0, 2048, 64).tolist()
SCHEMES = ("dynamic", "static")
Made = tuple[Path, Package, Reference]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """(activations) -> a checkpoint whose head rounds its input, its package, the oracle. Do not change them."""
    folder, known = tmp_path_factory.mktemp("fp8-head"), dict[str, Made]()

    def make(name: str) -> Made:
        if name not in known:
            checkpoint = write_float_quantized(
                MIXTURE, folder / name, activations=name, ignore=GATES, share=0.5
            )
            package = export(checkpoint, folder / f"{name}.package")
            known[name] = checkpoint, package, Reference(open_target(package.path), checkpoint)
        return known[name]

    return make


def alone(package: Package, reference: Reference, judged_as: str | None = None) -> list[Check]:
    target = open_target(package.path, judged_as=judged_as, exact=judged_as is not None)
    assert target.compute_dtype == E4M3
    candidate = Candidate(target, layers=reference.num_layers, streamed=False)
    assert candidate.rounded_head is None or candidate.uses(candidate.rounded_head)
    return check_head(run_head_alone(candidate, TOKENS), reference)


@pytest.mark.parametrize("judged_as", [None, "tensorrt-network"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_correct_head_passes(
    name: str, judged_as: str | None, made: Callable[[str], Made]
) -> None:
    _, package, reference = made(name)
    checks = alone(package, reference, judged_as)
    assert status_of(checks) == "passed", checks
    assert {check.bound for check in checks if check.metric == "rel-L2"} == {FP32_REL_L2}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_tensor_of_the_checkpoint_is_used(name: str, made: Callable[[str], Made]) -> None:
    checkpoint, package, _ = made(name)
    model = onnx.load(package.model, load_external_data=False)
    compared = compare_weights(model, package.path, open_checkpoint(checkpoint), no_progress)
    assert all(check.passed for check in compared.checks), compared.checks


@pytest.mark.parametrize("name", SCHEMES)
def test_own_rounding_is_that_of_equal_codes(name: str, made: Callable[[str], Made]) -> None:
    """In fp64 too, where the head is multiplied by in pieces."""
    checkpoint, package, reference = made(name)
    found = reference.own_rounding(TOKENS)
    assert 0 < found < 2e-6
    streamed = Reference(open_target(package.path), checkpoint, streamed=True)
    assert streamed.own_rounding(TOKENS) == found


def _head(model: ir.Model) -> tuple[ir.Node, ir.Node]:
    """(the head's product, what divides its input or gives it codes)."""
    (product,) = [node for node in model.graph if node.name == "model.lm_head.MatMul"]
    node = product
    while node.op_type not in ("QuantizeLinear", "Div"):
        given = node.inputs[0]
        assert given is not None
        maker = given.producer()
        assert maker is not None
        node = maker
    return product, node


def _not_rounded(model: ir.Model) -> None:
    product, first = _head(model)
    product.replace_input_with(0, first.inputs[0])


def _scale_of_another(model: ir.Model) -> None:
    _, quantize = _head(model)
    other = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    (use,) = quantize.outputs[0].uses()
    for node in (quantize, use.node):
        node.replace_input_with(1, other.inputs[1])


def _largest_of_all_tokens(model: ir.Model) -> None:
    """The scale's maximum is over the tokens as well."""
    _, division = _head(model)
    scale = division.inputs[1]
    while scale is not None and (maker := scale.producer()) is not None:
        if maker.op_type == "ReduceMax":
            axes = ir.tensor(np.array([1, 2], dtype=np.int64), name="seeded")
            value = ir.Value(
                name="seeded", type=ir.TensorType(axes.dtype), shape=axes.shape, const_value=axes
            )
            model.graph.initializers["seeded"] = value
            maker.replace_input_with(1, value)
            return
        scale = maker.inputs[2 if maker.op_type == "Where" else 0]
    raise AssertionError("no scale for each token")


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("dynamic", _not_rounded),
        ("static", _not_rounded),
        ("static", _scale_of_another),
        ("dynamic", _largest_of_all_tokens),
    ],
)
def test_a_mistake_in_its_rounding_shows_in_the_head_alone(
    name: str,
    seed: Callable[[ir.Model], None],
    made: Callable[[str], Made],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, package, reference = made(name)
    model = package.read_model()
    seed(model)
    for method in ("read_model", "check_graph"):
        monkeypatch.setattr(Package, method, lambda package: model.clone())
    (check,) = [c for c in alone(package, reference) if c.metric == "rel-L2"]
    assert not check.passed and check.value > 100 * check.bound


def test_a_plain_head_beside_rounded_layers_is_not_judged_by_moved_inputs(
    made: Callable[[str], Made],
) -> None:
    config = made("dynamic")[1].config
    assert config.rounds_head
    assert not dataclasses.replace(config, tie_word_embeddings=True).rounds_head
    assert not dataclasses.replace(config, quantization=None).rounds_head
