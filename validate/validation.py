"""`validate`: open both sides, run every scenario, judge, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwenport.validate.environment import describe_environment
from qwenport.validate.metrics import Metrics, compare
from qwenport.validate.prompts import Prompts, make_prompts
from qwenport.validate.report import Check, Report, ScenarioResult, Status
from qwenport.validate.rope_check import check_tables
from qwenport.validate.router_check import (
    Routing,
    compare_routing,
    observe_routing,
    router_values,
    routing_text,
)
from qwenport.validate.scenarios import (
    RAGGED_ROWS,
    SCENARIOS,
    Bench,
    CandidateError,
    NotApplicable,
    Observation,
    Scenario,
    capacity_for,
    greedy_request,
)
from qwenport.validate.target import Target, check_source, open_target
from qwenport.validate.thresholds import (
    HALF_NEAR_TIE_MARGIN,
    Thresholds,
    fp32_router_thresholds,
    fp32_thresholds,
    half_router_thresholds,
    half_thresholds,
)

if TYPE_CHECKING:
    from qwenport.engines import Session
    from qwenport.validate.reference import Reference

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""

ROPE_TABLES, ROUTING = "rope tables", "routing"


def validate(
    target: Path,
    reference: Path,
    *,
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Hold a package or an engine against transformers on the checkpoint it was made from.

    Args:
        target: a package or engine directory.
        reference: the checkpoint directory, the oracle's only source.
        device: where a package runs: "cpu" (in fp32, the strictest) or "cuda" (in its own dtype).
        progress: called with (what, done, total).

    Returns:
        The report; `passed` is the verdict. A target that fails while it runs fails its scenario.

    Raises:
        ValidationError: the question makes no sense: not a package, or made from another checkpoint.
        PackageError, EngineError, CheckpointError, ConfigError: a side is damaged.
        MissingExtraError, SessionError: the target cannot run here.
    """
    from qwenport.validate.reference import Reference

    opened = open_target(target, device)
    check_source(opened, reference)
    candidate = open_candidate(
        opened
    )  # first: what cannot run here need not wait for the reference
    progress("loading the reference", 0, 1)
    oracle = Reference(opened, reference)
    progress("loading the reference", 1, 1)
    return judge(opened, reference, oracle, candidate, progress=progress)


