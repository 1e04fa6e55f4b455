"""The rows of a report that are not scenarios: structure, pieces, routers, rounding, and explanations of failures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwenport.contract import E4M3, NETWORK, PACKAGE, Progress
from qwenport.validate.budget import Plan
from qwenport.validate.candidate import Candidate, Refused
from qwenport.validate.coverage import Counter
from qwenport.validate.errors import NetworkError
from qwenport.validate.investigation import Bench, Investigation
from qwenport.validate.judge import Judge, result_of, seconds_since, status_of
from qwenport.validate.localisation import WHOLE_LAYER, Fault
from qwenport.validate.oracle import Oracle
from qwenport.validate.prompts import Prompts
from qwenport.validate.proof_chunks import self_test_stops
from qwenport.validate.report import Check, ScenarioResult, Status
from qwenport.validate.rope_check import check_tables
from qwenport.validate.router_check import compare_routing
from qwenport.validate.run import (
    CandidateError,
    InseparableError,
    NotApplicable,
    Observation,
    Run,
)
from qwenport.validate.scenarios import SCENARIOS, Scenario
from qwenport.validate.sites import router_choices
from qwenport.validate.streaming import Rehearsal
from qwenport.validate.target import Target
from qwenport.validate.walk import Operation, draw_walk, perform, script, shrink

if TYPE_CHECKING:
    from qwenport.validate.rounding import RoundingError

PARSED, CONSTANTS, ROPE_TABLES = "parsed network", "constants", "rope tables"
EMBEDDING, ROUTING, HEAD = "embedding", "routing", "distance of the head"
LAYERS, OPERATORS = "rounding of layers", "rounding of operators"
PARSED_SUMMARY = (
    "What the build would refuse: inputs that are not read, caches not in place, attention unmasked"
)
TABLES_SUMMARY = "Every row of cos and sin against transformers' rotary module"
EMBEDDING_SUMMARY = "Every id of the vocabulary against the checkpoint's row"
ROUTING_SUMMARY = "Each token's experts against transformers' routers"
LAYERS_SUMMARY = "Each layer's error in the declared types, given transformers' own input"
OPERATORS_SUMMARY = "Each operator's error in the declared types, given its input"
IN_THE_ENGINE = (
    "it is inside the engine; its logits show it, and `validate` judges it in the package"
)
IN_THE_PLAN = "it is inside the engine's plan; its logits show it"
END_TO_END = 128  # positions at which logits are compared in half precision
# What a runtime raises for a piece of a model is the target's failure; anything else is our bug.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (NetworkError, CandidateError)
SHORT = 256  # positions of a layer alone whose kind is run over more
HEAD_POSITIONS = 64  # at which a head that rounds its input is run alone: logits are wide
MOST_KINDS = 6  # kinds of decoder layers that are run alone; if there are more, the first ones


def of_network(
    target: Target, candidate: Candidate | None, refused: str
) -> Iterator[ScenarioResult]:
    """What can be said about a parsed network before it runs."""
    complaints = (refused,) if candidate is None else candidate.complaints
    status: Status = "failed" if complaints else "passed"
    yield ScenarioResult(PARSED, PARSED_SUMMARY, status, reason="; ".join(complaints) or None)
    if candidate is not None and target.package is not None:
        from qwenport.validate.network.constants import check_constants

        yield check_constants(candidate.parsed, target.package, exact=False)


def leave_out(counter: Counter, target: Target, layers: int, streamed: bool) -> None:
    """Record what this kind of judgement cannot cover, whatever it runs."""
    if layers < target.config.num_hidden_layers:
        counter.leave_out(f"decoder layers {layers} to {target.config.num_hidden_layers - 1}")
    if target.config.sparse_attention is not None:
        counter.leave_out(
            f"sparse attention, for which config.json asks ({target.config.sparse_attention}) and which the package "
            "ignores: it is compared with exact attention"
        )
    if (stops := self_test_stops(target.config.dual_chunk, target.capacity)) is not None:
        counter.leave_out(stops)
    if target.judged_as == PACKAGE and target.dtype != "fp32" and target.device == "cpu":
        what = "range and rounding" if target.dtype == "fp16" else "rounding"
        counter.leave_out(
            f"the {what} of {target.dtype}: onnxruntime computes in fp32 on the CPU "
            "(judge it with --as tensorrt-network)"
        )
    if target.judged_as == NETWORK and target.dtype != "fp32" and not target.rounds:
        counter.leave_out(f"the rounding of {target.dtype} (--exact)")
    if target.judged_as == NETWORK:
        counter.leave_out("the kernels that TensorRT's builder chooses, which only a GPU can run")
    if streamed:
        counter.leave_out(
            "greedy text beyond its first tokens (each needs another pass over all weights)"
        )


def _not_observed(engine: Target) -> str:
    return IN_THE_PLAN if engine.for_onnxruntime is None else IN_THE_ENGINE


@dataclass(frozen=True)
class Structure:
    """The pieces of a target, judged alone."""

    target: Target
    candidate: Candidate
    oracle: Oracle
    counter: Counter
    progress: Progress

    def results(self) -> list[ScenarioResult]:
        """The rope tables, and the embedding of every id."""
        hidden = _not_observed(self.target)
        source = self.target.package or self.target.for_onnxruntime
        embedding = ScenarioResult(EMBEDDING, EMBEDDING_SUMMARY, "not run", reason=hidden)
        if source is None:
            tables = ScenarioResult(ROPE_TABLES, TABLES_SUMMARY, "not run", reason=hidden)
            return [tables, embedding]
        started = time.monotonic()
        checks = check_tables(source, self.oracle.reference)
        tables = _row(ROPE_TABLES, TABLES_SUMMARY, checks, started)
        return [tables, embedding if self.target.package is None else self._embedding()]

    def _embedding(self) -> ScenarioResult:
        from qwenport.validate.pieces import check_embedding
        from qwenport.validate.sites import EMBEDDING as VALUE

        started, size = time.monotonic(), self.target.config.vocab_size
        if self.target.device != "cpu":
            why = "pieces of a package run on the CPU"
            return ScenarioResult(EMBEDDING, EMBEDDING_SUMMARY, "not run", reason=why)
        if not self.candidate.uses(VALUE):
            why = f"the graph has no value {VALUE}, which the exporter writes"
            return ScenarioResult(EMBEDDING, EMBEDDING_SUMMARY, "not run", reason=why)
        try:
            checks = check_embedding(self.candidate, self.oracle.reference, size, self.progress)
        except RUNTIME_ERRORS as error:
            return _raised(EMBEDDING, EMBEDDING_SUMMARY, error, started)
        self.counter.embedded_ids = size
        return _row(EMBEDDING, EMBEDDING_SUMMARY, checks, started)

    def distance(
        self, prompts: Prompts, investigation: Investigation, plan: Plan
    ) -> list[ScenarioResult]:
        """One layer of each kind alone, over a long text; every layer if experts round inputs to FP8."""
        if self.target.package is None or self.target.device != "cpu" or investigation.missing:
            self.counter.leave_out("decoder layers by themselves over the whole context")
            return []
        from qwenport.validate.layer_kinds import layer_kinds

        layers = self.oracle.reference.num_layers
        kinds = layer_kinds(self.target.package, layers)
        alone = dict.fromkeys(list(kinds)[:MOST_KINDS], plan.distance)
        if (
            self.target.compute_dtype == E4M3
        ):  # codes that fall the other way hide faults from logits
            short = min(plan.distance, SHORT)
            alone |= {layer: short for layer in range(layers) if layer not in alone}
        for left in kinds:
            if left not in alone:
                self.counter.leave_out(f"layer {left} by itself, a kind of its own")
        rows = [
            self._distance(
                prompts.take(positions), layer, kinds.get(layer, ()), investigation.router_margin
            )
            for layer, positions in sorted(alone.items())
        ]
        if self.target.config.rounds_head:
            rows.append(self._distance_of_head(prompts.take(min(plan.distance, HEAD_POSITIONS))))
        return rows

    def _distance_of_head(self, tokens: Sequence[int]) -> ScenarioResult:
        """Logits show a fault in its rounding less than codes that fall the other way in the layers before."""
        from qwenport.validate.pieces import check_head, run_head_alone

        started, name = time.monotonic(), HEAD
        summary = f"Final norm and head, alone at {len(tokens)} positions"
        self.progress(name, 0, 1)
        try:
            run = run_head_alone(self.candidate, tokens)
        except InseparableError as error:
            self.counter.leave_out("the head by itself")
            return ScenarioResult(name, summary, "not run", reason=str(error))
        except RUNTIME_ERRORS as error:
            return _raised(name, summary, error, started)
        return _row(name, summary, check_head(run, self.oracle.reference), started)

    def _distance(
        self, tokens: Sequence[int], layer: int, same: tuple[int, ...], margin: float
    ) -> ScenarioResult:
        from qwenport.validate.pieces import check_distance, run_layer_alone

        started, name = time.monotonic(), f"distance of layer {layer}"
        like = f", as which {len(same)} layers are built" if len(same) > 1 else ""
        summary = f"Layer {layer}{like}, alone over {len(tokens)} positions"
        self.progress(name, 0, 1)
        router = router_choices(self.target.config, layer + 1).get(layer)
        try:
            run = run_layer_alone(self.candidate, layer, tokens, router, len(tokens))
        except InseparableError as error:
            self.counter.leave_out(f"layer {layer} by itself over {len(tokens)} positions")
            return ScenarioResult(name, summary, "not run", reason=str(error))
        except RUNTIME_ERRORS as error:
            return _raised(name, summary, error, started)
        checks = check_distance(run, self.oracle.reference, layer, margin)
        self.counter.layer_distance[name.removeprefix("distance of ")] = len(tokens) - 1
        if run.experts is not None:
            self.counter.routed(layer, run.experts.reshape(-1).tolist())
        return _row(name, summary, checks, started)


def routing(
    judge: Judge,
    oracle: Oracle,
    target: Target,
    investigation: Investigation,
    observation: Observation | None,
    counter: Counter,
) -> list[ScenarioResult]:
    """Compare each token's experts in each layer with transformers' routers; record which experts received tokens."""
    if target.config.moe is None:
        return []
    if not investigation.can_observe:
        return [ScenarioResult(ROUTING, ROUTING_SUMMARY, "not run", reason=_not_observed(target))]
    if observation is None:
        why = "the target fails, or its graph has no routers, where they are looked at"
        return [ScenarioResult(ROUTING, ROUTING_SUMMARY, "failed", reason=why)]
    started = time.monotonic()
    choices = investigation.choices_seen(observation)
    expected = oracle.reference.routing(observation.texts, choices=choices)
    routers = investigation.routers
    chosen = {
        layer: np.concatenate([seen[name] for seen in observation.seen])
        for layer, name in routers.items()
    }
    together = {
        layer: tuple(np.concatenate([of_text[layer][i] for of_text in expected]) for i in (0, 1))
        for layer in routers
    }
    for layer, experts in chosen.items():
        counter.routed(layer, np.unique(experts).tolist())
    found = compare_routing(chosen, together)  # type: ignore[arg-type]
    investigation.bands = found.bands()
    margin, agreement = investigation.router_margin, 1.0
    if judge.dtype != "fp32":
        agreement = _own_agreement(oracle, observation, judge.dtype, margin)
    bounds = judge.bounds(observation.texts, agreement)
    check = found.check(margin, bounds.router_agreement)
    return [_row(ROUTING, ROUTING_SUMMARY, (check,), started)]


def _own_agreement(oracle: Oracle, observation: Observation, dtype: str, margin: float) -> float:
    """The share of choices outside near-ties in which transformers in `dtype` agrees with fp32."""
    from qwenport.validate.text import Choices

    text = observation.texts[:1]
    (theirs,) = oracle.reference.routing(text, dtype)
    choices = {layer: experts for layer, (_, experts) in theirs.items()}
    (expected,) = oracle.reference.routing(text, choices=[Choices(choices, margin)])
    return compare_routing(choices, expected).agreement(margin)


def rounding(
    target: Target,
    candidate: Candidate,
    oracle: Oracle,
    bench: Bench,
    plan: Plan,
    counter: Counter,
    judge: Judge,
    progress: Progress,
) -> tuple[list[ScenarioResult], list[RoundingError]]:
    """Half precision: every layer, every operator, and the logits from end to end."""
    from qwenport.validate.rounding import END, judge_rounding

    started = time.monotonic()
    declared = candidate.declared()
    texts = _texts(bench, plan)
    errors: list[RoundingError] = []
    note = None
    try:
        for error in judge_rounding(
            declared, oracle.reference, target.config, target.dtype, texts, progress
        ):
            errors.append(error)
            if error.nonfinite:
                break  # everything after it gets NaN or infinite values
    except NetworkError as error:
        rows = [_raised(name, LAYERS_SUMMARY, error, started) for name in (LAYERS, OPERATORS)]
        return rows, errors
    counter.rounding = sum(map(len, texts))
    broken = [error for error in errors if error.nonfinite]
    if broken:
        from qwenport.validate.reference import Text

        theirs = oracle.reference.first_nonfinite(Text(tuple(texts[0]), ()), target.dtype)
        note = f"{broken[0]}; {_theirs(theirs, target.dtype)}"
    whole = [e for e in errors if e.operator in (WHOLE_LAYER, END)]
    inside = [e for e in errors if e.operator not in (WHOLE_LAYER, END)]
    rows = [
        _rounding_row(LAYERS, LAYERS_SUMMARY, whole, note, started),
        _rounding_row(OPERATORS, OPERATORS_SUMMARY, inside, note, started),
    ]
    if not broken:
        rows.append(_end_to_end(target, declared, bench, judge, texts))
    return rows, errors


def _theirs(found: int | str | None, dtype: str) -> str:
    if found is None:
        return f"transformers' own run in {dtype} is finite"
    where = f"layer {found}" if isinstance(found, int) else f"the {found}"
    return f"transformers' own run in {dtype} is not finite either, from {where} on"


def _texts(bench: Bench, plan: Plan) -> list[list[int]]:
    """Texts with as many positions as half precision is judged at."""
    length = min(plan.rounding, plan.capacity)
    count = -(-plan.rounding // length)
    prompts = bench.prompts
    return [prompts.take(length, start=61 * number) for number in range(count)]


def _rounding_row(
    name: str,
    summary: str,
    errors: Sequence[RoundingError],
    note: str | None,
    started: float,
) -> ScenarioResult:
    from qwenport.validate.rounding import worst

    if not errors:
        return ScenarioResult(name, summary, "not run", reason=note or "nothing could be compared")
    most = worst(errors)
    assert most is not None
    checks = (
        Check("NaN and infinite results", sum(e.nonfinite for e in errors), "==", 0, note),
        Check("excess over transformers' own error", most.excess, "<=", 1.0, str(most)),
    )
    return _row(name, summary, checks, started)


def _end_to_end(
    target: Target, declared: Candidate, bench: Bench, judge: Judge, texts: Sequence[Sequence[int]]
) -> ScenarioResult:
    """Logits in the declared types, judged by the bound that transformers' own implementations keep to each other."""
    dtype = target.dtype

    def run_texts(run: Run) -> None:
        left = END_TO_END
        for tokens in texts:
            run.start()
            run.prefill([tokens[: min(run.capacity, left)]], all_logits=True)
            left -= min(len(tokens), left)

    scenario = Scenario(f"in {dtype}", f"The same texts from end to end in {dtype}", run_texts)
    started = time.monotonic()
    try:
        rehearse = bench.rehearsal([scenario])
        ((session),) = declared.open([(1, max(map(len, texts)), rehearse)])
        run = bench.make_run(session)
        scenario.run(run)
        return judge.in_dtype(dtype).judge(scenario, run.observation(), started=started)
    except (CandidateError, NotApplicable, Refused) as error:
        return result_of(scenario, "failed", reason=str(error), started=started)


