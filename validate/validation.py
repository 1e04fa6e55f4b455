"""`validate`: open both sides, run every scenario, judge, find where an error starts, report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwenport.validate import localisation
from qwenport.validate.candidate import Candidate, Refused
from qwenport.validate.environment import describe_environment
from qwenport.validate.errors import ValidationError
from qwenport.validate.judging import checks_of, result_of, seconds_since, status_of
from qwenport.validate.localisation import Fault, OperatorError
from qwenport.validate.memory import must_stream
from qwenport.validate.metrics import Metrics, compare
from qwenport.validate.prompts import make_prompts
from qwenport.validate.report import Check, Report, ScenarioResult, Status
from qwenport.validate.rope_check import check_tables
from qwenport.validate.router_check import Routing, choices_of, compare_routing
from qwenport.validate.scenarios import (
    RAGGED_ROWS,
    SCENARIOS,
    TAPPED,
    Bench,
    BenchMaker,
    CandidateError,
    NotApplicable,
    Observation,
    Scenario,
    capacity_for,
    greedy_request,
)
from qwenport.validate.sites import hidden_states, layer_output, router_choices
from qwenport.validate.streaming import Progress
from qwenport.validate.taps import Seen, Taps
from qwenport.validate.target import ENGINE, NETWORK, Target, check_source, open_target
from qwenport.validate.text import Choices, Text
from qwenport.validate.thresholds import (
    FP32_ROUTER_MARGIN,
    HALF_NEAR_TIE_MARGIN,
    Thresholds,
    fp32_thresholds,
    half_thresholds,
    override,
)

if TYPE_CHECKING:
    from qwenport.validate.reference import Reference

Float32 = NDArray[np.float32]

PARSED, ROPE_TABLES, ROUTING = "parsed network", "rope tables", "routing"
PARSED_SUMMARY = (
    "What the build would refuse: inputs that are not read, caches not in place, attention unmasked"
)
TABLES_SUMMARY = "Every row of cos and sin against transformers' rotary module"
ROUTING_SUMMARY = "Each token's experts against transformers' routers, in prefill and decode"


@dataclass(frozen=True)
class Options:
    """How to validate. See `validate` for what each means."""

    streamed: bool | None = None
    layers: int | None = None
    prompts: Path | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)


def validate(
    target: Path,
    reference: Path,
    *,
    judged_as: str | None = None,
    exact: bool = False,
    streamed: bool | None = None,
    layers: int | None = None,
    prompts: Path | None = None,
    thresholds: Mapping[str, float] | None = None,
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Hold a package, TensorRT's network of it, or an engine against transformers on the checkpoint behind it.

    Args:
        target: a package or engine directory.
        reference: the checkpoint directory, the oracle's only source.
        judged_as: "tensorrt-network" to judge what TensorRT's parser makes of a package.
        exact: evaluate a network in fp32, not in the types it declares.
        streamed: load one decoder layer at a time on both sides; by default where memory demands it.
        layers: run only this many decoder layers, then the final norm and the head; implies `streamed`.
        prompts: UTF-8 text file to take prompts from.
        thresholds: name -> value in place of ours; see `thresholds.Thresholds`.
        device: where a package runs: "cpu" (in fp32, the strictest) or "cuda" (in its own dtype).
        progress: called with (what, done, total).

    Returns:
        The report; `passed` is the verdict. A target that fails while it runs fails its scenario.

    Raises:
        ValidationError: the question makes no sense: not a package, or made from another checkpoint.
        PackageError, EngineError, CheckpointError, ConfigError: a side is damaged.
        MissingExtraError, SessionError: the target cannot run here.
    """
    opened = open_target(target, judged_as=judged_as, exact=exact, device=device)
    check_source(opened, reference)
    options = Options(streamed, layers, prompts, thresholds or {})
    validation = Validation(opened, reference, options, progress=progress)
    validation.run()
    return validation.report()


