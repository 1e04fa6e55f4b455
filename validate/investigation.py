"""Finds where a failure starts: runs a failed scenario again with observed values, layer by layer, then inside one.

Logits are always judged on the unchanged target; the graph observed here is the same one with more outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwenport.exporter import ModelConfig
from qwenport.validate import localisation
from qwenport.validate.budget import Plan
from qwenport.validate.candidate import Candidate, Refused
from qwenport.validate.localisation import WHOLE_LAYER, Fault, OperatorError
from qwenport.validate.oracle import Oracle
from qwenport.validate.prompts import Prompts
from qwenport.validate.report import RouterBand
from qwenport.validate.run import CandidateError, NotApplicable, Observation, Observing, Run
from qwenport.validate.scenarios import Scenario
from qwenport.validate.sites import hidden_states, layer_output, router_choices
from qwenport.validate.text import Choices, Text

MOST_LOOKED_INTO = 4  # failed scenarios to investigate; each is run again, layer by layer

MakeRun = Callable[..., Run]
"""(session, keywords of `Run`) -> a run."""


@dataclass(frozen=True)
class Bench:
    """How scenarios are run on sessions.

    Attributes:
        candidate: the target.
        make_run: makes a run on a session.
        prompts, plan: arguments for the runs.
    """

    candidate: Candidate
    make_run: MakeRun
    prompts: Prompts
    plan: Plan

    @property
    def max_batch(self) -> int:
        """Rows of every session."""
        return self.plan.rows

    def capacity_of(self, scenario: Scenario) -> int:
        """Cache slots of the scenario's session."""
        return min(self.plan.capacity, scenario.capacity or self.plan.capacity)

    def rehearsal(self, scenarios: Sequence[Scenario]) -> Callable[[Any], None]:
        """A function that uses a session as these scenarios will."""

        def rehearse(session: Any) -> None:
            for scenario in scenarios:
                try:
                    scenario.run(self.make_run(session, keep=False))
                except NotApplicable:
                    continue

        return rehearse

    def observe(
        self, scenario: Scenario, names: Sequence[str], observing: Observing | None = None
    ) -> Observation | None:
        """Run a scenario on a session that exposes values of its graph; None if it fails."""
        use = (self.max_batch, self.capacity_of(scenario), self.rehearsal([scenario]))
        try:
            (session,) = self.candidate.open([use], names)
            run = self.make_run(session, observing=observing or Observing())
            scenario.run(run)
            return run.observation()
        except (Refused, CandidateError, NotApplicable):
            return None


