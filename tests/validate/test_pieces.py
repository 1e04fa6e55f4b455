"""Pieces by themselves: every id's embedding bit for bit, and one layer over the whole context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from defects.distance import window_of_256_in_one_layer
from defects.tools import constant, insert, replace_uses, seed

from qwenport.exporter import export
from qwenport.validate.candidate import Candidate
from qwenport.validate.pieces import (
    IDS_AT_ONCE,
    LayerRun,
    as_array,
    check_distance,
    check_embedding,
    run_layer_alone,
)
from qwenport.validate.reference import Reference
from qwenport.validate.report import Check
from qwenport.validate.sites import router_choices
from qwenport.validate.target import Target, open_target
from qwenport.validate.thresholds import FP32_ROUTER_MARGIN

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENS = np.random.default_rng(4).integers(0, 2048, 512).tolist()
VOCABULARY = 2048
WAYS = (None, "tensorrt-network")


def candidate_of(target: Target) -> Candidate:
    return Candidate(target, layers=target.config.num_hidden_layers, streamed=False)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces") / "package"
    return export(EXAMPLES / "tiny-qwen2.5", folder, weights="copy").path


@pytest.fixture(scope="module")
def reference(package: Path) -> Reference:
    return Reference(open_target(package), EXAMPLES / "tiny-qwen2.5")


def embedding(target: Target, reference: Reference) -> Check:
    progress: list[int] = []
    (check,) = check_embedding(
        candidate_of(target), reference, VOCABULARY, lambda what, done, total: progress.append(done)
    )
    assert progress == list(range(IDS_AT_ONCE, VOCABULARY + 1, IDS_AT_ONCE))
    return check


@pytest.mark.parametrize("judged_as", WAYS)
def test_every_row_of_a_healthy_embedding_is_the_checkpoint_s(
    package: Path, reference: Reference, judged_as: str | None
) -> None:
    check = embedding(open_target(package, judged_as=judged_as), reference)
    assert check.passed and check.value == 0 and check.where == "of 2048"


@pytest.mark.parametrize("judged_as", WAYS)
@pytest.mark.parametrize("row", [0, 700, VOCABULARY - 1])
def test_one_bit_of_one_row_is_caught(
    package: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    row: int,
    judged_as: str | None,
) -> None:
    """What the checkpoint's row would be with another last bit."""
    right = reference.embed

    def changed(ids: Sequence[int]) -> Any:
        rows = right(ids).copy()
        bits = rows[[i for i, id_ in enumerate(ids) if id_ == row]]
        rows[[i for i, id_ in enumerate(ids) if id_ == row]] = np.nextafter(bits, np.inf)
        return rows

    monkeypatch.setattr(reference, "embed", changed)
    check = embedding(open_target(package, judged_as=judged_as), reference)
    assert not check.passed and check.value == 1
    assert check.where == f"of 2048, first id {row}"


def test_one_changed_row_of_the_package_is_caught(
    package: Path, reference: Reference, tmp_path: Path
) -> None:
    def change(model: ir.Model) -> None:
        """Id 1234 gets the row of 1233."""
        (gather,) = [n for n in model.graph if n.outputs[0].name == "model.embedding"]
        ids = gather.inputs[1]
        assert ids is not None
        odd = constant(model, "odd", 1234)
        same = insert(model, gather, "Equal", [ids, odd], "same", dtype=ir.DataType.BOOL)
        one = constant(model, "other", 1233)
        moved = insert(model, gather, "Where", [same, one, ids], "moved", dtype=ir.DataType.INT64)
        replace_uses(ids, moved, by=lambda n: n is gather)

    faulty = seed(package, tmp_path / "faulty", change)
    check = embedding(open_target(faulty), reference)
    assert (check.value, check.where) == (1, "of 2048, first id 1234")


# ---- one layer over the whole context


def by_name(checks: Sequence[Check]) -> dict[str, Check]:
    return {check.metric: check for check in checks}


