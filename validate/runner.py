"""Runs every scenario on a session of the target and passes the results to the judge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwenport.contract import Progress
from qwenport.validate.candidate import Refused
from qwenport.validate.coverage import Counter
from qwenport.validate.investigation import Bench, Investigation
from qwenport.validate.judge import Judge, result_of
from qwenport.validate.report import ScenarioResult
from qwenport.validate.run import CandidateError, NotApplicable, Observation
from qwenport.validate.scenarios import Scenario, scenarios


class Runner:
    """Runs the scenarios of one validation.

    Attributes:
        failed: the failed scenarios and their observations; None if the target failed while it ran.
    """

    def __init__(
        self,
        bench: Bench,
        judge: Judge,
        counter: Counter,
        investigation: Investigation,
        streamed: bool,
        progress: Progress,
    ) -> None:
        self.failed: list[tuple[Scenario, Observation | None]] = []
        self._bench, self._judge, self._counter = bench, judge, counter
        self._investigation, self._streamed, self._progress = investigation, streamed, progress
        self._scenarios = scenarios(bench.plan)
        self._sessions: dict[int, Any] = {}
        self._results: list[ScenarioResult] = []

    def run(self, results: list[ScenarioResult]) -> None:
        """Run and judge all scenarios; each result is added to `results` as soon as it is known.

        Raises:
            ValidationError, MissingExtraError, SessionError, EngineError: see `Candidate.open`.
        """
        self._results = results
        bench = self._bench
        groups: dict[int, list[Scenario]] = {}
        for scenario in self._scenarios:
            groups.setdefault(bench.capacity_of(scenario), []).append(scenario)
        uses = [
            (bench.max_batch, capacity, bench.rehearsal(group))
            for capacity, group in groups.items()
        ]
        try:
            self._sessions = dict(zip(groups, bench.candidate.open(uses), strict=True))
        except Refused as error:
            results += [result_of(s, "failed", reason=str(error)) for s in self._scenarios]
            return
        if self._streamed:
            self._run_streamed()
            return
        for done, scenario in enumerate(self._scenarios):
            self._progress(scenario.name, done, len(self._scenarios))
            with self._judging(scenario) as started:
                self._take(scenario, self._observe(scenario), started)

    def _run_streamed(self) -> None:
        """Compute every scenario's logits, then the oracle's for all of them in one pass."""
        found: dict[str, Observation] = {}
        before = len(self._results)
        for scenario in self._scenarios:
            with self._judging(scenario):
                found[scenario.name] = self._observe(scenario)
        self._judge.ask([text for observation in found.values() for text in observation.texts])
        for scenario in self._scenarios:
            if scenario.name in found:
                with self._judging(scenario) as started:
                    self._take(scenario, found.pop(scenario.name), started)
        order = [scenario.name for scenario in self._scenarios]
        self._results[before:] = sorted(
            self._results[before:], key=lambda result: order.index(result.name)
        )

    def _observe(self, scenario: Scenario) -> Observation:
        session = self._sessions[self._bench.capacity_of(scenario)]
        run = self._bench.make_run(session, on_step=self._counter.step)
        scenario.run(run)
        return run.observation()

    @contextmanager
    def _judging(self, scenario: Scenario) -> Iterator[float]:
        """Record the result of a scenario that cannot run, or whose target fails."""
        started = time.monotonic()
        try:
            yield started
        except CandidateError as error:
            self._results.append(result_of(scenario, "failed", reason=str(error), started=started))
            self.failed.append((scenario, None))
        except NotApplicable as reason:
            self._results.append(
                result_of(scenario, "not run", reason=str(reason), started=started)
            )

    def _take(self, scenario: Scenario, observation: Observation, started: float) -> None:
        result = self._judge.judge(
            scenario, observation, lambda: self._investigation.choices(scenario), started
        )
        self._counter.judged(observation)
        self._results.append(result)
        if result.status == "failed":
            self.failed.append((scenario, observation))