class Validation:
    """One validation while it is going on; `report` may be asked for at any time."""

    def __init__(
        self,
        target: Target,
        checkpoint_path: Path,
        options: Options = Options(),
        *,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        """Say what to do; nothing is loaded yet. Arguments as `validate`; the target is open.

        Raises:
            ValidationError: a request that cannot be met.
        """
        self._target, self._path, self._options = target, checkpoint_path, options
        self._progress = progress
        self._all_layers = target.config.num_hidden_layers
        self._layers = self._all_layers if options.layers is None else options.layers
        if not 1 <= self._layers <= self._all_layers:
            raise ValidationError(f"layers {self._layers} is outside 1..{self._all_layers}")
        self._streamed = options.streamed
        if self._streamed is None:
            self._streamed = self._layers < self._all_layers or must_stream(target)
        if self._layers < self._all_layers and not self._streamed:
            raise ValidationError("fewer layers are for streamed validation")
        if self._streamed and (target.judged_as == ENGINE or target.device != "cpu"):
            if options.streamed or options.layers:
                raise ValidationError(f"{target.path}: only what runs on the CPU can be streamed")
            self._streamed = False
        self._prompts = make_prompts(checkpoint_path, target.config.vocab_size, options.prompts)
        self._capacity = capacity_for(target.capacity)
        self._router_names = {} if target.judged_as == ENGINE else self._routers()
        self._reference: Reference | None = None
        self._candidate: Candidate | None = None
        self._results: list[ScenarioResult] = []
        self._own_rounding = float("nan")
        self._oracle: dict[tuple[Text, str], Float32] = {}
        self._loosened: dict[str, None] = {}
        self._layers_error: tuple[OperatorError, ...] = ()
        self._fault: Fault | None = None
        self._routing: Routing | None = None
        self._replayed = 0
        self._complete = False

    def _routers(self) -> dict[int, str]:
        return router_choices(self._target.config, self._layers)

    # ------------------------------------------------------------------ the course of it

    def run(self, reference: Reference | None = None) -> None:
        """Do everything. `reference`: one that is loaded already.

        Raises:
            As `validate`.
        """
        failure = ""
        try:
            self._candidate = self._open_candidate()  # what cannot run here need not wait
        except Refused as error:
            failure = str(error)
        if failure and self._target.judged_as == NETWORK:
            self._results.append(ScenarioResult(PARSED, PARSED_SUMMARY, "failed", reason=failure))
        self._reference = reference if reference is not None else self._load_reference()
        self._judge_statically()
        prompt, count = greedy_request(self._prompts, self._capacity, bool(self._streamed))
        greedy, _ = self._reference.greedy(prompt, count)
        self._own_rounding = self._reference.own_rounding(prompt, count)
        bench_of = BenchMaker(self._prompts, tuple(greedy), _original_context(self._target))
        session = None
        if self._candidate is not None:
            try:
                session = self._candidate.open(bench_of.rehearsal(SCENARIOS))
            except Refused as error:
                failure = str(error)
        observations: dict[str, Observation] = {}
        if session is not None and self._streamed:
            observations = self._observe_all(bench_of(session))
        for done, scenario in enumerate(SCENARIOS):
            self._progress(scenario.name, done, len(SCENARIOS) + 1)
            if session is None:
                self._results.append(result_of(scenario, "failed", reason=failure))
            else:
                known = observations.get(scenario.name)
                self._results.append(self._judge(scenario, bench_of(session), bench_of, known))
        del session
        self._progress("looking inside", len(SCENARIOS), len(SCENARIOS) + 1)
        self._look_inside(bench_of, failure)
        self._complete = True
        self._progress("done", len(SCENARIOS) + 1, len(SCENARIOS) + 1)

    def report(self) -> Report:
        """What is known by now; scenarios that have not been run are said to be interrupted."""
        target = self._target
        done = {result.name for result in self._results}
        left = [
            result_of(scenario, "not run", reason="interrupted")
            for scenario in SCENARIOS
            if scenario.name not in done
        ]
        return Report(
            target=str(target.path),
            judged_as=target.judged_as,
            target_dtype=target.dtype,
            compute_dtype=target.compute_dtype,
            reference=str(self._path),
            reference_mode="streamed" if self._streamed else "whole",
            reference_weights="" if self._reference is None else self._reference.weights_note,
            layers_judged=self._layers,
            layers=self._all_layers,
            complete=self._complete,
            prompts=self._prompts.description,
            own_rounding=self._own_rounding,
            cache_slots=self._capacity,
            max_seq_len=target.capacity,
            loosened=tuple(self._loosened),
            scenarios=(*self._results, *left),
            layers_error=self._layers_error,
            fault=self._fault,
            routing=() if self._routing is None else self._routing.bands(),
            replayed=self._replayed,
            environment=describe_environment(target.judged_as in (NETWORK, ENGINE)),
            hashes=target.hashes(),
        )

    def _load_reference(self) -> Reference:
        from qwenport.validate.reference import Reference

        self._progress("loading the reference", 0, 1)
        return Reference(
            self._target,
            self._path,
            layers=self._layers,
            streamed=bool(self._streamed),
            progress=self._progress if self._streamed else lambda what, done, total: None,
        )

    def _open_candidate(self) -> Candidate:
        return Candidate(
            self._target,
            max_batch=min(RAGGED_ROWS, self._target.max_batch),
            capacity=self._capacity,
            layers=self._layers,
            streamed=bool(self._streamed),
            progress=self._progress,
        )

    def _judge_statically(self) -> None:
        """What can be said before anything runs: the network's structure, the rope tables."""
        target = self._target
        if target.judged_as == NETWORK and self._candidate is not None:
            complaints = self._candidate.complaints
            status: Status = "failed" if complaints else "passed"
            self._results.append(
                ScenarioResult(PARSED, PARSED_SUMMARY, status, reason="; ".join(complaints) or None)
            )
        if target.package is None:
            why = "an engine's tables are inside its plan; its logits show them"
            self._results.append(ScenarioResult(ROPE_TABLES, TABLES_SUMMARY, "not run", reason=why))
            return
        started = time.monotonic()
        assert self._reference is not None
        checks = check_tables(target.package, self._reference)
        self._results.append(
            ScenarioResult(
                ROPE_TABLES,
                TABLES_SUMMARY,
                status_of(checks),
                checks,
                seconds=seconds_since(started),
            )
        )

    # ------------------------------------------------------------------ scenarios

    def _observe_all(self, bench: Bench) -> dict[str, Observation]:
        """Streamed: every scenario's logits, then the oracle's of all of them in one pass."""
        found = {}
        for scenario in SCENARIOS:
            try:
                found[scenario.name] = scenario.run(bench)
            except NotApplicable:  # `_judge` asks again, and says why
                continue
        texts = [text for observation in found.values() for text in observation.texts]
        self._ask(texts, "fp32")
        if self._target.compute_dtype != "fp32":
            self._ask(texts, self._target.compute_dtype)
        return found

    def _ask(self, texts: Sequence[Text], dtype: str) -> list[Float32]:
        """transformers' logits, each text asked for once."""
        assert self._reference is not None
        missing = [t for t in dict.fromkeys(texts) if (t, dtype) not in self._oracle]
        if missing:
            for text, logits in zip(missing, self._reference.logits(missing, dtype), strict=True):
                self._oracle[text, dtype] = logits
        return [self._oracle[text, dtype] for text in texts]

    def _judge(
        self,
        scenario: Scenario,
        bench: Bench,
        bench_of: BenchMaker,
        observation: Observation | None,
    ) -> ScenarioResult:
        """Run one scenario and hold its metrics against their bounds. A target that raises has failed it."""
        started = time.monotonic()
        try:
            observation = scenario.run(bench) if observation is None else observation
        except CandidateError as error:
            return result_of(scenario, "failed", reason=str(error), started=started)
        except NotApplicable as reason:
            return result_of(scenario, "not run", reason=str(reason), started=started)
        oracle = np.concatenate(self._ask(observation.texts, "fp32"))
        if observation.candidate.shape != oracle.shape:
            shapes = f"{observation.candidate.shape}, expected {oracle.shape}"
            why = f"the target gave logits of shape {shapes}"
            return result_of(scenario, "failed", reason=why, started=started)
        metrics, checks = self._measure(scenario, observation, oracle)
        if status_of(checks) == "failed" and self._router_names:
            # a near-tie that fell the other way is no mistake: take it over, and judge what follows from it
            choices = self._choices(scenario, bench_of)
            if choices is not None:
                assert self._reference is not None
                replayed = self._reference.replayed
                oracle = np.concatenate(self._reference.logits(observation.texts, choices=choices))
                taken = self._reference.replayed - replayed
                if taken:
                    self._replayed += taken
                    metrics, checks = self._measure(scenario, observation, oracle)
        return result_of(scenario, status_of(checks), checks, metrics, started=started)

    def _measure(
        self, scenario: Scenario, observation: Observation, oracle: Float32
    ) -> tuple[Metrics, tuple[Check, ...]]:
        dtype = self._target.compute_dtype
        if dtype == "fp32":
            bounds = self._override(fp32_thresholds(self._own_rounding, greedy=scenario.greedy))
            own = self._own_rounding
        else:
            theirs = self._own_error(observation.texts)
            bounds, own = (
                self._override(half_thresholds(theirs, self._target.config.hidden_size)),
                theirs.rel_l2,
            )
        metrics = compare(observation.candidate, oracle, near_tie_margin=bounds.near_tie_margin)
        ratio = metrics.rel_l2 / own if own else float("inf") if metrics.rel_l2 else 0.0
        metrics = dataclasses.replace(metrics, own_ratio=ratio)
        return metrics, checks_of(metrics, bounds, observation.labels, dtype)

    def _own_error(self, texts: Sequence[Text]) -> Metrics:
        """What transformers itself reaches in the target's dtype."""
        theirs, oracle = (
            np.concatenate(self._ask(texts, dtype))
            for dtype in (self._target.compute_dtype, "fp32")
        )
        return compare(theirs, oracle, near_tie_margin=HALF_NEAR_TIE_MARGIN)

    def _override(self, bounds: Thresholds) -> Thresholds:
        bounds, looser = override(bounds, self._options.thresholds)
        self._loosened |= dict.fromkeys(looser)
        return bounds

    # ------------------------------------------------------------------ inside the target

    def _tap(
        self,
        scenario: Scenario,
        bench_of: BenchMaker,
        names: Sequence[str],
        heads: Sequence[str] = (),
    ) -> tuple[Observation, list[Seen]] | None:
        """Run a scenario once more on a session that shows values of its graph; None if it fails."""
        assert self._candidate is not None
        try:
            session = self._candidate.open(bench_of.rehearsal([scenario]), names)
            with Taps(session, heads) as taps:
                observation = scenario.run(bench_of(session))
        except (Refused, CandidateError):
            return None
        return observation, taps.texts()

    def _choices(self, scenario: Scenario, bench_of: BenchMaker) -> list[Choices] | None:
        tapped = self._tap(scenario, bench_of, list(self._router_names.values()))
        return None if tapped is None else self._choices_seen(tapped[1])

    def _choices_seen(self, seen: Sequence[Seen]) -> list[Choices] | None:
        if not self._router_names:
            return None
        margin = self._router_margin()
        return [choices_of(of_text, self._router_names, margin) for of_text in seen]

    def _router_margin(self) -> float:
        in_fp32 = self._target.compute_dtype == "fp32"
        ours = FP32_ROUTER_MARGIN if in_fp32 else HALF_NEAR_TIE_MARGIN
        return self._options.thresholds.get("router_margin", ours)

    def _look_inside(self, bench_of: BenchMaker, failure: str) -> None:
        """Errors from layer to layer, routers, and where a failure starts."""
        target = self._target
        sparse = bool(target.config.moe)
        if self._candidate is None or not self._candidate.can_be_tapped:
            if sparse:
                why = "an engine's routers are inside its plan; its logits show them"
                status: Status = "not run" if self._candidate is not None else "failed"
                self._results.append(
                    ScenarioResult(ROUTING, ROUTING_SUMMARY, status, reason=failure or why)
                )
            return
        names = [*hidden_states(self._layers), *self._router_names.values()]
        unused = [
            index for index in range(self._layers) if not self._candidate.uses(layer_output(index))
        ]
        missing = [name for name in names if not self._candidate.uses(name)]
        tapped = None if missing else self._tap(TAPPED, bench_of, names)
        if sparse:
            self._results.append(self._judge_routing(tapped, failure or "the target failed"))
        if unused:
            self._fault = localisation.fault_cut_off(unused[0])
        if tapped is None:
            return
        self._layers_error = self._by_layer(*tapped)
        failed = {result.name for result in self._results if result.status == "failed"}
        for scenario in SCENARIOS:
            if scenario.name in failed and self._fault is None:
                self._find_fault(scenario, bench_of, names)
        if failed and self._fault is None:
            self._blame_tables()

    def _by_layer(self, observation: Observation, seen: list[Seen]) -> tuple[OperatorError, ...]:
        assert self._reference is not None
        return localisation.errors_by_layer(
            self._reference,
            observation.texts,
            seen,
            self._target.compute_dtype,
            self._choices_seen(seen),
        )

    def _find_fault(self, scenario: Scenario, bench_of: BenchMaker, names: Sequence[str]) -> None:
        assert self._reference is not None and self._candidate is not None
        tapped = self._tap(scenario, bench_of, names)
        if tapped is None:
            return
        observation, seen = tapped
        errors = self._by_layer(observation, seen)
        bad = localisation.worst(errors)
        dtype, config = self._target.compute_dtype, self._target.config
        if bad == 0:
            self._fault = localisation.fault_outside(scenario.name, "embed_tokens", 0.0, errors[0])
        elif bad is not None:
            layer = bad - 1
            sites = localisation.tapped_sites(config, layer, self._candidate.uses)
            entry = hidden_states(self._layers)[layer]
            inside = [
                entry,
                *sites,
                *(self._router_names[n] for n in (layer,) if n in self._router_names),
            ]
            heads = [name for name, site in sites.items() if site.heads]
            looked = self._tap(scenario, bench_of, list(dict.fromkeys(inside)), heads)
            operators: tuple[OperatorError, ...] = ()
            if looked is not None:
                operators = localisation.errors_in_layer(
                    self._reference, config, layer, observation.texts, looked[1], dtype, sites
                )
            self._fault = localisation.fault_in_layer(
                scenario.name, config, layer, errors[bad], errors[bad - 1].accumulated, operators
            )
        else:
            sizes = np.cumsum([text.last for text in observation.texts])[:-1]
            end = localisation.errors_at_the_end(
                self._reference,
                observation.texts,
                seen,
                np.split(observation.candidate, sizes),
                self._ask(observation.texts, "fp32"),
                dtype,
            )
            if localisation.worst([end]) is not None:
                self._fault = localisation.fault_outside(
                    scenario.name, end.name, errors[-1].accumulated, end
                )

    def _blame_tables(self) -> None:
        """No operator stands out in a run: then the tables themselves are what failed, if they did."""
        (tables,) = [result for result in self._results if result.name == ROPE_TABLES]
        if tables.status != "failed":
            return
        nan = float("nan")
        self._fault = Fault(
            ROPE_TABLES, None, "rope tables", nan, nan, nan, nan,
            f"The rope tables are wrong: {tables.failures[0]}.",
        )  # fmt: skip

    def _judge_routing(
        self, tapped: tuple[Observation, list[Seen]] | None, failure: str
    ) -> ScenarioResult:
        assert self._reference is not None
        if tapped is None:
            return ScenarioResult(ROUTING, ROUTING_SUMMARY, "failed", reason=failure)
        started = time.monotonic()
        observation, seen = tapped
        choices = self._choices_seen(seen)
        (expected,) = self._reference.routing(observation.texts, choices=choices)
        chosen = {layer: seen[0][name] for layer, name in self._router_names.items()}
        self._routing = compare_routing(chosen, expected)
        margin, dtype = self._router_margin(), self._target.compute_dtype
        bounds = fp32_thresholds(self._own_rounding)
        if dtype != "fp32":
            agreement = self._own_agreement(observation.texts, dtype, margin)
            bounds = half_thresholds(
                self._own_error(observation.texts), self._target.config.hidden_size, agreement
            )
        bounds = self._override(bounds)
        check = self._routing.check(bounds.router_margin, bounds.router_agreement)
        return ScenarioResult(
            ROUTING, ROUTING_SUMMARY, status_of((check,)), (check,), seconds=seconds_since(started)
        )

    def _own_agreement(self, texts: Sequence[Text], dtype: str, margin: float) -> float:
        """The share of choices outside near-ties in which transformers in `dtype` agrees with fp32."""
        assert self._reference is not None
        (theirs,) = self._reference.routing(texts, dtype)
        choices = {layer: experts for layer, (_, experts) in theirs.items()}
        (expected,) = self._reference.routing(texts, choices=[Choices(choices, margin)])
        return compare_routing(choices, expected).agreement(margin)


def _original_context(target: Target) -> int | None:
    """Positions that the model was made for, where its rope settings go beyond them."""
    rope = target.config.rope
    original = rope.original_max_position_embeddings
    return original if rope.kind != "default" and original < target.capacity else None