@pytest.mark.parametrize("judged_as", WAYS)
@pytest.mark.parametrize("name", ["tiny-qwen2.5", "tiny-qwen2-moe"])
def test_layers_of_healthy_targets_keep_to_transformers_at_every_position(
    name: str, judged_as: str | None, tmp_path: Path
) -> None:
    checkpoint = EXAMPLES / name
    target = open_target(export(checkpoint, tmp_path / "package").path, judged_as=judged_as)
    candidate, reference = candidate_of(target), Reference(target, checkpoint)
    routers = router_choices(target.config, target.config.num_hidden_layers)
    for layer in (0, 1):
        run = run_layer_alone(candidate, layer, TOKENS, routers.get(layer), 512)
        assert run.entry.shape == run.end.shape == (512, 192)
        assert np.array_equal(run.entry, reference.embed(TOKENS))
        assert (run.experts is not None) == (layer in routers)
        checks = check_distance(run, reference, layer, FP32_ROUTER_MARGIN)
        assert all(check.passed for check in checks), list(map(str, checks))
        assert by_name(checks)["rel-L2"].value > 0


@pytest.fixture(scope="module")
def healthy(package: Path) -> LayerRun:
    return run_layer_alone(candidate_of(open_target(package)), 2, TOKENS, None, 512)


def spoiled(run: LayerRun, position: int, change: Callable[[Any], Any]) -> LayerRun:
    end = run.end.copy()
    end[position] = change(end[position])
    return LayerRun(run.entry, end, run.experts)


@pytest.mark.parametrize("position", [0, 100, 511])
def test_one_position_that_is_off_is_named(
    healthy: LayerRun, reference: Reference, position: int
) -> None:
    checks = by_name(
        check_distance(spoiled(healthy, position, lambda x: x * 1.001), reference, 2, 0.0)
    )
    assert checks["rel-L2 of one position"].value == pytest.approx(1e-3, rel=0.01)
    assert checks["rel-L2 of one position"].where == f"position {position}"
    assert not checks["rel-L2 of one position"].passed
    assert checks["NaN and infinite hidden states"].passed


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_that_is_none_is_named(
    healthy: LayerRun, reference: Reference, value: float
) -> None:
    run = spoiled(healthy, 77, lambda x: np.where(np.arange(len(x)) == 3, value, x))
    checks = by_name(check_distance(run, reference, 2, 0.0))
    assert checks["NaN and infinite hidden states"].value == 1
    assert checks["rel-L2 of one position"].where == "position 77"
    assert not any(check.passed for check in checks.values())


@pytest.mark.parametrize("judged_as", WAYS)
def test_attention_that_sees_only_a_window_is_caught_where_it_ends(
    package: Path, reference: Reference, tmp_path: Path, judged_as: str | None
) -> None:
    faulty = seed(package, tmp_path / "faulty", window_of_256_in_one_layer)
    candidate = candidate_of(open_target(faulty, judged_as=judged_as))
    for layer, length, passes in ((2, 512, False), (2, 256, True), (1, 512, True)):
        run = run_layer_alone(candidate, layer, TOKENS[:length], None, 512)
        checks = by_name(check_distance(run, reference, layer, 0.0))
        assert all(check.passed for check in checks.values()) == passes
        if not passes:
            where = checks["rel-L2 of one position"].where
            assert where is not None and int(where.split()[-1]) >= 256


def test_experts_are_taken_over_in_near_ties_and_no_further(tmp_path: Path) -> None:
    checkpoint = EXAMPLES / "tiny-qwen2-moe"
    target = open_target(export(checkpoint, tmp_path / "package").path)
    reference = Reference(target, checkpoint)
    router = router_choices(target.config, 4)[0]
    run = run_layer_alone(candidate_of(target), 0, TOKENS[:64], router, 64)
    assert run.experts is not None and run.experts.shape == (64, 3)
    others = run.experts.copy()
    others[5] = [e for e in range(12) if e not in others[5]][:3]
    choices = LayerRun(run.entry, run.end, others)
    assert all(c.passed for c in check_distance(choices, reference, 0, FP32_ROUTER_MARGIN))
    assert not all(c.passed for c in check_distance(choices, reference, 0, 1e9))


def test_hidden_states_of_any_part_are_fp32() -> None:
    assert as_array(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert as_array(np.ones(2, np.float16)).dtype == np.float32
    same = np.ones(2, np.float32)
    assert as_array(same) is same
