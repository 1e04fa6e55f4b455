"""Sessions: a model with its KV cache, fed token by token.

`Session` is the protocol that everything above it uses. `CachedSession` does what every implementation
needs: padding, positions, cache slots, active span and capacity. An implementation runs one step.

Rows are right-padded. A pad token's key and value land in slots that no query attends to before a real
token overwrites them, so a ragged batch needs no padding mask. A row with nothing to do in a step is all
padding; if it is full, it replays its last token into that token's own slot.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwenport.engines.errors import CapacityError, SessionError

SPAN_MULTIPLE = 64  # the active part of the cache is rounded up to this many slots

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class Session(Protocol):
    """A model with a KV cache of `max_batch` rows of `capacity` slots."""

    max_batch: int
    capacity: int
    vocab_size: int

    @property
    def lengths(self) -> Int64:
        """int64 [max_batch]: how many tokens each row holds."""
        ...

    def prefill(
        self, tokens: Sequence[Sequence[int]], *, all_logits: bool = False
    ) -> list[Float32]:
        """Append tokens[b] to row b; call again to continue (chunked prefill). Rows may be empty.

        Returns:
            For each row fp32 [1, vocab], the logits after its last token, or with `all_logits`
            [len(tokens[b]), vocab]. [0, vocab] for an empty row.

        Raises:
            CapacityError: a row would pass the capacity; nothing was written.
            SessionError: too many rows, or a token id outside the vocabulary.
        """
        ...

    def decode(self, token_ids: Sequence[int | None]) -> Float32:
        """Append one token a row (None: leave the row alone); return fp32 [rows, vocab].

        A row left alone has zeros. Raises as `prefill` does.
        """
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def truncate(self, length: int, row: int = 0) -> None:
        """Keep the first `length` tokens of a row.

        Raises:
            SessionError: there is no such row, or it holds fewer.
        """
        ...


@dataclass(frozen=True)
class Step:
    """One step that has run, over rows 0..B-1.

    Attributes:
        feeds: what the model was given: the inputs of docs/architecture.md's table but the cache.
        taken: int64 [B], how many tokens of each row are real; the rest is padding.
        capacity: slots of the session's cache.
        observed: name -> value of the step, as the graph has it.
    """

    feeds: Mapping[str, Int64]
    taken: Int64
    capacity: int
    observed: Mapping[str, Any]

    @property
    def starts(self) -> Int64:
        """int64 [B], the slot of each row's first token."""
        return self.feeds["write_indices"]


