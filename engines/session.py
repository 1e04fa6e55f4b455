"""Sessions: a model with its KV cache, fed token by token.

`Session` is the protocol that all callers use. `CachedSession` does what every implementation needs:
padding, positions, cache slots, active span and capacity. An implementation runs one step.

Rows are right-padded. A pad token's key and value land in slots that no query attends to before a real
token overwrites them, so a ragged batch needs no padding mask. A row that is idle in a step is all padding;
if it is full, it replays its last token into that token's own slot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import (
    INPUT_IDS,
    KEY_POSITIONS,
    LOGITS_INDICES,
    MOST_SCORES,
    POSITION_IDS,
    REQUEST_LENGTHS,
    SPAN_MULTIPLE,
    WRITE_INDICES,
)
from qwenport.engines.errors import CapacityError, SessionError
from qwenport.engines.length_scale import LengthScale
from qwenport.engines.memory import untouched_zeros
from qwenport.engines.session_arguments import sequence, token_rows, whole
from qwenport.engines.spans import Spans

Bytes = NDArray[np.uint8]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class Session(Protocol):
    """A model with a KV cache of `max_batch` rows of `capacity` slots; its logits have `vocab_size` columns."""

    max_batch: int
    capacity: int
    vocab_size: int
    max_step_tokens: int
    """Tokens per row and step; longer prompts run in several steps."""

    @property
    def lengths(self) -> Int64:
        """int64 [max_batch]: how many tokens each row holds."""
        ...

    @property
    def free_slots(self) -> Int64:
        """int64 [max_batch]: how many more tokens each row has room for."""
        ...

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        prompt_lengths: Sequence[int] | None = None,
    ) -> list[Float32]:
        """Append tokens[b] to row b; call again to continue (chunked prefill). Rows may be empty.

        Args:
            tokens: token ids for each row.
            all_logits: return the logits of all tokens.
            prompt_lengths: for each row the tokens that it will hold when its whole prompt is there; by default after
                this call. Only models that scale by length depend on it (Qwen2.5-1M beyond 262,144 positions).

        Returns:
            For each row fp32 [1, vocab], the logits after its last token, or with `all_logits`
            [len(tokens[b]), vocab]. [0, vocab] for an empty row.

        Raises:
            CapacityError: a row would pass the capacity; nothing was written.
            SessionError: too many rows, or a token id outside the vocabulary; a prompt shorter than what is given, or
                one whose length scales otherwise than the tokens that the row holds.
        """
        ...

    def decode(self, token_ids: Sequence[int | None]) -> Float32:
        """Append one token per row (None: leave the row alone); return fp32 [rows, vocab].

        The logits of a row left alone are zeros. Raises as `prefill` does; also for a row that was cut within a prompt
        that scales keys.
        """
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def reusable(self, prompt_length: int, row: int = 0) -> int:
        """How many of the tokens that a row holds, from its first on, may be continued to a prompt of so many tokens.

        All of them, unless the model scales by length; see `prefill`.

        Raises:
            SessionError: there is no such row.
        """
        ...

    def truncate(self, length: int, row: int = 0) -> None:
        """Keep the first `length` tokens of a row.

        Raises:
            SessionError: there is no such row, or it holds fewer.
        """
        ...

    def save(self) -> bytes:
        """The cache's content (only the used slots), which can be restored into a session on the same package or
        engine with the same number of rows, in this process or another."""
        ...

    def restore(self, snapshot: bytes) -> None:
        """Replace the cache's content by a snapshot's.

        Raises:
            SnapshotError: not a snapshot, damaged, or from another model, dtype or number of rows.
            CapacityError: one of its rows holds more than this session's slots. Either way the session is unchanged.
        """
        ...


@dataclass(frozen=True)
class Step:
    """One completed step, over rows 0..B-1.

    Attributes:
        feeds: the model's inputs: those in docs/architecture.md's table except the cache.
        taken: int64 [B], how many tokens of each row are real; the rest is padding.
        capacity: slots in the session's cache.
        observed: name -> value of the step, as the graph has it.
    """

    feeds: Mapping[str, Int64]
    taken: Int64
    capacity: int
    observed: Mapping[str, Any]

    @property
    def starts(self) -> Int64:
        """int64 [B], the slot of each row's first token."""
        return self.feeds[WRITE_INDICES]


