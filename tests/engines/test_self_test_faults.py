"""The self-test catches every fault of the catalogue: in the session's steps, and in the graph that it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from defects.catalogue import ALWAYS_WRONG, RUN_DEPENDENT
from defects.defect import DENSE, MIXTURE, PACKAGE, Defect
from defects.tools import seed

from qwenport import engines
from qwenport.engines import run_proof
from qwenport.engines.self_test import IN_FP32

from .proofs import Proven
from .proofs import proven as proven
from .session_faults import FAULTS, Fault, bucket_of_the_start, inject

Proofs = Callable[[str], Proven]

NOT_IN_THE_ENGINE = {"scores_in_fp16"}
"""Lowered for the CPU, where everything is fp32, the engine has no such cast."""
# Kernels of a package that is exported as it is; what needs another config has another proof.
GRAPH_FAULTS = tuple(
    d
    for d in ALWAYS_WRONG
    if PACKAGE in d.forms
    and not (d.config or d.rope_scaling or d.dtype or d.name in NOT_IN_THE_ENGINE)
)
DEPENDENT = tuple(
    d for d in RUN_DEPENDENT if PACKAGE in d.forms and not (d.config or d.rope_scaling)
)
RUNTIME_FAILS = {"cache_slot_off_by_one", "short_rope_table"}
"""onnxruntime notices them, where a kernel on a GPU reads or writes elsewhere."""
NOT_IN_THE_PROOF = {
    # a self-test asks for one position per row
    "several_positions_picked_in_reverse",
    "two_positions_picked_from_the_first_row",
    "logits_beyond_64_repeat_the_64th",
    # a token, a place, a capacity or a neighbour that no case has
    "joining_rows_lose_their_first_token",
    "first_decode_beside_a_prefill_damped",
    "decoding_from_340_to_350_damped",
    "mask_counts_slots_instead_of_positions",
    "second_token_of_a_block_turned",
    "smaller_caches_damped",
    "a_cache_of_64_slots_turned",
    "a_cache_of_320_slots_damped",
    "one_token_looked_up_as_another",
    "highest_id_out_of_reach",
    "one_token_damped_inside",
    "one_token_is_zero",
    "one_token_is_nan",
    "special_tokens_are_zero",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("checkpoint", [DENSE, pytest.param(MIXTURE, marks=pytest.mark.slow)])
def test_fault_of_a_step_is_caught(checkpoint: str, fault: Fault, proven: Proofs) -> None:
    found = proven(checkpoint)
    session = found.new_session()
    inject(session, fault)
    result = run_proof(session, found.proof, IN_FP32)
    assert not result.passed
    assert result.worst > 2  # no fault is at the edge of what is allowed


def test_healthy_engines_pass(proven: Proofs) -> None:
    for checkpoint in (DENSE, MIXTURE):
        found = proven(checkpoint)
        result = run_proof(found.new_session(), found.proof, IN_FP32)
        assert result.passed and result.worst < 0.5
        assert (result.cases, result.left_out) == (len(found.proof.cases), 0)


def test_failure_names_the_call_row_position_and_span(proven: Proofs) -> None:
    """A span that a step outgrows: first wrong at the first token after its edge."""
    found = proven(DENSE)
    session = found.new_session()
    inject(session, bucket_of_the_start)
    (first, *_) = run_proof(session, found.proof, IN_FP32).failures
    assert (first.case, first.row, first.position, first.span) == (
        "span edges up to 128",
        0,
        64,
        128,
    )
    operation = found.proof.operations
    (fed,) = [o for o in operation if o.call == first.call]
    assert (fed.sequence, fed.end) == (first.sequence, 65)


@pytest.mark.slow
@pytest.mark.parametrize("defect", GRAPH_FAULTS, ids=lambda defect: defect.name)
def test_fault_of_a_graph_is_caught(defect: Defect, proven: Proofs, tmp_path: Path) -> None:
    """The engine is built from the faulty graph, the proof is the healthy package's."""
    if defect.name in RUNTIME_FAILS:
        with pytest.raises(engines.EngineError, match="the runtime fails: "):
            _self_test(defect, proven, tmp_path)
        return
    result = _self_test(defect, proven, tmp_path)
    assert not result.passed
    assert result.worst > 2


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEPENDENT, ids=lambda defect: defect.name)
def test_fault_that_depends_on_the_way_of_running(
    defect: Defect, proven: Proofs, tmp_path: Path
) -> None:
    """They are contrived to hide; validate finds them all, a self-test of two seconds most of them."""
    caught = not _self_test(defect, proven, tmp_path).passed
    assert caught == (defect.name not in NOT_IN_THE_PROOF)


def test_there_are_enough_faults() -> None:
    assert len({*FAULTS}) >= 20
    assert len(GRAPH_FAULTS) >= 20
    assert {defect.name for defect in DEPENDENT} > NOT_IN_THE_PROOF


def _self_test(defect: Defect, proven: Proofs, folder: Path) -> engines.SelfTest:
    healthy = proven(defect.checkpoint)
    if (
        defect.family == "tables"
    ):  # cut for an engine only where they lie outside the graph: changed after that
        model = ir.load(healthy.engine.model)
        defect.change(model)
        return _run(healthy, healthy.engine, ir.to_proto(model).SerializeToString())
    faulty = seed(healthy.package.path, folder / "package", defect.change)
    (faulty / "proof.safetensors").unlink()
    engine = engines.build(faulty, folder / "engine", target="onnxruntime")
    return _run(healthy, engine, str(engine.model))


def _run(healthy: Proven, engine: engines.Engine, model: bytes | str) -> engines.SelfTest:
    session = engines.OnnxRuntimeSession(
        engine,
        max_batch=engine.manifest["max_batch"],
        load=lambda: engines.start_onnxruntime(model, engine.path, threads=1),
    )
    return run_proof(session, healthy.proof, IN_FP32)
