"""A session whose logits depend on all tokens of a row, and what one row alone must generate on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwenport.engines import Generated, Sampler, SamplingParams

VOCAB = 11
TABLE = (np.random.default_rng(1).standard_normal((97, VOCAB)) * 2).astype(np.float32)


def model(history: Sequence[int]) -> np.ndarray:
    """float32 [VOCAB] that depends on every token of the history and on their order."""
    state = 1
    for token in history:
        state = (state * 31 + token + 1) % 1_000_003
    return TABLE[state % len(TABLE)]


class FakeSession:
    """The protocol's rules as assertions; returned arrays are spoilt by the next step."""

    vocab_size = VOCAB

    def __init__(self, max_batch: int, capacity: int, max_step_tokens: int = 99) -> None:
        self.max_batch, self.capacity = max_batch, capacity
        self.max_step_tokens = max_step_tokens
        self.held = [[] for _ in range(max_batch)]
        self.clean = False  # a reset must come first
        self.prefills, self.decodes, self.stated, self._given = [], [], [], []

    def reset(self) -> None:
        self.held = [[] for _ in range(self.max_batch)]
        self.clean = True

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.held])

    @property
    def free_slots(self) -> np.ndarray:
        return self.capacity - self.lengths

    def _append(self, tokens: Sequence[Sequence[int]]) -> None:
        assert self.clean
        assert len(tokens) <= self.max_batch
        assert any(len(row) for row in tokens), "a step in which every row idles"
        assert all(len(row) <= self.max_step_tokens for row in tokens)
        for old in self._given:
            old[...] = np.nan
        for row, new in zip(self.held, tokens, strict=False):
            assert all(type(t) is int and 0 <= t < VOCAB for t in new)
            assert len(row) + len(new) <= self.capacity
            row.extend(new)

    def prefill(  # last logits only
        self, tokens: Sequence[Sequence[int]], *, prompt_lengths: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        self._append(tokens)
        self.stated.append(prompt_lengths)
        self.prefills.append([len(row) for row in tokens])
        self._given = [
            model(held)[None].copy() if len(new) else np.empty((0, VOCAB), np.float32)
            for held, new in zip(self.held, tokens, strict=False)
        ]
        return self._given

    def decode(self, token_ids: Sequence[int | None]) -> np.ndarray:
        self._append([[] if t is None else [t] for t in token_ids])
        self.decodes.append([t is not None for t in token_ids])
        out = np.full((len(token_ids), VOCAB), np.nan, np.float32)  # NaN: idle rows are not read
        for b in [b for b, token in enumerate(token_ids) if token is not None]:
            out[b] = model(self.held[b])
        self._given = [out]
        return out


def reference(
    prompt: list[int],
    row: int,
    params: SamplingParams,
    max_new: int,
    stop: set[int],
    capacity: int,
    before: Sequence[int] = (),
    sequences: Sequence[Sequence[int]] = (),
) -> tuple[Generated, list[int]]:
    """One row alone: its result and what the cache holds."""
    sampler, new, held = Sampler(params, row=row), [], [*before, *prompt]
    while True:
        token = sampler.sample(model(held), prompt + new)
        if token in stop:
            return Generated(new, "stop", token, [token]), held
        new.append(token)
        complete = [i for i, s in enumerate(sequences) if new[-len(s) :] == list(s)]
        if complete:
            longest = min(complete, key=lambda i: (-len(sequences[i]), i))
            kept = new[: len(new) - len(sequences[longest])]
            return Generated(kept, "stop", None, [token], longest), held
        if len(new) == max_new:
            return Generated(new, "length", None, [token]), held
        if len(held) == capacity:
            return Generated(new, "capacity", None, [token]), held
        held.append(token)
