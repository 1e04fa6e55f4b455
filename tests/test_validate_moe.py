"""Parity of mixtures of experts: the bundled checkpoint holds, every seeded fault does not, choices are counted."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from defects import experts as moe_faults
from defects import norms_and_weights
from defects.tools import seed
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwenport.cli import main
from qwenport.exporter import export
from qwenport.validate.reference import Reference
from qwenport.validate.report import Report
from qwenport.validate.router_check import EDGES, Routing, compare_routing, router_values
from qwenport.validate.target import open_target
from qwenport.validate.thresholds import (
    FP32_ROUTER_MARGIN,
    HALF_NEAR_TIE_MARGIN,
    fp32_router_thresholds,
    half_router_thresholds,
)
from qwenport.validate.validation import judge, open_candidate

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-qwen2-moe"
LOGITS = frozenset({"prefill", "full cache", "decode", "chunked prefill", "ragged batch", "greedy"})

# what must fail, beside the logits of every scenario
FAULTS = {
    moe_faults.renormalised_weights: frozenset(),
    moe_faults.experts_swapped: frozenset(),
    moe_faults.gate_and_up_swapped: frozenset(),
    moe_faults.down_of_another_expert: frozenset(),
    moe_faults.routers_of_each_other_s_layers: frozenset({"routing"}),
    moe_faults.missing_shared_expert: frozenset({"routing"}),
    moe_faults.ungated_shared_expert: frozenset(),
    moe_faults.probabilities_left_out: frozenset(),
    norms_and_weights.dense_gate_and_up_swapped: frozenset(),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(CHECKPOINT, tmp_path_factory.mktemp("moe") / "package", weights="copy").path


@pytest.fixture(scope="module")
def reference(package: Path) -> Reference:
    return Reference(open_target(package), CHECKPOINT)


def _judge(path: Path, reference: Reference) -> Report:
    target = open_target(path)
    return judge(target, CHECKPOINT, reference, open_candidate(target))


def test_the_bundled_mixture_passes_and_its_choices_are_counted_by_margin(
    package: Path, reference: Reference, tmp_path: Path
) -> None:
    report = _judge(package, reference)
    assert report.passed, report.failures
    assert max(s.metrics.rel_l2 for s in report.scenarios if s.metrics is not None) <= 1e-5
    moe = open_target(package).config.moe
    assert moe is not None
    assert sum(band.choices for band in report.routing) == 80 * len(moe.layers)
    report.write(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert [band["choices"] for band in data["routing"]] == [b.choices for b in report.routing]
    assert "## Routing" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught(fault, package: Path, reference: Reference, tmp_path: Path) -> None:
    report = _judge(seed(package, tmp_path / "faulty", fault), reference)
    status = {scenario.name: scenario.status for scenario in report.scenarios}
    assert not report.passed
    assert {name for name in LOGITS | FAULTS[fault] if status[name] != "failed"} == set()


def test_the_reference_routes_as_its_own_softmax_says(reference: Reference) -> None:
    for logits, chosen in reference.routing(list(range(20))).values():
        probabilities = torch.softmax(torch.from_numpy(logits), dim=-1)
        expected = probabilities.topk(chosen.shape[1]).indices.sort().values
        assert torch.equal(expected, torch.from_numpy(chosen).sort().values)


def test_every_sparse_layer_has_a_value_to_observe(package: Path) -> None:
    target = open_target(package)
    assert target.package is not None
    assert target.config.moe is not None
    assert tuple(router_values(target.package)) == target.config.moe.layers


def test_the_command_says_how_many_choices_agree(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(package), "--reference", str(CHECKPOINT), "--quiet"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "routing" in line]
    assert line.startswith("passed")
    found = re.search(r"same experts in (\d+) of (\d+) choices", line)
    assert found is not None
    assert found[1] == found[2]


@given(
    st.integers(1, 4).flatmap(
        lambda layers: st.tuples(
            arrays(np.float32, (layers, 9), elements=st.floats(0, 2, width=32)),
            arrays(np.bool_, (layers, 9)),
        )
    )
)
def test_bands_count_every_choice_once_and_only_undisturbed_clear_ones_are_judged(drawn) -> None:
    margins, agrees = drawn
    routing = Routing(tuple(range(len(margins))), margins, agrees)
    bands = routing.bands()
    assert sum(band.choices for band in bands) == margins.size
    assert sum(band.agreeing for band in bands) == agrees.sum()
    assert all((band.least, band.most) in itertools.pairwise(EDGES) for band in bands)
    judged = np.array(
        [
            [
                margins[layer, token] >= FP32_ROUTER_MARGIN
                and not any(
                    margins[above, before] < FP32_ROUTER_MARGIN and not agrees[above, before]
                    for above in range(layer)
                    for before in range(token + 1)
                )
                for token in range(margins.shape[1])
            ]
            for layer in range(len(margins))
        ]
    )
    assert np.array_equal(routing.judged(FP32_ROUTER_MARGIN), judged)
    check = routing.check(fp32_router_thresholds())
    assert check.passed == (bool(judged.any()) and bool(agrees[judged].all()))


def test_a_token_that_gets_all_experts_is_in_the_last_band() -> None:
    routing = Routing((0,), np.full((1, 3), np.inf, dtype=np.float32), np.ones((1, 3), dtype=bool))
    (band,) = routing.bands()
    assert (band.choices, band.agreeing) == (3, 3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_half_precision_transformers_own_routing_passes(
    dtype: str, reference: Reference
) -> None:
    tokens = list(range(3, 90))
    expected = reference.routing(tokens)
    theirs = {layer: experts for layer, (_, experts) in reference.routing(tokens, dtype).items()}
    routing = compare_routing(theirs, expected)
    if dtype == "bf16":
        assert not routing.agrees.all()  # near-ties do fall the other way
    bounds = half_router_thresholds(routing.agreement(HALF_NEAR_TIE_MARGIN))
    assert routing.check(bounds).passed


def test_a_near_tie_in_the_first_layer_excuses_what_follows_from_it_and_nothing_else(
    package: Path, reference: Reference
) -> None:
    """Routers' choices themselves exchanged at one near-tie; later layers are then not judged, the first is."""
    target = open_target(package)
    assert target.config.moe is not None
    tokens = list(range(3, 60))
    expected = reference.routing(tokens)
    layers = target.config.moe.layers
    logits, experts = expected[layers[0]]
    tied = logits.copy()
    best = np.argsort(-tied[20])
    tied[20, best[3]] = tied[20, best[2]]  # of three chosen, the last is as likely as the next
    flipped = experts.copy()
    flipped[20] = [best[0], best[1], best[3]]
    chosen = {layer: choice.copy() for layer, (_, choice) in expected.items()}
    chosen[layers[0]] = flipped
    chosen[layers[1]][30, 0] = (set(range(12)) - set(chosen[layers[1]][30].tolist())).pop()
    near = {**expected, layers[0]: (tied, experts)}
    assert compare_routing(chosen, near).check(fp32_router_thresholds()).passed
    assert not compare_routing(chosen, expected).check(fp32_router_thresholds()).passed
    chosen[layers[1]][10, 0] = (set(range(12)) - set(chosen[layers[1]][10].tolist())).pop()
    assert (
        not compare_routing(chosen, near).check(fp32_router_thresholds()).passed
    )  # before the tie
