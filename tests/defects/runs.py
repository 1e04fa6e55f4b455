"""Ways of running a session, as data: what is done with it, and the logits that come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Logits = list[np.ndarray]
Act = Callable[[Any, np.random.Generator], Logits]

# ids of ordinary text: no "!" (0, the padding), and none that a defect picks out
ORDINARY = [token for token in range(1, 1900) if token not in (777, 1234, 1500)]


@dataclass(frozen=True)
class Run:
    """What is done with a session that nobody used before.

    Attributes:
        acts: one after the other.
        rows, capacity: of the session; capacity None for all positions.
        seed: of the tokens, which are the same for every session.
    """

    acts: tuple[Act, ...]
    rows: int = 1
    capacity: int | None = None
    seed: int = 7

    def play(self, session: Any) -> Logits:
        """The logits of every act."""
        rng = np.random.default_rng(self.seed)
        return [logits for act in self.acts for logits in act(session, rng)]


def run(*acts: Act, rows: int = 1, capacity: int | None = None, seed: int = 7) -> Run:
    return Run(acts, rows, capacity, seed)


def _text(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.choice(ORDINARY, length)]


def prefill(*lengths: int, all_logits: bool = False) -> Act:
    """As many drawn tokens for each row."""

    def act(session: Any, rng: np.random.Generator) -> Logits:
        return session.prefill([_text(rng, n) for n in lengths], all_logits=all_logits)

    return act


def decode(steps: int, rows: int = 1, idle: Sequence[int] = ()) -> Act:
    """One drawn token a row and step; `idle` rows get none."""

    def act(session: Any, rng: np.random.Generator) -> Logits:
        return [
            session.decode([None if r in idle else _text(rng, 1)[0] for r in range(rows)])
            for _ in range(steps)
        ]

    return act


def say(*tokens: int) -> Act:
    """These tokens in the first row, with all logits."""
    return lambda session, rng: session.prefill([list(tokens)], all_logits=True)


def reset(first_position: int = 0) -> Act:
    def act(session: Any, rng: np.random.Generator) -> Logits:
        session.reset(first_position=first_position)
        return []

    return act


def truncate(length: int, row: int = 0) -> Act:
    def act(session: Any, rng: np.random.Generator) -> Logits:
        session.truncate(length, row)
        return []

    return act


def pick(length: int, *picked: Sequence[int]) -> Act:
    """A first step of `length` tokens in each row that asks for the logits of picked positions, as many for each row.

    A session asks for one or for all; an engine's own user may ask for any.
    """

    def act(session: Any, rng: np.random.Generator) -> Logits:
        rows = len(picked)
        span = min(-(-length // 64) * 64, session.capacity)
        feeds = {
            "input_ids": np.array([_text(rng, length) for _ in picked]),
            "position_ids": np.tile(np.arange(length), (rows, 1)),
            "write_indices": np.zeros(rows, dtype=np.int64),
            "key_positions": np.arange(span),
            "logits_indices": np.array([list(row) for row in picked]),
        }
        return [session._step(feeds)]

    return act


USUAL = run(prefill(64, all_logits=True), decode(20))
"""A prompt with the logits of every token, and some tokens more."""