class Investigation:
    """Investigates one target. An engine's inner values cannot be observed.

    Attributes:
        errors: how the error grows from layer to layer on a short text; empty until `follow`.
        fault: where the error starts, once found.
        unexplained: why it was not found; None if it was, or if nothing failed.
        routers: sparse layer -> the value that holds each token's experts.
        rounded: layer -> path of a linear in it -> the value that is its input, rounded to FP8.
        router_margin: the largest margin of a router near-tie, in logits.
        bands: agreement of expert choices by margin, once counted.
    """

    def __init__(
        self, bench: Bench, oracle: Oracle, config: ModelConfig, dtype: str, router_margin: float
    ) -> None:
        self._bench, self._oracle = bench, oracle
        self._reference = oracle.reference
        self._config, self._dtype, self.router_margin = config, dtype, router_margin
        self.routers = router_choices(config, self._reference.num_layers)
        self.rounded = bench.candidate.rounded_inputs(self._reference.num_layers)
        self._choosing = [
            *self.routers.values(),
            *dict.fromkeys(name for paths in self.rounded.values() for name in paths.values()),
        ]
        self._names = [*hidden_states(self._reference.num_layers), *self._choosing]
        self.errors: tuple[OperatorError, ...] = ()
        self.fault: Fault | None = None
        self.unexplained: str | None = None
        self.bands: tuple[RouterBand, ...] = ()

    @property
    def can_observe(self) -> bool:
        """Whether the target's inner values can be observed."""
        return self._bench.candidate.can_be_observed

    @property
    def missing(self) -> list[str]:
        """Values that the target's graph lacks although it should have them, or that nothing reads."""
        if not self._bench.candidate.can_be_observed:
            return list(self._names)
        return [name for name in self._names if not self._bench.candidate.uses(name)]

    def choices(self, scenario: Scenario) -> list[Choices] | None:
        """The experts and codes that the target chose for a scenario's texts; None if they cannot be observed."""
        if not self._choosing or not self._bench.candidate.can_be_observed:
            return None
        observation = self._bench.observe(scenario, self._choosing)
        return None if observation is None else self.choices_seen(observation)

    def choices_seen(self, observation: Observation) -> list[Choices] | None:
        """The same from an observation that includes them."""
        if not self._choosing:
            return None
        return [
            Choices(
                {layer: seen[name] for layer, name in self.routers.items()},
                self.router_margin,
                {
                    layer: {path: seen[name].astype(np.float32) for path, name in paths.items()}
                    for layer, paths in self.rounded.items()
                },
            )
            for seen in observation.seen
        ]

    def follow(self, scenario: Scenario) -> Observation | None:
        """Follow errors from layer to layer on a short text. None if the target cannot be observed."""
        if self.missing:
            return None
        observation = self._bench.observe(scenario, self._names)
        if observation is not None:
            self.errors = self._by_layer(observation)
        return observation

    def explain(self, failed: Sequence[tuple[Scenario, Observation | None]]) -> None:
        """Find where the error starts, from the first scenario that reveals it.

        Args:
            failed: the failed scenarios and their observations.
        """
        candidate = self._bench.candidate
        if not candidate.can_be_observed:
            self.unexplained = (
                "an engine cannot be looked into: judge its package, and the package as a network"
            )
            return
        layers = self._reference.num_layers
        unused = [i for i in range(layers) if not candidate.uses(layer_output(i))]
        if unused:
            self.fault = localisation.fault_cut_off(unused[0])
            return
        if self.missing:
            self.unexplained = (
                f"the graph has no value {self.missing[0]}, which the exporter writes"
            )
            return
        for scenario, observation in failed[:MOST_LOOKED_INTO]:
            self._explain(scenario, observation)
            if self.fault is not None:
                return
        if failed:
            names = ", ".join(scenario.name for scenario, _ in failed[:3])
            self.unexplained = (
                f"in {names} every layer and the head, given the target's own input, do what transformers' do: the "
                "error lies in how the steps are put together, or does not show while values are looked at"
            )

    def _explain(self, scenario: Scenario, before: Observation | None) -> None:
        chosen = self._worst(before)
        lineage = None if chosen is None or before is None else before.lineage[chosen]
        observation = self._bench.observe(scenario, self._names, Observing(lineage=lineage))
        if observation is None:
            return
        observation = _only(observation, chosen)
        if self._nonfinite(scenario, observation):
            return
        errors = self._by_layer(observation)
        bad = localisation.worst(errors)
        if bad == 0:
            self.fault = localisation.fault_outside(scenario.name, "embed_tokens", 0.0, errors[0])
        elif bad is not None:
            self._look_into(scenario, errors, bad, lineage, chosen)
        else:
            self._look_at_the_end(scenario, observation, errors[-1].accumulated)

    def _look_into(
        self,
        scenario: Scenario,
        errors: Sequence[OperatorError],
        bad: int,
        lineage: frozenset[int] | None,
        chosen: int | None,
    ) -> None:
        layer = bad - 1
        sites = localisation.observed_sites(self._config, layer, self._bench.candidate.uses)
        wanted = [hidden_states(layer + 1)[layer], *sites]
        if layer in self.routers:
            wanted.append(self.routers[layer])
        heads = frozenset(name for name, site in sites.items() if site.heads)
        names = list(dict.fromkeys(wanted))
        looked = self._bench.observe(scenario, names, Observing(heads, lineage))
        operators: tuple[OperatorError, ...] = ()
        if looked is not None:
            looked = _only(looked, chosen)
            operators = localisation.errors_in_layer(
                self._reference, self._config, layer, looked.texts, looked.seen, self._dtype, sites
            )
        self.fault = localisation.fault_in_layer(
            scenario.name, self._config, layer, errors[bad], errors[bad - 1].accumulated, operators
        )

    def _look_at_the_end(self, scenario: Scenario, observation: Observation, before: float) -> None:
        sizes = np.cumsum([len(text.positions) for text in observation.texts])[:-1]
        end = localisation.errors_at_the_end(
            self._reference,
            observation.texts,
            observation.seen,
            np.split(observation.candidate, sizes),
            self._oracle.logits(observation.texts),
            self._dtype,
        )
        if localisation.worst([end]) is not None:
            self.fault = localisation.fault_outside(scenario.name, end.name, before, end)

    def _nonfinite(self, scenario: Scenario, observation: Observation) -> bool:
        """Name the first layer that produces a NaN or an infinity, if any."""
        for text, seen in zip(observation.texts, observation.seen, strict=True):
            for index, name in enumerate(hidden_states(self._reference.num_layers)):
                if not np.isfinite(seen[name]).all():
                    where = "embed_tokens" if index == 0 else f"layer {index - 1}, {WHOLE_LAYER}"
                    theirs = self.theirs(text, self._dtype)
                    self.fault = localisation.fault_nonfinite(
                        scenario.name, None if index == 0 else index - 1, where, theirs
                    )
                    return True
        return False

    def theirs(self, text: Text, dtype: str) -> str:
        """A sentence on whether transformers' own run is finite there."""
        found = self._reference.first_nonfinite(text, dtype)
        if found is None:
            return f"transformers' own run in {dtype} is finite there."
        where = f"layer {found}" if isinstance(found, int) else f"the {found}"
        return f"transformers' own run in {dtype} is not finite either, from {where} on."

    def _worst(self, observation: Observation | None) -> int | None:
        """The text with the largest error."""
        if observation is None or len(observation.texts) == 1:
            return None
        sizes = np.cumsum([len(text.positions) for text in observation.texts])[:-1]
        parts = np.split(observation.candidate, sizes)
        right = self._oracle.logits(observation.texts)

        def distance(made: Any, expected: Any) -> float:
            with np.errstate(all="ignore"):
                value = np.linalg.norm(made - expected, axis=1) / np.linalg.norm(expected, axis=1)
            return float(np.nan_to_num(value, nan=np.inf).max())

        distances = [distance(a, b) for a, b in zip(parts, right, strict=True)]
        return int(np.argmax(distances))

    def _by_layer(self, observation: Observation) -> tuple[OperatorError, ...]:
        return localisation.errors_by_layer(
            self._reference,
            observation.texts,
            observation.seen,
            self._dtype,
            self.choices_seen(observation),
        )


def _only(observation: Observation, chosen: int | None) -> Observation:
    """The observation of one text, or of all for None."""
    if chosen is None:
        return observation
    before = sum(len(text.positions) for text in observation.texts[:chosen])
    rows = slice(before, before + len(observation.texts[chosen].positions))
    return Observation(
        observation.candidate[rows],
        observation.labels[rows],
        observation.texts[chosen : chosen + 1],
        observation.seen[chosen : chosen + 1],
        observation.lineage[chosen : chosen + 1],
    )