def explain(
    investigation: Investigation,
    failed: Sequence[tuple[Scenario, Observation | None]],
    results: Sequence[ScenarioResult],
    errors: Sequence[RoundingError],
) -> None:
    """Say where the failures start: in a run, in half precision's rounding, or in the byte-for-byte comparison."""
    names = [result.name for result in results if result.status == "failed"]
    if failed:
        investigation.explain(failed)
    if investigation.fault is None and (LAYERS in names or OPERATORS in names):
        rounding_rows = [r for r in results if r.name in (LAYERS, OPERATORS) and r.checks]
        notes = [row.checks[0].where for row in rounding_rows]
        investigation.fault = _rounding_fault(errors, next(filter(None, notes), None))
    rest = {result.name: result for result in results}
    for name in (ROPE_TABLES, EMBEDDING, HEAD):
        if investigation.fault is None and name in names:
            nan = float("nan")
            reason = rest[name].failures[0]
            text = f"The {name} fails by itself: {reason}."
            investigation.fault = Fault(name, None, name, nan, nan, nan, nan, text)
    for name in names:
        if investigation.fault is None and name.startswith("distance of layer "):
            nan, layer = float("nan"), int(name.rpartition(" ")[2])
            text = f"The error starts at layer {layer}, run alone over a long text: {rest[name].failures[0]}."
            investigation.fault = Fault(name, layer, WHOLE_LAYER, nan, nan, nan, nan, text)
    if investigation.fault is not None:
        investigation.unexplained = None
    elif investigation.unexplained is None and names:
        told = ", ".join(names[:4])
        investigation.unexplained = (
            f"{told} fail by what they compare; their own lines say what is wrong"
        )


