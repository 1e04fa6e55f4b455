"""Where an error starts: the rules, the sites, and the errors of targets that are right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenport.engines import start_onnxruntime
from qwenport.exporter import Package, export
from qwenport.validate import validate
from qwenport.validate.candidate import Candidate
from qwenport.validate.localisation import MUCH_MORE, TIMES_OWN, OperatorError, worst
from qwenport.validate.probe import Probe, run_layer
from qwenport.validate.reference import Reference
from qwenport.validate.sites import hidden_states, router_choices, sites
from qwenport.validate.target import open_target

MODELS = ("qwen2", "llama", "qwen2_moe", "qwen3_moe")

errors = st.floats(0, 1, allow_nan=False).map(lambda local: OperatorError("x", 0.0, local, 1e-7))


@given(st.lists(errors, max_size=12))
def test_the_first_that_stands_out_is_named_unless_a_later_one_does_much_more(
    found: list[OperatorError],
) -> None:
    index = worst(found)
    times = [error.local / 1e-7 for error in found]
    if not found or max(times) < TIMES_OWN:
        assert index is None
        return
    assert index is not None
    assert times[index] >= TIMES_OWN
    assert max(times) <= times[index] * MUCH_MORE * (1 + 1e-12)
    assert all(t < max(TIMES_OWN, max(times) / MUCH_MORE) * (1 + 1e-12) for t in times[:index])


def test_what_cannot_be_said_is_no_fault_and_nan_of_its_own_making_is() -> None:
    nan, inf = float("nan"), float("inf")
    fine, unknown = OperatorError("a", 0, 1e-7, 1e-7), OperatorError("b", nan, nan, 1e-7)
    broken = OperatorError("c", inf, inf, 1e-7)
    assert worst([fine, unknown]) is None
    assert worst([fine, unknown, broken]) == 2
    assert worst([]) is None


@pytest.fixture(scope="module", params=MODELS)
def package(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package]:
    folder = tmp_path_factory.mktemp(request.param)
    raw = checkpoints.mini(request.param, torch_dtype="float32")
    checkpoint = checkpoints.write_checkpoint(folder / "checkpoint", raw)
    return checkpoint, export(checkpoint, folder / "package", weights="copy")


def test_a_model_is_loaded_once_for_the_values_that_are_observed(
    package: tuple[Path, Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures are looked into one after the other; each session has its own cache and its own values."""
    loads: list[Path] = []

    def start(model: Any, folder: Path, **options: Any) -> Any:
        loads.append(folder)
        return start_onnxruntime(model, folder, **options)

    monkeypatch.setattr("qwenport.engines.onnxruntime_session.start_onnxruntime", start)
    _, made = package
    candidate = Candidate(open_target(made.path), layers=2, streamed=False)
    names = hidden_states(2)
    for rows in (1, 2, 3):
        plain, seen = (candidate.open([(rows, 8, lambda s: None)], o)[0] for o in ((), names))
        seen.prefill([[1, 2]] * rows)
        assert set(seen.observed) == set(names)
        assert plain.lengths.tolist() == [0] * rows
    assert len(loads) == 2
    candidate.open([(1, 8, lambda s: None)], names[:1])
    assert len(loads) == 3 and len(candidate._loaded) == 2


@pytest.mark.parametrize("judged_as", [None, "tensorrt-network"])
def test_every_site_is_a_value_that_the_graph_uses(
    package: tuple[Path, Package], judged_as: str | None
) -> None:
    _, made = package
    layers = made.config.num_hidden_layers
    target = open_target(made.path, judged_as=judged_as)
    candidate = Candidate(target, layers=layers, streamed=False)
    assert all(map(candidate.uses, hidden_states(layers)))
    assert all(map(candidate.uses, router_choices(made.config, layers).values()))
    for layer in range(layers):
        found = sites(made.config, layer)
        for index, site in enumerate(found):
            assert any(candidate.uses(f"model.layers.{layer}.{v}") for v in site.values), site.name
            before = {earlier.name for earlier in found[:index]} | {""}
            assert set(site.inputs) <= before
        assert len({site.name for site in found}) == len(found)
    assert not candidate.uses("model.layers.0.nothing")


def test_a_probe_without_values_sees_what_the_layer_computes(
    package: tuple[Path, Package],
) -> None:
    checkpoint, made = package
    reference = Reference(open_target(made.path), checkpoint)
    hidden = np.random.default_rng(1).standard_normal((7, made.config.hidden_size)).astype("f4")
    for index in range(reference.num_layers):
        with reference.layer(index, "fp32") as module:
            plain = run_layer(reference, module, hidden, 3, "fp32")
            probe = Probe(sites(made.config, index), {}, "fp32")
            with probe.attached(module):
                probed = run_layer(reference, module, hidden, 3, "fp32")
            again = run_layer(reference, module, hidden, 3, "fp32")
        assert torch.equal(plain, again)  # nothing is left attached
        assert torch.allclose(probed, plain, rtol=1e-5, atol=1e-6)
        assert set(probe.expected) == {site.name for site in sites(made.config, index)}
        assert torch.equal(probe.expected["second residual sum"], probed)
        norm = module.input_layernorm(torch.from_numpy(hidden))
        assert torch.equal(probe.expected["input_layernorm"], norm)
        assert torch.equal(probe.expected["self_attn.q_proj"], module.self_attn.q_proj(norm))


def test_a_value_that_is_given_is_what_the_next_operator_gets(
    package: tuple[Path, Package],
) -> None:
    checkpoint, made = package
    reference = Reference(open_target(made.path), checkpoint)
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((5, made.config.hidden_size)).astype("f4")
    norm = rng.standard_normal(hidden.shape).astype("f4")
    with reference.layer(0, "fp32") as module:
        probe = Probe(sites(made.config, 0), {"input_layernorm": norm}, "fp32")
        with probe.attached(module):
            run_layer(reference, module, hidden, 0, "fp32")
        own = module.input_layernorm(torch.from_numpy(hidden))
        follows = module.self_attn.k_proj(torch.from_numpy(norm))
    assert torch.equal(probe.expected["input_layernorm"], own)
    assert torch.equal(probe.expected["self_attn.k_proj"], follows)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"judged_as": "tensorrt-network"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_no_layer_of_a_target_that_is_right_stands_out(
    package: tuple[Path, Package], options: dict[str, Any]
) -> None:
    checkpoint, made = package
    report = validate(made.path, checkpoint, budget="quick", **options)
    assert report.passed, report.failures
    assert report.fault is None
    assert len(report.layers_error) == made.config.num_hidden_layers + 1
    for error in report.layers_error:
        assert all(math.isfinite(x) for x in (error.accumulated, error.local, error.own))
        assert error.times_own < TIMES_OWN / 2
