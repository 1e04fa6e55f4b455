"""Every defect of the catalogue turns the verdict, where it is to be seen, and the place named is where it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from defects.catalogue import DEFECTS, Defect
from defects.tools import seed

from qwenport.exporter import export
from qwenport.validate import Report, validate
from qwenport.validate.scenarios import SCENARIOS

PACKAGE: dict[str, Any] = {}
NETWORK: dict[str, Any] = {"judged_as": "tensorrt-network", "exact": True}

LOGITS = frozenset(scenario.name for scenario in SCENARIOS) - {"past original context"}
EXTENDED = LOGITS | {"past original context"}
CACHED = LOGITS - {"prefill"}
TABLES = frozenset({"rope tables"})
AT_THE_END = frozenset({"full cache", "end of context"})

# defect -> (scenarios that must fail, scenarios that must pass); all others fail all logits
SEEN_BY = {
    "causal_from_the_upper_left": (CACHED, TABLES | {"prefill"}),
    "rope_restarts_every_step": (CACHED, TABLES | {"prefill"}),
    "rows_share_the_first_rows_slots": (
        frozenset({"ragged batch"}),
        TABLES | LOGITS - {"ragged batch"},
    ),
    # it takes the second token of a context for that of a step
    "second_token_overwritten": (LOGITS - {"end of context"}, TABLES | {"end of context"}),
    "short_rope_table": (TABLES | AT_THE_END, LOGITS - AT_THE_END),
    # attention sees differences of positions: only the last row, which stays, is another distance away
    "shifted_rope_table": (TABLES | AT_THE_END, LOGITS - AT_THE_END),
    "wrong_last_rope_row": (TABLES | AT_THE_END, LOGITS - AT_THE_END),
    "yarn_without_attention_factor": (TABLES | EXTENDED, frozenset()),
    "yarn_without_floor_and_ceil": (TABLES | EXTENDED, frozenset()),
    "llama3_scaling_taken_for_default": (TABLES | EXTENDED, frozenset()),
    # a config that says linear has the longer context already
    "linear_scaling_ignored": (TABLES | LOGITS, frozenset()),
    "routers_of_each_other_s_layers": (LOGITS | {"routing"}, TABLES),
    "missing_shared_expert": (LOGITS | {"routing"}, TABLES),
    "one_expert_too_few": (LOGITS | {"routing"}, TABLES),
    "one_expert_too_many": (LOGITS | {"routing"}, TABLES),
    # of the last layer with experts: no router comes after it
    "down_of_another_expert": (LOGITS, TABLES | {"routing"}),
}
OF_A_NETWORK = {
    # the parser knows an operator of this name, never looks into the function, and happens to do what is right
    "interleaved_rope": (frozenset({"parsed network"}), TABLES | LOGITS),
}

# defect -> the operator that must be named, where it is one
OPERATORS = {
    "wrong_epsilon_in_one_norm": "input_layernorm",
    "norm_without_weight": "input_layernorm",
    "norm_subtracts_the_mean": "post_attention_layernorm",
    "missing_bias": "self_attn.v_proj",
    "doubled_bias": "self_attn.q_proj",
    "query_bias_on_key": "self_attn.k_proj",
    "swapped_key_and_value_weights": "self_attn.k_proj",
    "swapped_query_and_key_weights": "self_attn.q_proj",
    "transposed_weight": "self_attn.o_proj",
    "causal_from_the_upper_left": "self_attn.attention",
    "doubled_attention_scale": "self_attn.attention",
    "swapped_kv_heads": "self_attn.attention",
    "scores_in_fp16": "self_attn.o_proj",  # attention is written out there, and has no name
    "cache_slot_off_by_one": "self_attn.attention",
    "rows_share_the_first_rows_slots": "self_attn.attention",
    "cache_of_another_layer": "self_attn.attention",
    "values_not_written": "self_attn.attention",
    "rope_restarts_every_step": "self_attn.rope of queries",
    "key_positions_off_by_one": "self_attn.rope of keys",
    "short_rope_table": "rope tables",
    "skipped_layer": "the layer as a whole",
    "second_residual_from_the_layers_input": "second residual sum",
    "residual_after_the_norm": "first residual sum",
    "sigmoid_for_silu": "mlp.silu(gate) * up",
    "embedding_row_off_by_one": "embed_tokens",
    "logits_of_the_position_before": "final norm and lm_head",
    "swapped_head_rows": "final norm and lm_head",
    "changed_row_in_a_copy_of_the_tied_head": "final norm and lm_head",
    "one_nan": "final norm and lm_head",
    "dense_gate_and_up_swapped": "mlp.gate_proj",
    "renormalised_weights": "mlp.router",
    "one_expert_too_few": "mlp.router",
    "one_expert_too_many": "mlp.router",
    "router_logits_in_bf16": "mlp.router",
    "experts_swapped": "mlp.experts",
    "experts_shifted_by_one": "mlp.experts",
    "gate_and_up_swapped": "mlp.experts",
    "down_of_another_expert": "mlp.experts",
    "routers_of_each_other_s_layers": "mlp.gate",
    "ungated_shared_expert": "mlp",
    "probabilities_left_out": "mlp.experts",
}

# one of each kind in the fast tests
FAST_AS_PACKAGE = {
    "wrong_epsilon_in_one_norm", "missing_bias", "causal_from_the_upper_left", "scores_in_fp16",
    "rows_share_the_first_rows_slots", "cache_of_another_layer", "key_positions_off_by_one",
    "wrong_last_rope_row", "yarn_without_floor_and_ceil", "skipped_layer", "one_nan",
    "embedding_row_off_by_one", "unknown_operator", "one_expert_too_few", "down_of_another_expert",
}  # fmt: skip
FAST_AS_NETWORK = {
    "values_not_written", "rope_restarts_every_step", "interleaved_rope", "unknown_operator",
    "changed_row_in_a_copy_of_the_tied_head", "routers_of_each_other_s_layers",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and parallel test workers would fight over cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Healthy = Callable[[Defect], tuple[Path, Path]]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """The checkpoint that a defect is made for, and its package without the defect; made once."""
    made: dict[tuple[object, ...], tuple[Path, Path]] = {}

    def package(defect: Defect) -> tuple[Path, Path]:
        config = json.dumps(dict(defect.config))
        key = (defect.checkpoint, config, defect.rope_scaling, defect.dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(defect.name)
            checkpoint = defect.write_checkpoint(folder / "checkpoint")
            exported = export(
                checkpoint,
                folder / "package",
                rope_scaling=defect.rope_scaling,
                dtype=defect.dtype,
                weights="link" if defect.dtype else "copy",
            )
            made[key] = checkpoint, exported.path
        return made[key]

    return package


def cases(fast: set[str]) -> list[Any]:
    assert fast <= {defect.name for defect in DEFECTS}
    return [
        pytest.param(d, id=d.name, marks=() if d.name in fast else pytest.mark.slow)
        for d in DEFECTS
    ]


def assert_caught(
    defect: Defect, report: Report, seen_by: dict[str, tuple[frozenset[str], frozenset[str]]]
) -> None:
    assert report.complete and not report.passed and report.failures
    fails, passes = seen_by.get(defect.name, (LOGITS, frozenset()))
    status = {scenario.name: scenario.status for scenario in report.scenarios}
    assert {name for name in fails if status[name] != "failed"} == set()
    assert {name for name in passes if status[name] != "passed"} == set()
    if not fails & EXTENDED:
        assert report.fault is None  # nothing to be seen in a run
        return
    if defect.layers is not None:
        assert report.fault is not None and report.fault.layer in defect.layers
    if defect.name in OPERATORS:
        assert report.fault is not None and report.fault.operator == OPERATORS[defect.name]
    if report.fault is not None and report.fault.scenario in EXTENDED:
        assert status[report.fault.scenario] == "failed"
        assert report.fault.operator in report.fault.text


@pytest.mark.parametrize("defect", cases(FAST_AS_PACKAGE))
def test_a_defect_of_a_package_is_caught_and_placed(
    defect: Defect, healthy: Healthy, tmp_path: Path
) -> None:
    checkpoint, package = healthy(defect)
    report = validate(seed(package, tmp_path / "faulty", defect.change), checkpoint, **PACKAGE)
    assert_caught(defect, report, SEEN_BY)
    report.write(tmp_path / "report")


@pytest.mark.parametrize("defect", cases(FAST_AS_NETWORK))
def test_a_defect_of_a_network_is_caught_and_placed(
    defect: Defect, healthy: Healthy, tmp_path: Path
) -> None:
    checkpoint, package = healthy(defect)
    report = validate(seed(package, tmp_path / "faulty", defect.change), checkpoint, **NETWORK)
    assert_caught(defect, report, SEEN_BY | OF_A_NETWORK)
    report.write(tmp_path / "report")


@pytest.mark.parametrize("how", [PACKAGE, NETWORK], ids=["package", "network"])
@pytest.mark.parametrize(
    "name",
    [
        "missing_bias",
        pytest.param("renormalised_weights", marks=pytest.mark.slow),
        pytest.param("yarn_without_floor_and_ceil", marks=pytest.mark.slow),
        pytest.param("linear_scaling_ignored", marks=pytest.mark.slow),
        pytest.param("llama3_scaling_taken_for_default", marks=pytest.mark.slow),
        pytest.param("router_logits_in_bf16", marks=pytest.mark.slow),
    ],
)
def test_the_same_copy_without_a_defect_passes(
    name: str, how: dict[str, Any], healthy: Healthy, tmp_path: Path
) -> None:
    (defect,) = [defect for defect in DEFECTS if defect.name == name]
    checkpoint, package = healthy(defect)
    report = validate(seed(package, tmp_path / "copy", lambda model: None), checkpoint, **how)
    assert report.passed, report.failures
    assert report.fault is None