def _rounding_fault(errors: Sequence[RoundingError], note: str | None) -> Fault | None:
    from qwenport.validate.rounding import worst

    inside = [error for error in errors if error.operator != WHOLE_LAYER and error.excess > 1]
    bad = worst(inside or [error for error in errors if error.excess > 1])
    if bad is None:
        return None
    spread = bad.relative[0] if bad.relative else None
    made, own = (float("nan"),) * 2 if spread is None else (spread.made, spread.own)
    text = f"The error starts at {note}." if note else f"The rounding starts to be worse at {bad}."
    return Fault(OPERATORS, bad.layer, bad.operator, float("nan"), made, made, own, text)


def replay_of_walk(bench: Bench, judge: Judge, target: Target, streamed: bool) -> str | None:
    """What the random walk found, as a Python program with as few operations as still show it.

    A streamed walk is not shortened: every trial would read all weights.
    """
    walk = next(s for s in SCENARIOS if s.name == "random walk")
    rows, capacity = bench.max_batch, bench.plan.capacity
    rehearsal = Rehearsal(bench.candidate.geometry(rows, capacity))
    operations = draw_walk(bench.plan, bench.prompts, rehearsal)

    def fails(candidate: Sequence[Operation]) -> bool:
        run = bench.make_run(session)
        try:
            perform(run, candidate)
            observation = run.observation()
        except NotApplicable:
            return False
        except CandidateError:
            return True
        return judge.judge(walk, observation).status == "failed"

    if not streamed:
        (session,) = bench.candidate.open([(rows, capacity, lambda session: None)])
        if not fails(operations):
            return None  # it needed what earlier scenarios left in the cache
        operations = shrink(operations, fails)
    performed = perform(bench.make_run(rehearsal, keep=False), operations)
    return script(performed, rows, capacity, target)


def _row(name: str, summary: str, checks: Sequence[Check], started: float) -> ScenarioResult:
    return ScenarioResult(
        name, summary, status_of(checks), tuple(checks), seconds=seconds_since(started)
    )


def _raised(name: str, summary: str, error: Exception, started: float) -> ScenarioResult:
    reason = " ".join(f"the target raised {type(error).__name__}: {error}".split())
    return ScenarioResult(name, summary, "failed", reason=reason, seconds=seconds_since(started))
