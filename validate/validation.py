"""The sequence of `validate`: identity first, then every way of running, then the inside.

identity       what the package is made of, byte for byte                            `identity`
structure      the parsed network, the rope tables, the embedding                    `rope_check`, `pieces`
running        every scenario against the oracle                                     `scenarios`, `judge`
distance       one layer of each kind over the whole context                         `pieces`
rounding       half precision at every layer and operator                            `rounding`
investigation  errors from layer to layer, routers, where a failure starts           `investigation`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenport.contract import AUTO, E4M3, ENGINE, NETWORK, STANDARD, THOROUGH, Progress, no_progress
from qwenport.exporter import settle
from qwenport.validate import rows
from qwenport.validate.budget import Plan, find_budget, make_plan
from qwenport.validate.candidate import Candidate, Refused
from qwenport.validate.cost import TOKENS as COST_TOKENS
from qwenport.validate.cost import Cost, check_original, cost_of_quantization
from qwenport.validate.coverage import Counter
from qwenport.validate.environment import describe_environment
from qwenport.validate.errors import ValidationError
from qwenport.validate.identity import check_identity
from qwenport.validate.investigation import Bench, Investigation
from qwenport.validate.judge import Judge, result_of
from qwenport.validate.memory import must_stream
from qwenport.validate.oracle import Oracle
from qwenport.validate.prompts import make_prompts, special_ids
from qwenport.validate.report import Report, ScenarioResult
from qwenport.validate.run import Observation, Run
from qwenport.validate.runner import Runner
from qwenport.validate.scenarios import LOOKED_INTO, SCENARIOS, greedy_prompt, scenarios
from qwenport.validate.target import Sources, Target, check_source, open_target
from qwenport.validate.thresholds import FP32_ROUTER_MARGIN, HALF_ROUTER_MARGIN
from qwenport.validate.thresholds import NAMES as THRESHOLDS

if TYPE_CHECKING:
    from qwenport.validate.reference import Reference
    from qwenport.validate.rounding import RoundingError

OWN_ROUNDING = 64  # tokens on which transformers' own rounding in fp32 is measured


@dataclass(frozen=True)
class Options:
    """How to validate.

    Attributes:
        streamed, layers, prompts, thresholds, budget, seed, original: the arguments of `validate` with these names.
    """

    streamed: bool | None = None
    layers: int | None = None
    prompts: Path | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    budget: str = STANDARD
    seed: int = 0
    original: Path | None = None


def validate(
    target: Path | str,
    reference: Path | str,
    *,
    judged_as: str | None = None,
    exact: bool = False,
    gpus: str | None = None,
    attention: str = AUTO,
    streamed: bool | None = None,
    layers: int | None = None,
    prompts: Path | str | None = None,
    thresholds: Mapping[str, float] | None = None,
    budget: str = STANDARD,
    seed: int = 0,
    original: Path | str | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Report:
    """Compare a package, TensorRT's network of it, or an engine with transformers on the checkpoint behind it.

    Args:
        target: a package or engine directory.
        reference: the checkpoint directory, the oracle's only source.
        judged_as: "tensorrt-network" to judge the network that TensorRT's parser makes from a package.
        exact: judge only a network's arithmetic, not the rounding of the types that it declares.
        gpus: judge the network of the engine that `build` with this option makes for tensorrt-rtx.
        attention: the same of its option for the form of attention.
        streamed: load one decoder layer at a time on both sides; by default if memory requires it.
        layers: run only this many decoder layers, then the final norm and the head; implies `streamed`.
        prompts: UTF-8 text file to take prompts from.
        thresholds: name -> value in place of ours; see `thresholds.Thresholds`.
        budget: how much to run: "quick", "standard" or "thorough"; see `budget`.
        seed: seed of what is drawn at random: step widths, the random walk.
        original: the checkpoint before it was quantized; what quantization cost is reported, and not judged.
        device: where a package runs: "cpu" (in fp32, the strictest) or "cuda" (in its own dtype).
        progress: called with (what, done, total).

    Returns:
        The report; `passed` is the verdict. A target that fails while it runs fails its scenario.

    Raises:
        ValidationError: the question is meaningless, or a side cannot be opened: not a package, made from another
            checkpoint, a config that transformers rejects, a graph that onnxruntime does not load.
        PackageError, EngineError, CheckpointError, ConfigError: a side is damaged.
        BuildError: there is no such engine for tensorrt-rtx.
        MissingExtraError, SessionError: the target cannot run here.
    """
    opened = open_target(
        Path(target),
        judged_as=judged_as,
        exact=exact,
        gpus=gpus,
        attention=attention,
        device=device,
    )
    sources = check_source(opened, Path(reference))
    text = None if prompts is None else Path(prompts)
    before = None if original is None else Path(original)
    options = Options(streamed, layers, text, thresholds or {}, budget, seed, before)
    validation = Validation(opened, sources, options, progress=progress)
    validation.run()
    return validation.report()


class Validation:
    """One validation in progress; `report` may be called at any time.

    Attributes:
        target, sources, options: as given.
        checkpoint: the oracle's source.
        layers, streamed: decoder layers to run; whether one is loaded at a time.
        prompts: what the scenarios are fed.
        results: those of the scenarios that have run.
        rounding: half precision at every layer and operator that was judged.
        weights_sha256: SHA-256 of each weight file.
        script: a Python program that reproduces what the random walk found; None if it found nothing.
        cost: what quantization cost; None before it is known, or without an original.
        complete: whether every scenario was run.
    """

    def __init__(
        self,
        target: Target,
        sources: Sources,
        options: Options = Options(),
        *,
        progress: Progress = no_progress,
    ) -> None:
        """Set up the validation; nothing is loaded yet. Arguments as for `validate`, but the target is open.

        Raises:
            ValidationError: the request cannot be met.
        """
        settle()
        self.target, self.sources, self.options = target, sources, options
        self.checkpoint = checkpoint = sources.checkpoint
        self.layers, self.streamed = _extent(target, options)
        if options.original is not None:
            check_original(target, options.original)
        self.prompts = make_prompts(checkpoint, target.config.vocab_size, options.prompts)
        self.results: list[ScenarioResult] = []
        self.rounding: list[RoundingError] = []
        self.weights_sha256: dict[str, str] = {}
        self.script: str | None = None
        self.cost: Cost | None = None
        self.complete = False
        self._progress = progress
        self._oracle: Oracle | None = None
        self._judge: Judge | None = None
        self._counter: Counter | None = None
        self._investigation: Investigation | None = None
        self._runner: Runner | None = None

    def run(self, reference: Reference | None = None) -> None:
        """Run everything. `reference`: one that is already loaded.

        Raises the same errors as `validate`.
        """
        from qwenport.validate.quantized_origin import quantization_row  # imports torch

        engine = self.target.engine
        if engine is not None and self.target.for_onnxruntime is None:
            from qwenport.engines.tensorrt_session import check_gpu

            check_gpu(engine)  # before work that takes long
        identity = check_identity(self.target, self.checkpoint, self._progress)
        self.results += identity.rows
        self.weights_sha256 = identity.weights_sha256
        origin = quantization_row(
            self.target, self.checkpoint, self.sources.original, self._progress
        )
        self.results += [] if origin is None else [origin]
        if not identity.safe:
            self._not_run("model.onnx points outside the package, so nothing of it is run")
            return
        refused = ""
        try:
            candidate = self._open_candidate()
        except Refused as error:
            refused = str(error)
        if self.target.judged_as == NETWORK:
            self.results += rows.of_network(self.target, None if refused else candidate, refused)
        if refused:
            self._not_run("TensorRT's parser or the interpreter refuses the network")
            return
        plan = self._plan(candidate)
        self._counter = counter = Counter(
            plan, self.target.config.vocab_size, self.target.config.dual_chunk
        )
        moe = self.target.config.moe
        counter.num_experts = 0 if moe is None else moe.num_experts
        rows.leave_out(counter, self.target, self.layers, self.streamed)
        self._oracle = oracle = Oracle(
            self._load_reference() if reference is None else reference,
            self.prompts.take(min(OWN_ROUNDING, plan.context)),
        )
        self._judge = Judge(oracle, self.target.compute_dtype, self.options.thresholds)
        bench = self._bench(candidate, plan, oracle)
        self._investigation = investigation = Investigation(
            bench,
            oracle,
            self.target.config,
            "fp32" if self.target.compute_dtype == E4M3 else self.target.compute_dtype,
            self.options.thresholds.get("router_margin", self._router_margin()),
        )
        structure = rows.Structure(self.target, candidate, oracle, counter, self._progress)
        self.results += structure.results()
        runner = Runner(bench, self._judge, counter, investigation, self.streamed, self._progress)
        self._runner = runner
        runner.run(self.results)
        self.results += structure.distance(self.prompts, investigation, plan)
        followed = self._follow(investigation, plan, counter)
        self.results += rows.routing(
            self._judge, oracle, self.target, investigation, followed, counter
        )
        if self.target.rounds:
            found, self.rounding = rows.rounding(
                self.target, candidate, oracle, bench, plan, counter, self._judge, self._progress
            )
            self.results += found
        self._explain(bench)
        self.cost = self._measured_cost(plan)
        self.complete = True
        self._progress("done", 1, 1)

    # ------------------------------------------------------------------ the sides

    def _open_candidate(self) -> Candidate:
        return Candidate(
            self.target, layers=self.layers, streamed=self.streamed, progress=self._progress
        )

    def _load_reference(self) -> Reference:
        from qwenport.validate.reference import Reference

        self._progress("loading the reference", 0, 1)
        return Reference(
            self.target,
            self.checkpoint,
            layers=self.layers,
            streamed=self.streamed,
            progress=self._progress if self.streamed else lambda what, done, total: None,
        )

    def _plan(self, candidate: Candidate) -> Plan:
        target = self.target
        geometry = candidate.geometry(target.max_batch, target.capacity)
        return make_plan(
            target.config,
            budget=self.options.budget,
            seed=self.options.seed,
            rows=target.max_batch,
            capacity=target.capacity,
            max_positions=target.capacity,
            max_step_tokens=geometry.max_step_tokens,
            streamed=self.streamed,
            spans=geometry.spans,
            one_cache=target.judged_as == ENGINE and target.for_onnxruntime is None,
        )

    def _bench(self, candidate: Candidate, plan: Plan, oracle: Oracle) -> Bench:
        prompt, count = greedy_prompt(plan)
        greedy, _ = oracle.reference.greedy(self.prompts.take(prompt), count)
        special = special_ids(self.checkpoint, self.target.config.vocab_size)

        chunks = self.target.config.dual_chunk

        def make_run(session: Any, **keywords: Any) -> Run:
            return Run(
                session,
                self.prompts,
                plan,
                greedy=greedy,
                original_context=_original_context(self.target),
                chunk=None if chunks is None else chunks.chunk,
                special_ids=special,
                **keywords,
            )

        return Bench(candidate, make_run, self.prompts, plan)

    def _router_margin(self) -> float:
        in_fp32 = self.target.compute_dtype == "fp32"
        return FP32_ROUTER_MARGIN if in_fp32 else HALF_ROUTER_MARGIN

    def _follow(
        self, investigation: Investigation, plan: Plan, counter: Counter
    ) -> Observation | None:
        """Follow errors from layer to layer. It reads each layer four more times, so for a large streamed model it is
        skipped while nothing has failed and no router is judged."""
        moe, failed = self.target.config.moe, self._names_of("failed")
        if self.streamed and not (plan.small or moe or failed or plan.budget == THOROUGH):
            counter.leave_out("how rounding grows from layer to layer, since nothing failed")
            return None
        self._progress("looking inside", 0, 1)
        return investigation.follow(LOOKED_INTO)

    def _measured_cost(self, plan: Plan) -> Cost | None:
        original = self.options.original or self.sources.original
        if original is None:
            return None
        assert self._oracle is not None
        return cost_of_quantization(
            self._oracle,
            self.target,
            self.checkpoint,
            original,
            self.prompts.take(min(COST_TOKENS, plan.context)),
            layers=self.layers,
            streamed=self.streamed,
            progress=self._progress if self.streamed else no_progress,
        )

    def _explain(self, bench: Bench) -> None:
        """Find where the failures start, and turn the random walk into a short script."""
        assert self._investigation is not None and self._runner is not None
        if not self._names_of("failed"):
            return
        self._progress("looking for where the error starts", 0, 1)
        rows.explain(self._investigation, self._runner.failed, self.results, self.rounding)
        if any(scenario.name == "random walk" for scenario, _ in self._runner.failed):
            assert self._judge is not None
            self.script = rows.replay_of_walk(bench, self._judge, self.target, self.streamed)

    def _names_of(self, status: str) -> list[str]:
        return [result.name for result in self.results if result.status == status]

    def _not_run(self, reason: str) -> None:
        self.results += [result_of(s, "not run", reason=reason) for s in SCENARIOS]
        self.complete = True

    # ------------------------------------------------------------------ the outcome

    def report(self) -> Report:
        """The report so far; scenarios that have not run are marked as interrupted."""
        target, investigation = self.target, self._investigation
        done = {result.name for result in self.results}
        planned = SCENARIOS if self._counter is None else scenarios(self._counter.plan)
        left = [
            result_of(scenario, "not run", reason="interrupted")
            for scenario in planned
            if scenario.name not in done
        ]
        return Report(
            target=str(target.path),
            judged_as=target.judged_as,
            target_dtype=target.dtype,
            compute_dtype=target.compute_dtype,
            reference=str(self.checkpoint),
            reference_mode="streamed" if self.streamed else "whole",
            reference_weights="" if self._oracle is None else self._oracle.reference.weights_note,
            layers_judged=self.layers,
            layers=target.config.num_hidden_layers,
            complete=self.complete,
            prompts=self.prompts.description,
            own_rounding=None if self._oracle is None else self._oracle.own_rounding,
            cost=self.cost,
            coverage=None if self._counter is None else self._counter.coverage(),
            loosened=() if self._judge is None else tuple(self._judge.loosened),
            scenarios=(*self.results, *left),
            layers_error=() if investigation is None else investigation.errors,
            rounding=tuple(self.rounding),
            fault=None if investigation is None else investigation.fault,
            unexplained=None if investigation is None else investigation.unexplained,
            script=self.script,
            routing=() if investigation is None else investigation.bands,
            replayed=0 if self._judge is None else self._judge.replayed,
            environment={
                **describe_environment(target.for_onnxruntime is None, target.merged),
                **_attention(target),
            },
            hashes=target.hashes(),
            weights_sha256=self.weights_sha256,
        )


def _attention(target: Target) -> dict[str, str]:
    """What a network's verdict is about besides the package."""
    if target.attention is None:
        return {}
    return {"attention": f"{target.attention}, for {', '.join(target.gpus)}"}