def judge(
    target: Target,
    reference_path: Path,
    reference: Reference,
    candidate: tuple[Session | None, str],
    *,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Run every scenario of `target` against a loaded reference; `candidate` as `open_candidate` gives it."""
    session, failure = candidate
    prompts = make_prompts(reference_path, target.config.vocab_size)
    total = len(SCENARIOS) + (1 if target.config.moe is None else 2)
    progress(ROPE_TABLES, 0, total)
    results = [_judge_tables(target, reference)]
    own_rounding = reference.own_rounding(*greedy_request(prompts, capacity_for(target.capacity)))
    for done, scenario in enumerate(SCENARIOS, start=1):
        progress(scenario.name, done, total)
        if session is None:
            results.append(
                ScenarioResult(scenario.name, scenario.summary, "failed", reason=failure)
            )
            continue
        bench = Bench(session, reference, prompts)
        results.append(judge_scenario(scenario, bench, target.compute_dtype, own_rounding))
    routing = None
    if target.config.moe is not None:
        progress(ROUTING, total - 1, total)
        result, routing = _judge_routing(target, session, failure, reference, prompts)
        results.append(result)
    progress("done", total, total)
    return Report(
        target=str(target.path),
        reference=str(reference_path),
        target_kind=target.kind,
        target_dtype=target.dtype,
        reference_weights=reference.weights_note,
        prompts=prompts.description,
        own_rounding=own_rounding,
        cache_slots=0 if session is None else session.capacity,
        max_seq_len=target.capacity,
        scenarios=tuple(results),
        routing=() if routing is None else routing.bands(),
        environment=describe_environment(target.kind),
        hashes=target.hashes(),
    )


def open_candidate(target: Target) -> tuple[Session | None, str]:
    """The session to judge, or None and why the runtime does not take the target's graph.

    Raises:
        MissingExtraError, SessionError, EngineError: the target cannot run here, whatever it computes.
    """
    from qwenport import QwenportError
    from qwenport.engines import OnnxRuntimeSession, open_session

    rows, capacity = min(RAGGED_ROWS, target.max_batch), capacity_for(target.capacity)
    try:
        if target.package is None:
            return open_session(target.path, max_batch=rows, capacity=capacity), ""
        observe = tuple(router_values(target.package).values())
        session = OnnxRuntimeSession(
            target.package, max_batch=rows, capacity=capacity, device=target.device, observe=observe
        )
        return session, ""
    except QwenportError:
        raise  # it cannot run here, which says nothing about parity
    except Exception as error:  # a runtime that refuses the graph is a verdict on the graph
        return None, f"the target does not load: {type(error).__name__}: {error}"


def _judge_tables(target: Target, reference: Reference) -> ScenarioResult:
    summary = "Every row of cos and sin against transformers' rotary module"
    if target.package is None:
        why = "an engine's tables are inside its plan; its logits show them"
        return ScenarioResult(ROPE_TABLES, summary, "not run", reason=why)
    started = time.monotonic()
    checks = check_tables(target.package, reference)
    status: Status = "passed" if all(check.passed for check in checks) else "failed"
    return ScenarioResult(
        ROPE_TABLES, summary, status, checks, seconds=round(time.monotonic() - started, 3)
    )


def _judge_routing(
    target: Target,
    session: Session | None,
    failure: str,
    reference: Reference,
    prompts: Prompts,
) -> tuple[ScenarioResult, Routing | None]:
    from qwenport.engines import OnnxRuntimeSession

    summary = "Each token's experts against transformers' routers, in prefill and decode"
    if target.package is None:
        why = "an engine's routers are inside its plan; its logits show them"
        return ScenarioResult(ROUTING, summary, "not run", reason=why), None
    if not isinstance(session, OnnxRuntimeSession):
        return ScenarioResult(ROUTING, summary, "failed", reason=failure), None
    started = time.monotonic()
    try:
        tokens = routing_text(session, prompts)
        chosen = observe_routing(session, router_values(target.package), tokens)
    except Exception as error:  # whatever the runtime raises is the target's failure, not ours
        reason = f"the target raised {type(error).__name__}: {error}"
        return ScenarioResult(ROUTING, summary, "failed", reason=reason), None
    expected = reference.routing(tokens)
    routing = compare_routing(chosen, expected)
    bounds = fp32_router_thresholds()
    if (dtype := target.compute_dtype) != "fp32":
        theirs = {
            layer: experts for layer, (_, experts) in reference.routing(tokens, dtype).items()
        }
        own = compare_routing(theirs, expected).agreement(HALF_NEAR_TIE_MARGIN)
        bounds = half_router_thresholds(own)
    check = routing.check(bounds)
    seconds = round(time.monotonic() - started, 3)
    status: Status = "passed" if check.passed else "failed"
    return ScenarioResult(ROUTING, summary, status, (check,), seconds=seconds), routing


def judge_scenario(
    scenario: Scenario, bench: Bench, compute_dtype: str, own_rounding: float
) -> ScenarioResult:
    """Run one scenario and hold its metrics against their bounds. A target that raises has failed it.

    Args:
        compute_dtype: what the target computes in, "fp32", "bf16" or "fp16".
        own_rounding: see `thresholds.fp32_thresholds`.
    """
    started = time.monotonic()

    def result(
        status: Status,
        checks: tuple[Check, ...] = (),
        metrics: Metrics | None = None,
        reason: str | None = None,
    ) -> ScenarioResult:
        seconds = round(time.monotonic() - started, 3)
        return ScenarioResult(
            scenario.name,
            scenario.summary,
            status,
            checks,
            metrics,
            reason,
            seconds,
        )

    try:
        observation = scenario.run(bench)
    except CandidateError as error:
        return result("failed", reason=str(error))
    except NotApplicable as reason:
        return result("not run", reason=str(reason))
    if observation.candidate.shape != observation.reference.shape:
        shapes = f"{observation.candidate.shape}, expected {observation.reference.shape}"
        return result("failed", reason=f"the target gave logits of shape {shapes}")
    bounds = _bounds(scenario, bench, compute_dtype, own_rounding, observation)
    metrics = compare(
        observation.candidate, observation.reference, near_tie_margin=bounds.near_tie_margin
    )
    checks = checks_of(metrics, bounds, observation)
    passed = all(check.passed for check in checks)
    return result("passed" if passed else "failed", checks, metrics)


def _bounds(
    scenario: Scenario, bench: Bench, dtype: str, own_rounding: float, observation: Observation
) -> Thresholds:
    if dtype == "fp32":
        return fp32_thresholds(own_rounding, greedy=scenario.greedy)
    own = [bench.reference.logits_in(dtype, text, last=last) for text, last in observation.texts]
    return half_thresholds(
        compare(np.concatenate(own), observation.reference, near_tie_margin=HALF_NEAR_TIE_MARGIN)
    )


def checks_of(metrics: Metrics, bounds: Thresholds, observation: Observation) -> tuple[Check, ...]:
    """Every bound on one scenario's metrics, each naming the position to look at first."""
    worst = (
        f"worst at {observation.labels[metrics.worst_position]}, {metrics.worst_rel_l2:.3g} there"
    )
    first = None
    if metrics.first_disagreement is not None:
        first = (
            f"first at {observation.labels[metrics.first_disagreement]}, where transformers' margin is "
            f"{metrics.first_disagreement_margin:.3g}"
        )
    kl: tuple[Check, ...] = ()
    if bounds.kl_mean is not None:
        kl = (Check("mean KL", metrics.kl_mean, "<=", bounds.kl_mean),)
    return (
        Check("NaN and infinite logits", metrics.nonfinite, "==", 0),
        Check("rel-L2", metrics.rel_l2, "<=", bounds.rel_l2, worst),
        *kl,
        Check("same top-1 outside near-ties", metrics.top1_clear, ">=", bounds.top1_clear, first),
    )
