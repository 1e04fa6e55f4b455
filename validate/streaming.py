"""A target larger than memory: its decoder layers are loaded one at a time, and each runs every step of every scenario.

No scenario looks at what the target answers. So all are rehearsed first on a session that only keeps what it is fed;
then the parts of the model run in order, each over all steps; then the scenarios run for good on a session that
gives the answers back. The arithmetic of a step is the same as in a session that holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qwenport.engines import CachedSession
from qwenport.engines.session import Float32, Int64

MAX_STEP_TOKENS = 512

Feeds = Mapping[str, Int64]
Progress = Callable[[str, int, int], None]
Run = Callable[[Feeds, Any], "tuple[Any, dict[str, Any]]"]
"""(a step's inputs, hidden states or None) -> (hidden states or logits, observed values)."""


class Parts(Protocol):
    """A model in parts that can be loaded one at a time. Parts are run in order, a part's steps in order.

    Hidden states are passed from part to part as they are; only the parts know what they are.
    """

    num_layers: int

    def prologue(self, observe: Sequence[str]) -> AbstractContextManager[Run]:
        """Token ids -> hidden states."""
        ...

    def layer(
        self, index: int, max_batch: int, observe: Sequence[str]
    ) -> AbstractContextManager[Run]:
        """A decoder layer with its cache of `max_batch` rows, zeroed."""
        ...

    def epilogue(self, observe: Sequence[str]) -> AbstractContextManager[Run]:
        """Hidden states -> logits fp32 [rows, n, vocab]."""
        ...


@dataclass(frozen=True)
class Geometry:
    """What a session's bookkeeping needs to know; it must be the same in the rehearsal and for good."""

    max_batch: int
    capacity: int
    vocab_size: int
    max_positions: int

    def arguments(self) -> dict[str, int]:
        """Arguments of `CachedSession`."""
        return {
            **vars(self),
            "max_step_tokens": MAX_STEP_TOKENS,
            "max_step_logits": MAX_STEP_TOKENS,
        }


class _Rehearsal(CachedSession):
    """Keeps what every step is fed, and answers zeros."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(**geometry.arguments())
        self.steps: list[dict[str, Int64]] = []

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        self.steps.append({name: array.copy() for name, array in feeds.items()})
        return np.zeros((*feeds["logits_indices"].shape, self.vocab_size), dtype=np.float32)


class _Replay(CachedSession):
    """Gives each step's logits and observed values back, in the order of the rehearsal."""

    def __init__(
        self, geometry: Geometry, answers: Iterator[tuple[Float32, dict[str, Any]]]
    ) -> None:
        super().__init__(**geometry.arguments())
        self._answers = answers

    def _step(self, feeds: dict[str, Int64]) -> Float32:
        logits, self.observed = next(self._answers)
        return logits


def stream(
    parts: Parts,
    geometry: Geometry,
    rehearse: Callable[[CachedSession], None],
    observe: Sequence[str] = (),
    progress: Progress = lambda what, done, total: None,
) -> CachedSession:
    """A session that gives the answers of the whole model to exactly what `rehearse` does.

    Args:
        parts: the model.
        geometry: of the session.
        rehearse: uses a session as it will be used for good.
        observe: values of the graph that each step leaves in `observed`.
        progress: called with (what, parts done, parts in all).
    """
    rehearsal = _Rehearsal(geometry)
    rehearse(rehearsal)
    steps = rehearsal.steps
    names = _by_part(observe, parts.num_layers)
    observed: list[dict[str, Any]] = [{} for _ in steps]
    total = parts.num_layers + 2

    def run(part: int, context: AbstractContextManager[Run], given: Sequence[Any]) -> list[Any]:
        with context as compute:
            results = []
            for step, feeds in enumerate(steps):
                result, seen = compute(feeds, given[step])
                observed[step] |= seen
                results.append(result)
        progress("running the target layer by layer", part + 1, total)
        return results

    hidden = run(0, parts.prologue(names[0]), [None] * len(steps))
    for index in range(parts.num_layers):
        context = parts.layer(index, geometry.max_batch, names[index + 1])
        hidden = run(index + 1, context, hidden)
    logits = run(total - 1, parts.epilogue(names[-1]), hidden)
    return _Replay(geometry, iter(list(zip(logits, observed, strict=True))))


def _by_part(observe: Sequence[str], layers: int) -> list[list[str]]:
    """Which part makes which observed value, by the scope in its name."""
    parts: list[list[str]] = [[] for _ in range(layers + 2)]
    for name in observe:
        scope = name.split(".")
        if scope[:2] == ["model", "layers"]:
            if int(scope[2]) < layers:
                parts[int(scope[2]) + 1].append(name)
        else:
            parts[0 if scope[:2] == ["model", "embed_tokens"] else -1].append(name)
    return parts