class CachedSession(ABC):
    """The bookkeeping of a session over a preallocated cache; subclasses implement `_step`.

    The cache has `max_batch` rows of `capacity` usable slots, and the model has `max_positions` positions and
    `vocab_size` token ids. `spans` are those of the cache, which may have more slots; by default those of a cache of
    `capacity` slots. With `unscaled_length` the model scales queries and keys of longer requests by their length, which
    each step is given. With `score_bytes`, for each token of a step and slot of its span, steps narrow as the span
    grows: they need at most MOST_SCORES bytes, or one token's (a subclass may have another limit). A step takes at most
    `max_step_tokens` tokens per row and returns the logits of at most `max_step_logits` of them; longer prompts run in
    several steps.
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
        spans: Spans | None = None,
        unscaled_length: int | None = None,
        score_bytes: int = 0,
    ) -> None:
        max_batch, capacity = whole(max_batch, "rows"), whole(capacity, "slots")
        if max_batch < 1 or capacity < 1:
            raise SessionError(f"a session needs a row and a slot, not {max_batch} x {capacity}")
        self.max_batch, self.capacity, self.vocab_size = max_batch, capacity, vocab_size
        self.max_step_tokens, self.max_step_logits = max_step_tokens, max_step_logits
        self.max_positions = max_positions
        self.spans = Spans(SPAN_MULTIPLE, capacity) if spans is None else spans
        self.on_step: Callable[[Step], None] | None = None
        """Called after each step, if set."""
        self.observed: dict[str, Any] = {}
        """Name -> value of the last step, for the values that the session was asked to observe."""
        self._first_position = 0
        self.unscaled_length, self._score_bytes = unscaled_length, score_bytes
        self._scale = (
            None if unscaled_length is None else LengthScale(unscaled_length, max_batch, capacity)
        )
        self._asked = np.zeros(0, dtype=bool)
        self._lengths = np.zeros(max_batch, dtype=np.int64)
        # the tokens that the slots hold; a full row that is idle replays its last one
        self._tokens = untouched_zeros((max_batch, capacity), np.dtype(np.int64))

    @property
    def lengths(self) -> Int64:
        """int64 [max_batch]: how many tokens each row holds."""
        return self._lengths.copy()

    def reset(self, *, first_position: int = 0) -> None:
        """Forget all tokens. The cache keeps its memory; old values are never attended to.

        Args:
            first_position: position of slot 0. A text may begin anywhere in the context: the cache then holds
                positions first_position.. and attention sees nothing before them.

        Raises:
            CapacityError: there is no such position.
        """
        first_position = whole(first_position, "first position")
        if not 0 <= first_position < self.max_positions:
            raise CapacityError(
                f"position {first_position} is outside 0..{self.max_positions - 1}, what the model supports"
            )
        self._first_position = first_position
        self._lengths[:] = 0

    def reusable(self, prompt_length: int, row: int = 0) -> int:
        """See `Session.reusable`."""
        prompt_length, row = whole(prompt_length, "prompt length"), self._row(row)
        held = int(self._lengths[row])
        if self._scale is None:
            return held
        return self._scale.reusable(row, held, self._first_position + prompt_length)

    def truncate(self, length: int, row: int = 0) -> None:
        """See `Session.truncate`. The cache keeps the values beyond that length; they are never attended to."""
        length, row = whole(length, "length"), self._row(row)
        if not 0 <= length <= self._lengths[row]:
            raise SessionError(
                f"row {row} holds {self._lengths[row]} tokens; it cannot keep {length}"
            )
        self._lengths[row] = length

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        prompt_lengths: Sequence[int] | None = None,
    ) -> list[Float32]:
        """See `Session.prefill`."""
        rows = token_rows(tokens)
        self._check(rows)
        totals = self._totals(rows, prompt_lengths)
        if self._scale is not None:
            self._scale.begin(self._first_position + totals, self._lengths, list(map(len, rows)))
        return self._append(rows, totals, all_logits)

    def _append(self, rows: list[Int64], totals: Int64, all_logits: bool) -> list[Float32]:
        """Append rows that were checked; `totals` [rows] are the tokens of their requests."""
        widest = min(self.max_step_tokens, self.max_step_logits if all_logits else self.capacity)
        results: list[list[Float32]] = [[] for _ in rows]
        done = np.zeros(len(rows), dtype=np.int64)
        remaining = np.array([len(row) for row in rows], dtype=np.int64)
        while remaining.any():
            active = remaining > 0
            starts = np.minimum(self._lengths[: len(rows)], self._slots - 1)
            # Padding needs slots too: one step is only as wide as the fullest row has room for.
            width = int(min(remaining.max(), self._slots - starts.max(), widest))
            width = self._narrowed(len(rows), int(starts.max()), width)
            taken = np.minimum(remaining, width)
            ids = np.zeros((len(rows), width), dtype=np.int64)
            for b, row in enumerate(rows):
                ids[b, : taken[b]] = row[done[b] : done[b] + taken[b]]
                if self._lengths[b] == self._slots:
                    ids[b, 0] = self._tokens[b, self._slots - 1]
            finishing = active & (taken == remaining)
            if all_logits:
                wanted = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape)
            else:
                wanted = np.maximum(taken - 1, 0)[:, None]
            asked = active if all_logits else finishing
            logits = self._run(ids, starts, taken, wanted, asked, totals)
            for b, row in enumerate(rows):
                if active[b]:
                    if all_logits:
                        results[b].append(logits[b, : taken[b]])
                    elif finishing[b]:
                        results[b].append(logits[b, :1])
                    self._hold(b, row[done[b] : done[b] + taken[b]])
            done += taken
            remaining -= taken
        empty = np.zeros((0, self.vocab_size), dtype=np.float32)
        return [np.concatenate(parts) if parts else empty for parts in results]

    def prefill_choosing(
        self, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> Float32:
        """Append tokens[b] to row b in one step, and return the logits of chosen tokens.

        Args:
            tokens: equally many for each row, at most `max_step_tokens`.
            wanted: indices into each row's tokens, equally many for each row, at most `max_step_logits`.

        Returns:
            fp32 [rows, n, vocab].

        Raises:
            CapacityError, SessionError: as for `prefill`, or more than one step takes.
        """
        rows = token_rows(tokens)
        self._check(rows)
        chosen = token_rows(wanted, "indices")
        if len({len(row) for row in chosen}) != 1:
            raise SessionError("each row must request the same number of logits")
        indices = np.stack(chosen)
        width = len(rows[0])
        if any(len(row) != width for row in rows) or not 1 <= width <= self.max_step_tokens:
            raise SessionError(f"one step takes rows of one length, 1 to {self.max_step_tokens}")
        if indices.shape[0] != len(rows) or not 1 <= indices.shape[1] <= self.max_step_logits:
            raise SessionError(f"one step gives 1 to {self.max_step_logits} logits a row")
        if indices.min() < 0 or indices.max() >= width:
            raise SessionError(f"logits are requested of tokens outside 0..{width - 1}")
        starts = self._lengths[: len(rows)].copy()
        if width > self._narrowed(len(rows), int(starts.max()), width):
            raise SessionError(
                f"a step of {width} tokens needs too much memory so far into the cache"
            )
        asked = np.ones(len(rows), dtype=bool)
        totals = self._totals(rows, None)
        if self._scale is not None:
            self._scale.begin(self._first_position + totals, self._lengths, [width] * len(rows))
        taken = np.full(len(rows), width)
        logits = self._run(np.stack(rows), starts, taken, indices, asked, totals)
        for b, row in enumerate(rows):
            self._hold(b, row)
        return logits

    def decode(self, token_ids: Sequence[int | None]) -> Float32:
        """See `Session.decode`."""
        rows = token_rows(
            [[] if token is None else [token] for token in sequence(token_ids, "tokens")]
        )
        self._check(rows)
        totals = self._totals(rows, None)
        if self._scale is not None:
            requests = self._first_position + totals
            self._scale.check_decode(requests, self._lengths, list(map(len, rows)))
        made = self._append(rows, totals, all_logits=False)
        zeros = np.zeros((1, self.vocab_size), dtype=np.float32)
        return np.concatenate([row if len(row) else zeros for row in made])

    @property
    def free_slots(self) -> Int64:
        """See `Session.free_slots`."""
        return self._slots - self._lengths

    @property
    def _slots(self) -> int:
        """Slots that have a position."""
        return min(self.capacity, self.max_positions - self._first_position)

    def _row(self, row: int) -> int:
        """Raises SessionError: there is no such row."""
        row = whole(row, "row")
        if not 0 <= row < self.max_batch:
            raise SessionError(f"row {row} of a session of {self.max_batch}")
        return row

    def _hold(self, row: int, tokens: Int64) -> None:
        """Count tokens that the cache now holds."""
        start = self._lengths[row]
        self._tokens[row, start : start + len(tokens)] = tokens
        self._lengths[row] += len(tokens)

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

    def _totals(self, rows: list[Int64], stated: Sequence[int] | None) -> Int64:
        """int64 [rows]: the tokens that each row's request has, given those appended now.

        Raises:
            SessionError: the prompts stated are not one for each row, or shorter than what is given.
        """
        given = np.array([len(row) for row in rows], dtype=np.int64)
        after = self._lengths[: len(rows)] + given
        if stated is None:
            return after
        totals = [whole(total, "prompt length") for total in sequence(stated, "prompt lengths")]
        if len(totals) != len(rows):
            raise SessionError(f"{len(totals)} prompt lengths for {len(rows)} rows")
        for b, total in enumerate(totals):
            if len(rows[b]) and not after[b] <= total <= self._slots:
                raise SessionError(
                    f"row {b}: a prompt of {total} tokens, where {after[b]} to {self._slots} are possible"
                )
        return np.array(totals, dtype=np.int64)

    def _narrowed(self, rows: int, start: int, width: int) -> int:
        """The most tokens per row, up to `width`, of a step from slot `start` on that fits into memory; at least 1."""
        while width > 1 and not self._fits(rows, width, self.spans.holding(start + width)):
            width = (width + 1) // 2
        return width

    def _fits(self, rows: int, width: int, span: int) -> bool:
        """Whether there is memory for a step of several tokens per row."""
        return rows * width * span * self._score_bytes <= MOST_SCORES

    def _run(
        self,
        ids: Int64,
        starts: Int64,
        taken: Int64,
        wanted: Int64,
        asked: NDArray[np.bool_],
        totals: Int64,
    ) -> Float32:
        width = ids.shape[1]
        span = self.spans.holding(int(starts.max() + width))
        first = self._first_position
        feeds = {
            INPUT_IDS: ids,
            POSITION_IDS: first + starts[:, None] + np.arange(width, dtype=np.int64),
            WRITE_INDICES: starts,
            KEY_POSITIONS: first + np.arange(span, dtype=np.int64),
            LOGITS_INDICES: np.ascontiguousarray(wanted),
        }
        if self._scale is not None:
            feeds[REQUEST_LENGTHS] = self._scale.of_step(first + totals, starts, taken)
        self._asked = asked
        logits = self._step(feeds)
        if self.on_step is not None:
            self.on_step(Step(feeds, taken, self.capacity, self.observed))
        return logits

    @abstractmethod
    def _step(self, feeds: dict[str, Int64]) -> Float32:
        """Run the model once; return logits fp32 [rows, n, vocab]. Only those of the rows in `_asked` are used."""
