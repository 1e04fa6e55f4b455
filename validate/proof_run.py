"""Runs of a proof's sequences: what their logits are, what rounding does to them, and what the routers chose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import Progress
from qwenport.engines import CachedSession, Fingerprints, ProofError

CHUNK = 64  # tokens whose logits are in memory at a time
# A router's choice may fall the other way if its margin is less than so many times what rounding moves its logits by.
ROUTER_SIGMAS = 6.0

Float64 = NDArray[np.float64]
Open = Callable[[Callable[[CachedSession], Any], Sequence[str]], CachedSession]
"""(what will be done, values to observe) -> a session to do it with."""


@dataclass(frozen=True)
class Router:
    """The values of a sparse layer: its router's logits [B, S, E], and the experts chosen [B, S, k]."""

    logits: str
    chosen: str


@dataclass(frozen=True)
class Rounded:
    """What a program that rounds its results was off by.

    Attributes:
        dtype: what it rounds to: "bf16", "fp16", INT8 or E4M3.
        errors: for each sequence, the errors at all positions.
        moved: of each layer, what its router's logits moved by, root mean square, [layers].
    """

    dtype: str
    errors: Sequence[Float64]
    moved: Float64


class ProofRun:
    """Runs the sequences, and keeps what the routers did.

    Attributes:
        sequence: the last sequence's number, the one for experts.
        chosen: the experts that its tokens go to, int64 [layers, tokens, k].
        experts: experts of a layer.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        prompts: Mapping[int, int],
        routers: Sequence[Router],
        progress: Progress,
    ) -> None:
        """`prompts`: sequence -> how many of its tokens are a prompt, if not all are."""
        self._sequences, self._prompts = sequences, prompts
        self._routers, self._progress = routers, progress
        self.sequence, self.experts = len(sequences) - 1, 0
        self.chosen = np.zeros((0, 0, 0), dtype=np.int64)
        self._margins: list[Float64] = []
        self._logits: list[list[Float64]] = []

    def exact(self, opened: Open) -> list[Fingerprints]:
        """Fingerprints of all positions, for each sequence.

        Raises:
            ProofError: a logit is not finite.
        """
        found: list[list[Fingerprints]] = [[] for _ in self._sequences]

        def take(sequence: int, start: int, logits: Any) -> None:
            if not np.isfinite(logits).all():
                raise ProofError("the package's logits are not all finite; validate says where")
            found[sequence].append(Fingerprints.of(logits))

        for values in self._feed(opened, take, "running the package for its proof"):
            margins = []
            for router in self._routers:
                logits, self.experts = values[router.logits], values[router.logits].shape[1]
                ordered, k = np.sort(logits, axis=1)[:, ::-1], values[router.chosen].shape[1]
                rest = ordered[:, k] if k < self.experts else -np.inf
                margins.append(ordered[:, k - 1] - rest)
            self._logits.append([values[router.logits] for router in self._routers])
            self._margins.append(np.stack(margins) if margins else np.zeros((0, 0)))
            if self._routers:
                self.chosen = np.stack([values[r.chosen] for r in self._routers]).astype(np.int64)
        return [Fingerprints.join(parts) for parts in found]

    def rounded(self, dtype: str, opened: Open, prints: Sequence[Fingerprints]) -> Rounded:
        """Run a program that rounds its results, after the exact one."""
        found = [np.zeros(len(tokens)) for tokens in self._sequences]

        def take(sequence: int, start: int, logits: Any) -> None:
            at = slice(start, start + len(logits))
            found[sequence][at] = prints[sequence].errors(range(start, at.stop), logits)

        squares: list[list[Float64]] = [[] for _ in self._routers]
        runs = self._feed(opened, take, "measuring what rounding does")
        for sequence, values in enumerate(runs):
            for layer, router in enumerate(self._routers):
                moved = values[router.logits] - self._logits[sequence][layer]
                squares[layer].append((moved**2).mean(axis=1))
        moved = np.array([math.sqrt(np.concatenate(s).mean()) for s in squares])
        return Rounded(dtype, found, moved)

    def near_ties(self, sequence: int, moved: Float64) -> NDArray[np.bool_]:
        """The tokens that rounding may send to other experts, bool [tokens].

        Args:
            sequence: which one.
            moved: what it moves each router's logits by, [layers].
        """
        if not self._routers:
            return np.zeros(len(self._sequences[sequence]), dtype=bool)
        limit = ROUTER_SIGMAS * moved
        near: NDArray[np.bool_] = np.any(self._margins[sequence] < limit[:, None], axis=0)
        return near

    def _feed(
        self, opened: Open, take: Callable[[int, int, Any], None], what: str
    ) -> list[dict[str, Any]]:
        """Feed every sequence; returns the observed values of each, [tokens, ...]."""
        total, done = sum(map(len, self._sequences)), 0
        observe = [name for router in self._routers for name in (router.logits, router.chosen)]
        session = opened(lambda session: [*self._steps(session)], observe)
        found: list[list[dict[str, Any]]] = [[] for _ in self._sequences]
        for sequence, start, logits in self._steps(session):
            take(sequence, start, logits)
            found[sequence].append(session.observed)
            done += len(logits)
            self._progress(what, done, total)
        return [
            {name: np.concatenate([step[name][0] for step in steps]) for name in observe}
            for steps in found
        ]

    def _steps(self, session: CachedSession) -> Iterator[tuple[int, int, Any]]:
        """Feed every sequence to a session; yields sequence, position and logits [n, vocab]."""
        for number, tokens in enumerate(self._sequences):
            session.reset()
            prompt = self._prompts.get(number, len(tokens))
            for start in range(0, prompt, CHUNK):
                given = tokens[start : min(start + CHUNK, prompt)]
                (logits,) = session.prefill([given], all_logits=True, prompt_lengths=[prompt])
                yield number, start, logits
            for position in range(prompt, len(tokens)):
                yield number, position, session.decode([tokens[position]])
