"""Requests whose length scales queries and keys (dual chunk attention): which length the keys in a cache were made for.

A prompt's keys all have the factor of its full length; each decoded token's key has that of the length it makes. So a
prompt cannot continue keys with another factor: in a request of its own they would be different keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwenport.engines.errors import SessionError
from qwenport.engines.memory import untouched_zeros

Int64 = NDArray[np.int64]


class LengthScale:
    """The request lengths of the keys in a cache of `rows` rows of `capacity` slots.

    Attributes:
        unscaled: requests of at most so many positions are not scaled.
        held: int64 [rows, capacity], for each slot written the length of the request that its key is scaled by;
            `unscaled` for shorter ones, which have the same factor.
    """

    def __init__(self, unscaled: int, rows: int, capacity: int) -> None:
        self.unscaled = unscaled
        self.held = untouched_zeros((rows, capacity), np.dtype(np.int64))

    def begin(self, requests: Int64, lengths: Int64, given: Sequence[int]) -> None:
        """Check that prompts may be appended.

        Args:
            requests: int64 [rows], positions of each row's request.
            lengths: int64 [max_batch], tokens that the rows hold.
            given: tokens that each row is given.

        Raises:
            SessionError: a row holds keys with another factor.
        """
        for row, (request, count) in enumerate(zip(requests, given, strict=True)):
            held = self.held[row, : lengths[row]]
            other = held[held != max(request, self.unscaled)]
            if count and len(other):
                raise self._refusal(row, int(other[0]), int(request))

    def check_decode(self, requests: Int64, lengths: Int64, given: Sequence[int]) -> None:
        """Check that single tokens may follow; arguments as for `begin`.

        Raises:
            SessionError: a row was cut within a prompt, whose keys have the factor of all of it.
        """
        for row, (request, count) in enumerate(zip(requests, given, strict=True)):
            last = self.held[row, lengths[row] - 1] if lengths[row] else 0  # the largest
            if count and last > max(request, self.unscaled):
                raise self._refusal(row, int(last), int(request))

    def _refusal(self, row: int, held: int, request: int) -> SessionError:
        scaled = (
            f"scaled for a request of {held} positions" if held > self.unscaled else "not scaled"
        )
        return SessionError(
            f"row {row} holds keys that are {scaled}, and this request has {request}: lengths beyond "
            f"{self.unscaled} scale keys; reset the row and give it the whole prompt"
        )

    def reusable(self, row: int, length: int, request: int) -> int:
        """How many of the first `length` keys of a row have the factor of a request of `request` positions."""
        other = np.flatnonzero(self.held[row, :length] != max(request, self.unscaled))
        return int(other[0]) if len(other) else length

    def of_step(self, requests: Int64, starts: Int64, taken: Int64) -> Int64:
        """The lengths to feed to a step, int64 [rows], and keep them for the slots it writes.

        Args:
            requests: int64 [rows], positions of each row's request.
            starts: int64 [rows], the first slot that the step writes. A row without tokens may replay that slot's key.
            taken: int64 [rows], how many slots of each row hold tokens afterwards.
        """
        lengths = np.maximum(requests, self.unscaled)
        for row, (start, count) in enumerate(zip(starts, taken, strict=True)):
            if count:
                self.held[row, start : start + count] = lengths[row]
            elif self.held[row, start]:
                lengths[row] = self.held[row, start]
        return lengths
