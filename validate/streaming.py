"""A target larger than memory: its decoder layers are loaded one at a time, and each runs every step of every scenario.

No scenario looks at what the target answers. So all are rehearsed first on sessions that only keep what they are fed;
then the parts of the model run in order, each over all steps; then the scenarios run for good on sessions that
give the answers back. The arithmetic of a step is the same as in a session that holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qwenport.engines import CachedSession
from qwenport.engines.session import Float32, Int64
from qwenport.validate.sites import EMBEDDING

Feeds = Mapping[str, Int64]
Progress = Callable[[str, int, int], None]
Run = Callable[[int, Feeds, Any], "tuple[Any, dict[str, Any]]"]
"""(which session, a step's inputs, hidden states or None) -> (hidden states or logits, observed values)."""


@dataclass(frozen=True)
class Geometry:
    """The size of a session, and what one of its steps takes; the arguments of `CachedSession`."""

    max_batch: int
    capacity: int
    vocab_size: int
    max_step_tokens: int
    max_step_logits: int
    max_positions: int


class Parts(Protocol):
    """A model in parts that can be loaded one at a time. Parts are run in order, a part's steps in order.

    Hidden states are passed from part to part as they are; only the parts know what they are.
    """

    num_layers: int

    def prologue(self, observe: Sequence[str]) -> AbstractContextManager[Run]:
        """Token ids -> hidden states."""
        ...

    def layer(
        self, index: int, sizes: Sequence[Geometry], observe: Sequence[str]
    ) -> AbstractContextManager[Run]:
        """A decoder layer with a cache, zeroed, for each of several sessions."""
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
    """Keeps what every step is fed, and answers zeros."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(**vars(geometry))
        self.steps: list[dict[str, Int64]] = []

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        self.steps.append({name: array.copy() for name, array in feeds.items()})
        # one zero that looks like all logits: of a large vocabulary they would be gigabytes
        shape = (*feeds["logits_indices"].shape, self.vocab_size)
        return np.broadcast_to(np.zeros((), dtype=np.float32), shape)


class _Replay(CachedSession):
    """Gives each step's logits and observed values back, in the order of the rehearsal."""

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
    progress: Progress = lambda what, done, total: None,
) -> list[CachedSession]:
    """Sessions that give the answers of the whole model to exactly what their `rehearse` does.

    Args:
        parts: the model.
        uses: the sessions; all run while a part is loaded.
        observe: values of the graph that each step leaves in `observed`.
        progress: called with (what, parts done, parts in all).
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
            values[index], observed[index] = None, {}  # logits are large: given once
            yield answer


def _by_part(observe: Sequence[str], layers: int) -> list[list[str]]:
    """Which part makes which observed value, by the scope in its name."""
    parts: list[list[str]] = [[] for _ in range(layers + 2)]
    for name in observe:
        scope = name.split(".")
        if scope[:2] == ["model", "layers"]:
            if int(scope[2]) < layers:
                parts[int(scope[2]) + 1].append(name)
        else:
            parts[0 if name == EMBEDDING else -1].append(name)
    return parts