def _extent(target: Target, options: Options) -> tuple[int, bool]:
    """(decoder layers to run, whether one is loaded at a time).

    Raises:
        ValidationError: the options do not fit together, or do not fit the target.
    """
    find_budget(options.budget)
    if options.seed < 0:
        raise ValidationError(f"seed {options.seed} is negative")
    unknown = [name for name in options.thresholds if name not in THRESHOLDS]
    if unknown:
        raise ValidationError(f"threshold {unknown[0]!r} is not one of {', '.join(THRESHOLDS)}")
    every = target.config.num_hidden_layers
    layers = every if options.layers is None else options.layers
    if not 1 <= layers <= every:
        raise ValidationError(f"layers {layers}: the model has 1 to {every}")
    streamed = options.streamed
    if streamed is None:
        streamed = layers < every or must_stream(target)
    if layers < every and not streamed:
        raise ValidationError("fewer layers are for streamed validation")
    if streamed and (target.judged_as == ENGINE or target.device != "cpu"):
        if options.streamed or options.layers:
            what = "packages" if target.device == "cpu" else "what runs on the CPU"
            raise ValidationError(f"{target.path}: only {what} can be streamed")
        streamed = False
    return layers, streamed


def _original_context(target: Target) -> int | None:
    """Positions that the model was made for, where its rope settings go beyond them."""
    rope = target.config.rope
    original = rope.original_max_position_embeddings
    return original if rope.kind != "default" and original < target.capacity else None