class CachedSession(ABC):
    """The bookkeeping of a session over a preallocated cache; subclasses implement `_step`.

    A step takes at most `max_step_tokens` tokens a row and returns the logits of at most
    `max_step_logits` of them; longer prompts run in several steps.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        capacity: int,
        vocab_size: int,
        max_step_tokens: int,
        max_step_logits: int,
        max_positions: int,
    ) -> None:
        max_batch, capacity = _whole(max_batch, "rows"), _whole(capacity, "slots")
        if max_batch < 1 or capacity < 1:
            raise SessionError(f"a session needs a row and a slot, not {max_batch} x {capacity}")
        self.max_batch, self.capacity, self.vocab_size = max_batch, capacity, vocab_size
        self.max_step_tokens, self.max_step_logits = max_step_tokens, max_step_logits
        self.max_positions = max_positions
        self.on_step: Callable[[Step], None] | None = None
        """Called after each step, if set."""
        self.observed: dict[str, Any] = {}
        """Name -> value of the last step, for the values that the session was asked to observe."""
        self._first_position = 0
        self._lengths = np.zeros(max_batch, dtype=np.int64)
        self._last_token = np.zeros(max_batch, dtype=np.int64)

    @property
    def lengths(self) -> Int64:
        """int64 [max_batch]: how many tokens each row holds."""
        return self._lengths.copy()

    def reset(self, *, first_position: int = 0) -> None:
        """Forget all tokens. The cache keeps its memory; old values are never attended to.

        Args:
            first_position: of slot 0. A text may begin anywhere in the context: the cache then holds positions
                first_position.. and attention sees nothing before them.

        Raises:
            CapacityError: there is no such position.
        """
        first_position = _whole(first_position, "first position")
        if not 0 <= first_position < self.max_positions:
            raise CapacityError(
                f"position {first_position} is outside 0..{self.max_positions - 1}, what the model supports"
            )
        self._first_position = first_position
        self._lengths[:] = 0
        self._last_token[:] = 0

    def truncate(self, length: int, row: int = 0) -> None:
        """See `Session.truncate`. The cache keeps what lay behind; it is never attended to."""
        length, row = _whole(length, "length"), _whole(row, "row")
        if not 0 <= row < self.max_batch:
            raise SessionError(f"row {row} of a session of {self.max_batch}")
        if not 0 <= length <= self._lengths[row]:
            raise SessionError(
                f"row {row} holds {self._lengths[row]} tokens; it cannot keep {length}"
            )
        self._lengths[row] = length

    def prefill(
        self, tokens: Sequence[Sequence[int]], *, all_logits: bool = False
    ) -> list[Float32]:
        """See `Session.prefill`."""
        rows = [_token_ids(row, b) for b, row in enumerate(tokens)]
        self._check(rows)
        widest = min(self.max_step_tokens, self.max_step_logits if all_logits else self.capacity)
        results: list[list[Float32]] = [[] for _ in rows]
        done = np.zeros(len(rows), dtype=np.int64)
        remaining = np.array([len(row) for row in rows], dtype=np.int64)
        while remaining.any():
            active = remaining > 0
            starts = np.minimum(self._lengths[: len(rows)], self._slots - 1)
            # Padding, too, needs slots: one step is as wide as the fullest row has room for.
            width = int(min(remaining.max(), self._slots - starts.max(), widest))
            taken = np.minimum(remaining, width)
            ids = np.zeros((len(rows), width), dtype=np.int64)
            for b, row in enumerate(rows):
                ids[b, : taken[b]] = row[done[b] : done[b] + taken[b]]
                if self._lengths[b] == self._slots:
                    ids[b, 0] = self._last_token[b]
            finishing = active & (taken == remaining)
            if all_logits:
                wanted = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape)
            else:
                wanted = np.maximum(taken - 1, 0)[:, None]
            logits = self._run(ids, starts, taken, wanted)
            for b, row in enumerate(rows):
                if active[b]:
                    if all_logits:
                        results[b].append(logits[b, : taken[b]])
                    elif finishing[b]:
                        results[b].append(logits[b, :1])
                    self._last_token[b] = row[done[b] + taken[b] - 1]
                    self._lengths[b] += taken[b]
            done += taken
            remaining -= taken
        empty = np.zeros((0, self.vocab_size), dtype=np.float32)
        return [np.concatenate(parts) if parts else empty for parts in results]

    def prefill_choosing(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> Float32:
        """Append tokens[b] to row b in one step, with the logits of chosen ones.

        Args:
            tokens: as many for each row, at most `max_step_tokens`.
            wanted: indices into each row's tokens, as many for each row, at most `max_step_logits`.

        Returns:
            fp32 [rows, n, vocab].

        Raises:
            CapacityError, SessionError: as `prefill`, or more than one step takes.
        """
        rows = [_token_ids(row, b) for b, row in enumerate(tokens)]
        self._check(rows)
        chosen = [_token_ids(row, b, "indices") for b, row in enumerate(wanted)]
        if len({len(row) for row in chosen}) != 1:
            raise SessionError("as many logits are wanted of each row")
        indices = np.stack(chosen)
        width = len(rows[0])
        if any(len(row) != width for row in rows) or not 1 <= width <= self.max_step_tokens:
            raise SessionError(f"one step takes rows of one length, 1 to {self.max_step_tokens}")
        if indices.shape[0] != len(rows) or not 1 <= indices.shape[1] <= self.max_step_logits:
            raise SessionError(f"one step gives 1 to {self.max_step_logits} logits a row")
        if indices.min() < 0 or indices.max() >= width:
            raise SessionError(f"logits are wanted of tokens outside 0..{width - 1}")
        starts = self._lengths[: len(rows)].copy()
        logits = self._run(np.stack(rows), starts, np.full(len(rows), width), indices)
        self._lengths[: len(rows)] += width
        self._last_token[: len(rows)] = [row[-1] for row in rows]
        return logits

    def decode(self, token_ids: Sequence[int | None]) -> Float32:
        """See `Session.decode`."""
        if isinstance(token_ids, str | bytes | bytearray):
            raise SessionError("tokens are integers, not text or bytes")
        rows = self.prefill([[] if token is None else [token] for token in token_ids])
        zeros = np.zeros((1, self.vocab_size), dtype=np.float32)
        return np.concatenate([row if len(row) else zeros for row in rows])

    @property
    def _slots(self) -> int:
        """Slots that have a position."""
        return min(self.capacity, self.max_positions - self._first_position)

    def _check(self, rows: list[Int64]) -> None:
        if not 1 <= len(rows) <= self.max_batch:
            raise SessionError(f"{len(rows)} rows given to a session of {self.max_batch}")
        for b, row in enumerate(rows):
            if len(row) and not (row.min() >= 0 and row.max() < self.vocab_size):
                raise SessionError(
                    f"row {b} has a token id outside the vocabulary of {self.vocab_size}"
                )
            if self._lengths[b] + len(row) > self._slots:
                raise CapacityError(
                    f"row {b} holds {self._lengths[b]} tokens and is given {len(row)} more; "
                    f"there are {self._slots} slots"
                )

    def _run(self, ids: Int64, starts: Int64, taken: Int64, wanted: Int64) -> Float32:
        width = ids.shape[1]
        span = -(-int(starts.max() + width) // SPAN_MULTIPLE) * SPAN_MULTIPLE
        first = self._first_position
        feeds = {
            "input_ids": ids,
            "position_ids": first + starts[:, None] + np.arange(width, dtype=np.int64),
            "write_indices": starts,
            "key_positions": first + np.arange(min(span, self.capacity), dtype=np.int64),
            "logits_indices": np.ascontiguousarray(wanted),
        }
        logits = self._step(feeds)
        if self.on_step is not None:
            self.on_step(Step(feeds, taken, self.capacity, self.observed))
        return logits

    @abstractmethod
    def _step(self, feeds: dict[str, Int64]) -> Float32:
        """Run the model once; return logits fp32 [rows, n, vocab]."""


def _whole(value: int, what: str) -> int:
    """An integer, and nothing that would be rounded to one."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise SessionError(f"{what} must be an integer, not {value!r:.60}") from None


def _token_ids(row: Sequence[int], number: int, what: str = "token ids") -> Int64:
    """One row as int64 [n]: a flat list or array of integers, and nothing that would be rounded or flattened."""
    try:
        found = np.asarray(row)
    except ValueError:  # lists of several lengths
        found = np.zeros((1, 1))
    if found.ndim == 1 and not len(found):
        return np.zeros(0, dtype=np.int64)
    mixed = (
        not isinstance(row, np.ndarray)
        and found.ndim == 1
        and any(isinstance(t, bool | np.bool_) for t in row)
    )
    if found.ndim != 1 or found.dtype.kind not in "iu" or mixed:
        raise SessionError(
            f"row {number}: {what} must be a flat list of integers, not {repr(row)[:60]}"
        )
    if found.dtype.kind == "u" and found.max() > np.iinfo(np.int64).max:
        raise SessionError(f"row {number}: {what} has {found.max()}, which is no token")
    return found.astype(np.int64)
