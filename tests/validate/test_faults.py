"""Every defect of the catalogue turns the verdict by its numbers alone, and the place named is where it is.

The faulty packages say that another version wrote them, so that nobody can tell the fault by comparing graphs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from defects.catalogue import ALWAYS_WRONG, AS_TRANSFORMERS, DEFECTS, RUN_DEPENDENT, Defect
from defects.defect import EXACT_NETWORK, NETWORK, PACKAGE
from defects.tools import seed

from qwenport.exporter import export
from qwenport.validate import Report, validate
from qwenport.validate.rounding import END
from qwenport.validate.scenarios import SCENARIOS

from .bundled import WAYS, failing, row, status

LOGITS = {scenario.name for scenario in SCENARIOS} - {"past original context"}
AT_THE_END = {"rope tables", "end of context"}
IDENTITY = {"weights", "files"}  # some defects bring weights, or constants of another type, along
ROUNDING_ROWS = {"constants", "rounding of layers", "rounding of operators", "in bf16"}

# room that defects do not need: what is always wrong is wrong in a short context, and found in less time
SMALL = {"max_seq_len": 96, "max_batch": 2}


@dataclass(frozen=True)
class Seen:
    """Rows that fail, and rows that pass."""

    fails: frozenset[str]
    passes: frozenset[str] = frozenset()


def seen(fails: set[str], passes: set[str] = frozenset()) -> Seen:  # type: ignore[assignment]
    return Seen(frozenset(fails), frozenset(passes))


# defect -> what tells it from others; of all others only the verdict is asked
SEEN_BY = {
    "causal_from_the_upper_left": seen({"decode", "chunked prefill", "batches"}, {"prefill"}),
    "rope_restarts_every_step": seen({"decode", "chunked prefill", "batches"}, {"prefill"}),
    "rows_share_the_first_rows_slots": seen({"batches"}, {"prefill", "decode", "greedy"}),
    "wrong_last_rope_row": seen(AT_THE_END, {"prefill", "decode", "embedding"}),
    "yarn_without_attention_factor": seen({"rope tables", "prefill", "past original context"}),
    "yarn_without_floor_and_ceil": seen({"rope tables", "prefill", "past original context"}),
    "linear_scaling_ignored": seen({"rope tables", "prefill"}),
    "routers_of_each_other_s_layers": seen({"routing", "prefill"}, {"rope tables"}),
    "one_expert_too_few": seen({"routing", "prefill"}, {"rope tables"}),
    # of the last layer with experts: no router comes after it
    "down_of_another_expert": seen({"prefill"}, {"routing"}),
    "embedding_row_off_by_one": seen({"embedding", "prefill"}, {"rope tables"}),
    "highest_id_out_of_reach": seen({"embedding", "token ids"}, {"prefill", "decode"}),
    "last_row_of_a_full_batch_writes_less": seen({"batches", "wide batch"}, {"prefill", "decode"}),
    "mask_counts_slots_instead_of_positions": seen({"end of context"}, {"prefill", "batches"}),
    "smaller_caches_damped": seen({"cache of 64", "cache of 192"}, {"prefill", "decode"}),
    "window_of_1024_in_one_layer": seen(
        {"distance of layer 2"}, {"prefill", "last logits", "decode", "batches"}
    ),
    "several_positions_picked_in_reverse": seen({"chosen logits"}, {"prefill", "last logits"}),
    "two_positions_picked_from_the_first_row": seen({"chosen logits"}, {"prefill", "batches"}),
}

# defect -> the operator that must be named
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
    "cache_slot_off_by_one": "self_attn.attention",
    "rows_share_the_first_rows_slots": "self_attn.attention",
    "cache_of_another_layer": "self_attn.attention",
    "values_not_written": "self_attn.attention",
    "rope_restarts_every_step": "self_attn.rope of queries",
    "key_positions_off_by_one": "self_attn.rope of keys",
    "skipped_layer": "the layer as a whole",
    "second_residual_from_the_layers_input": "second residual sum",
    "residual_after_the_norm": "first residual sum",
    "sigmoid_for_silu": "mlp.silu(gate) * up",
    "embedding_row_off_by_one": "embed_tokens",
    "logits_of_the_position_before": END,
    "swapped_head_rows": END,
    "changed_row_in_a_copy_of_the_tied_head": END,
    "one_nan": END,
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
    "last_position_picked_whatever_was_asked": END,
    "steps_of_65_to_127_turned": "self_attn.rope of queries",
    "rows_from_four_on_read_four_rows_before": "self_attn.attention",
    "keys_of_the_last_quarter_turned": "self_attn.rope of keys",
    "spans_of_129_to_320_damp_queries": "self_attn.rope of queries",
    "window_of_100_in_one_layer": "self_attn.attention",
    "one_token_looked_up_as_another": "embed_tokens",
    "one_token_is_nan": "embed_tokens",
    "highest_id_out_of_reach": "embed_tokens",
    "last_expert_ignored": "mlp.router",
    "one_expert_without_weights": "mlp.experts",
    "slots_behind_the_span_leak": "self_attn.attention",
    "a_key_left_behind_is_seen": "self_attn.attention",
    "query_projection_in_8_pieces": "self_attn.q_proj",
    "down_projection_in_16_pieces": "mlp.down_proj",
    "norm_in_bf16": "post_attention_layernorm",
    "hidden_states_of_6_bits": "second residual sum",
}

# one or two of each family in the fast tests, each in one form
FAST = {
    ("wrong_epsilon_in_one_norm", PACKAGE),
    ("missing_bias", EXACT_NETWORK),
    ("causal_from_the_upper_left", PACKAGE),
    ("values_not_written", EXACT_NETWORK),
    ("rope_restarts_every_step", PACKAGE),
    ("wrong_last_rope_row", PACKAGE),
    ("skipped_layer", PACKAGE),
    ("embedding_row_off_by_one", PACKAGE),
    ("unknown_operator", EXACT_NETWORK),
    ("one_expert_too_few", PACKAGE),
    ("several_positions_picked_in_reverse", PACKAGE),
    ("steps_of_65_to_127_turned", PACKAGE),
    ("last_row_of_a_full_batch_writes_less", PACKAGE),
    ("rows_from_four_on_read_four_rows_before", PACKAGE),
    ("mask_counts_slots_instead_of_positions", PACKAGE),
    ("span_of_192_loses_its_last_block", PACKAGE),
    ("smaller_caches_damped", PACKAGE),
    ("window_of_100_in_one_layer", PACKAGE),
    ("highest_id_out_of_reach", PACKAGE),
    ("last_expert_ignored", PACKAGE),
    ("slots_behind_the_span_leak", PACKAGE),
    ("a_key_left_behind_is_seen", PACKAGE),
    ("query_projection_in_8_pieces", NETWORK),
}
# what only a longer context or more steps show
NEEDS_STANDARD = {d.name for d in RUN_DEPENDENT} - {name for name, _ in FAST}

Healthy = Callable[[Defect], tuple[Path, Path]]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """(checkpoint that a defect is made for, its package without the defect); made once."""
    made: dict[tuple[object, ...], tuple[Path, Path]] = {}

    def package(defect: Defect) -> tuple[Path, Path]:
        config = json.dumps(dict(defect.config))
        small = defect.family != "tables" and defect not in RUN_DEPENDENT
        key = (defect.checkpoint, config, defect.rope_scaling, defect.dtype, small)
        if key not in made:
            folder = tmp_path_factory.mktemp(defect.name)
            checkpoint = defect.write_checkpoint(folder / "checkpoint")
            wanted: dict[str, Any] = SMALL if small else {}
            exported = export(
                checkpoint,
                folder / "package",
                rope_scaling=defect.rope_scaling,
                dtype=defect.dtype,
                weights="link" if defect.dtype else "copy",
                **wanted,
            )
            made[key] = checkpoint, exported.path
        return made[key]

    return package


def cases() -> list[Any]:
    """Every twelfth defect in one of its forms, in turn; benchmarks/sensitivity.py judges all in all."""
    every = [(d, d.forms[i % len(d.forms)]) for i, d in enumerate(DEFECTS)]
    listed = {(defect.name, form) for defect, form in every}
    fast = [(d, form) for d in DEFECTS for form in d.forms if (d.name, form) in FAST - listed]
    every += fast
    assert {(defect.name, form) for defect, form in every} >= FAST
    return [
        pytest.param(
            defect,
            form,
            id=f"{defect.name}, {form}",
            marks=() if (defect.name, form) in FAST else pytest.mark.slow,
        )
        for index, (defect, form) in enumerate(every)
        if index % 12 == 0 or (defect.name, form) in FAST
    ]


def test_the_fast_tests_have_a_defect_of_every_family() -> None:
    families = {defect.name: defect.family for defect in DEFECTS}
    assert {families[name] for name, _ in FAST} == set(families.values())
    assert OPERATORS.keys() | SEEN_BY.keys() <= families.keys()


@pytest.mark.parametrize(("defect", "form"), cases())
def test_a_defect_is_caught_and_placed(
    defect: Defect, form: str, healthy: Healthy, tmp_path: Path
) -> None:
    checkpoint, package = healthy(defect)
    budget = "standard" if defect.name in NEEDS_STANDARD else "quick"
    faulty = seed(package, tmp_path / "faulty", defect.change)
    report = validate(faulty, checkpoint, **WAYS[form], budget=budget)
    assert report.complete and not report.passed and report.failures
    assert report.verdict.startswith("parity does NOT hold: ")
    graph = row(report, "graph")
    assert graph.status == "not run" and "judged by numbers alone" in (graph.reason or "")
    found = SEEN_BY.get(defect.name, seen(set()))
    assert found.fails <= failing(report)
    by_numbers = failing(report) - IDENTITY
    assert by_numbers, "bytes alone show it"
    assert {name for name in found.passes if status(report)[name] == "failed"} == set()
    if form == NETWORK:
        assert by_numbers <= ROUNDING_ROWS
    _assert_placed(defect, form, report)
    report.write(tmp_path / "report")


def _assert_placed(defect: Defect, form: str, report: Report) -> None:
    if report.coverage is None:  # TensorRT's parser refused it
        assert failing(report) == {"parsed network"}
        return
    if not failing(report) & LOGITS and form != NETWORK:
        return  # a complaint about the network, which does what is right
    assert report.fault is not None or report.unexplained is not None
    if defect.layers is not None:
        assert report.fault is not None and report.fault.layer in defect.layers
    if defect.name in OPERATORS:
        assert report.fault is not None and report.fault.operator == OPERATORS[defect.name]
    if report.fault is not None and report.fault.scenario in LOGITS:
        assert status(report)[report.fault.scenario] == "failed"
        assert report.fault.operator in report.fault.text


@pytest.mark.parametrize("name", ["missing_bias", "norm_in_bf16", "highest_id_out_of_reach"])
def test_without_saying_another_version_the_graph_itself_gives_it_away(
    name: str, healthy: Healthy, tmp_path: Path
) -> None:
    """Node for node, whatever the numbers say: in fp32 the package of a norm in bf16 passes all else."""
    (defect,) = [defect for defect in DEFECTS if defect.name == name]
    checkpoint, package = healthy(defect)
    faulty = seed(package, tmp_path / "faulty", defect.change, other_version=False)
    report = validate(faulty, checkpoint, budget="quick", streamed=True, layers=1)
    assert not report.passed and "graph" in failing(report)
    assert "differences from the exporter's graph" in row(report, "graph").failures[0]


@pytest.mark.slow
@pytest.mark.parametrize("defect", AS_TRANSFORMERS, ids=lambda defect: defect.name)
def test_rounding_that_transformers_has_itself_is_not_accused(
    defect: Defect, healthy: Healthy, tmp_path: Path
) -> None:
    checkpoint, package = healthy(defect)
    faulty = seed(package, tmp_path / "faulty", defect.change)
    report = validate(faulty, checkpoint, **WAYS[NETWORK], budget="quick")
    assert not failing(report) & (ROUNDING_ROWS - {"constants"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("missing_bias", f"{NETWORK}, exact"),
        ("renormalised_weights", PACKAGE),
        ("yarn_without_floor_and_ceil", NETWORK),
        ("router_logits_in_bf16", NETWORK),
    ],
)
def test_the_same_copy_without_a_defect_passes(
    name: str, form: str, healthy: Healthy, tmp_path: Path
) -> None:
    (defect,) = [defect for defect in ALWAYS_WRONG if defect.name == name]
    checkpoint, package = healthy(defect)
    copy = seed(package, tmp_path / "copy", lambda model: None)
    report = validate(copy, checkpoint, **WAYS[form], budget="quick")
    assert report.passed, report.failures
    assert report.fault is None and status(report)["graph"] == "not run"
