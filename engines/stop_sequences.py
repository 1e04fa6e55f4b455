"""Ending a row at a sequence of tokens (or a text at a string): which one it ends with, and what may still become one.

Each sequence is matched with the failure function of Knuth, Morris and Pratt (1977), so a token costs a few comparisons
per sequence, however long that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _failure(sequence: Sequence[Any]) -> list[int]:
    """For each prefix, the length of the longest shorter prefix that it ends with."""
    lengths, matched = [0], 0
    for token in sequence[1:]:
        matched = _advance(sequence, lengths, matched, token)
        lengths.append(matched)
    return lengths


def _advance(sequence: Sequence[Any], failure: Sequence[int], matched: int, token: Any) -> int:
    while matched and sequence[matched] != token:
        matched = failure[matched - 1]
    return matched + 1 if sequence[matched] == token else 0


class StopSequences:
    """The stop sequences of one row, none empty, and how much of each its new tokens end with.

    Of a text the tokens are its characters.
    """

    def __init__(self, sequences: Sequence[Sequence[Any]]) -> None:
        self._sequences = sequences
        self._failures = [_failure(sequence) for sequence in sequences]
        self._matched = [0] * len(sequences)

    def push(self, token: Any) -> int | None:
        """Append a new token; the row ends with the first that completes a sequence.

        Returns:
            The index of the sequence that the new tokens end with: of several the longest, of equal ones the first.
            None if there is none.
        """
        complete = []
        for i, (sequence, failure) in enumerate(zip(self._sequences, self._failures, strict=True)):
            self._matched[i] = _advance(sequence, failure, self._matched[i], token)
            if self._matched[i] == len(sequence):
                complete.append(i)
        return max(complete, key=self._matched.__getitem__, default=None)

    @property
    def undecided(self) -> int:
        """How many of the last new tokens may be the beginning of a sequence."""
        return max(self._matched, default=0)
