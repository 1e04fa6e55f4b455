"""A target larger than memory: its decoder layers are loaded one at a time, and each runs every step of every scenario.

No scenario depends on what the target returns. So all are first rehearsed on sessions that only record their inputs;
then the parts of the model run in order, each over all steps; then the scenarios run for real on sessions that
return the results. The arithmetic of a step is the same as in a session that holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qwenport.contract import LOGITS_INDICES, Progress, no_progress
from qwenport.engines import CachedSession
from qwenport.engines.session import Float32, Int64
from qwenport.engines.spans import Spans
from qwenport.validate.sites import EMBEDDING

Feeds = Mapping[str, Int64]
Run = Callable[[int, Feeds, Any], "tuple[Any, dict[str, Any]]"]
"""(which session, a step's inputs, hidden states or None) -> (hidden states or logits, observed values)."""


@dataclass(frozen=True)
class Geometry:
    """The size of a session and the limits of its steps; the arguments of `CachedSession`."""

    max_batch: int
    capacity: int
    vocab_size: int
    max_step_tokens: int
    max_step_logits: int
    max_positions: int
    spans: Spans | None = None
    unscaled_length: int | None = None
    score_bytes: int = 0


class Parts(Protocol):
    """A model in parts that can be loaded one at a time. Parts run in order, and so do a part's steps.

    Hidden states are passed from part to part unchanged; only the parts know their type.
    """

    num_layers: int

    def prologue(self, observe: Sequence[str]) -> AbstractContextManager[Run]:
        """Token ids -> hidden states."""
        ...

    def layer(
        self, index: int, sizes: Sequence[Geometry], observe: Sequence[str]
    ) -> AbstractContextManager[Run]:
        """A decoder layer with a zeroed cache for each of several sessions."""
        ...

    def epilogue(self, observe: Sequence[str]) -> AbstractContextManager[Run]:
        """Hidden states -> logits fp32 [rows, n, vocab]."""
        ...


@dataclass(frozen=True)
class Use:
    """A session of some size and what will be done with it."""

    geometry: Geometry
    rehearse: Callable[[CachedSession], None]


class Rehearsal(CachedSession):
    """Records the inputs of every step, and returns zeros."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(**vars(geometry))
        self.steps: list[dict[str, Int64]] = []

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        self.steps.append({name: array.copy() for name, array in feeds.items()})
        # one zero broadcast to all logits: for a large vocabulary they would take gigabytes
        shape = (*feeds[LOGITS_INDICES].shape, self.vocab_size)
        return np.broadcast_to(np.zeros((), dtype=np.float32), shape)


class _Replay(CachedSession):
    """Returns each step's logits and observed values, in the order of the rehearsal."""

    def __init__(
        self, geometry: Geometry, answers: Iterator[tuple[Float32, dict[str, Any]]]
    ) -> None:
        super().__init__(**vars(geometry))
        self._answers = answers

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        logits, self.observed = next(self._answers)
        return logits


def stream(
    parts: Parts,
    uses: Sequence[Use],
    observe: Sequence[str] = (),
    progress: Progress = no_progress,
) -> list[CachedSession]:
    """Sessions that return the whole model's results for exactly what their `rehearse` does.

    Args:
        parts: the model.
        uses: the sessions; all run while a part is loaded.
        observe: values of the graph that each step leaves in `observed`.
        progress: called with (what, parts done, all parts).
    """
    steps: list[tuple[int, dict[str, Int64]]] = []
    for number, use in enumerate(uses):
        rehearsal = Rehearsal(use.geometry)
        use.rehearse(rehearsal)
        steps += [(number, feeds) for feeds in rehearsal.steps]
    names = _by_part(observe, parts.num_layers)
    observed: list[dict[str, Any]] = [{} for _ in steps]
    total = parts.num_layers + 2

    def run(part: int, context: AbstractContextManager[Run], given: list[Any]) -> list[Any]:
        with context as compute:
            for index, (number, feeds) in enumerate(steps):
                given[index], seen = compute(number, feeds, given[index])
                observed[index] |= seen
        progress("running the target layer by layer", part + 1, total)
        return given

    values = run(0, parts.prologue(names[0]), [None] * len(steps))
    geometries = [use.geometry for use in uses]
    for index in range(parts.num_layers):
        values = run(index + 1, parts.layer(index, geometries, names[index + 1]), values)
    values = run(total - 1, parts.epilogue(names[-1]), values)
    return [
        _Replay(use.geometry, _answers(steps, values, observed, number))
        for number, use in enumerate(uses)
    ]


def _answers(
    steps: list[tuple[int, dict[str, Int64]]],
    values: list[Any],
    observed: list[dict[str, Any]],
    number: int,
) -> Iterator[tuple[Float32, dict[str, Any]]]:
    for index, (owner, _) in enumerate(steps):
        if owner == number:
            answer = values[index], observed[index]
            values[index], observed[index] = None, {}  # logits are large: returned once
            yield answer


def _by_part(observe: Sequence[str], layers: int) -> list[list[str]]:
    """Which part produces which observed value, by the scope in its name."""
    parts: list[list[str]] = [[] for _ in range(layers + 2)]
    for name in observe:
        scope = name.split(".")
        if scope[:2] == ["model", "layers"]:
            if int(scope[2]) < layers:
                parts[int(scope[2]) + 1].append(name)
        else:
            parts[0 if name == EMBEDDING else -1].append(name)
    return parts
