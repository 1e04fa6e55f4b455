"""A session in use: every logit it returns is recorded with the tokens that lead to it.

A scenario only determines what is fed, through the `Session` protocol and as any program would feed it. The reference's
input follows from that: for each row the tokens it held, in one piece and without a cache. Prefill, chunks, cache,
batching, padding and truncation are the target's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport.engines import CachedSession, Step
from qwenport.validate.budget import Plan
from qwenport.validate.prompts import Prompts
from qwenport.validate.text import Text

Float32 = NDArray[np.float32]
Seen = dict[str, NDArray[Any]]
"""Name -> the value at every token of one text, [S, ...]."""

STREAM_DISTANCE = 97  # between the texts of two rows, in the prompts' tokens: no two start alike


class CandidateError(Exception):
    """The target failed while it was used; the message is its own."""


class InseparableError(CandidateError):
    """A piece of the target cannot run alone: its graph is built in another way. The whole may be correct."""


class NotApplicable(Exception):  # noqa: N818 - not an error, a reason
    """The scenario has no meaning for this target; the message says why."""


@dataclass(frozen=True)
class Observation:
    """What a target returned.

    Attributes:
        candidate: logits fp32 [n, vocab].
        labels: the name of each position.
        texts: the input for any model to compute its own logits of the same positions, in the same order.
        seen: for each text the values observed inside the target; empty if none were requested.
        lineage: for each text the histories that its values come from; see `Observing.lineage`.
    """

    candidate: Float32
    labels: tuple[str, ...]
    texts: tuple[Text, ...]
    seen: tuple[Seen, ...]
    lineage: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Observing:
    """Which of the values that a session exposes to keep.

    Attributes:
        heads: names of values [B, heads, S, ...]; all others are [B, S, ...].
        lineage: histories whose values are kept, as an earlier observation numbered them; None for all.
    """

    heads: AbstractSet[str] = frozenset()
    lineage: frozenset[int] | None = None


@dataclass
class _History:
    """The tokens of a row from slot 0, and the logits judged so far by the index of their token."""

    number: int
    row: int
    first_position: int
    lineage: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    logits: list[Float32] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    seen: dict[str, list[NDArray[Any]]] = field(default_factory=dict)


class Run:
    """One scenario on one session.

    Attributes:
        session: the target.
        prompts: where tokens come from.
        plan: the sizes.
        greedy: transformers' own continuation of `greedy_prompt`.
        original_context: positions before the rope settings extend them; None if they do not.
        chunk: positions per chunk of dual chunk attention; None if attention is plain.
        special_ids: ids that prompts rarely contain: the highest, special and added ones.
    """

    def __init__(
        self,
        session: CachedSession,
        prompts: Prompts,
        plan: Plan,
        *,
        greedy: Sequence[int] = (),
        original_context: int | None = None,
        chunk: int | None = None,
        special_ids: Sequence[int] = (),
        on_step: Callable[[Step], None] = lambda step: None,
        observing: Observing | None = None,
        keep: bool = True,
    ) -> None:
        """Use a session.

        Args:
            on_step: called after each step.
            observing: which of the values that the session exposes to keep; None for none.
            keep: whether to keep logits; a rehearsal's are not needed.
            Others: as the attributes.
        """
        self.session, self.prompts, self.plan = session, prompts, plan
        self.greedy, self.original_context = tuple(greedy), original_context
        self.chunk = chunk
        self.special_ids = tuple(special_ids)
        self._first_position = 0
        self._rows: dict[int, _History] = {}
        self._done: list[_History] = []
        self._on_step, self._observing, self._keep = on_step, observing, keep
        self._histories = 0
        session.on_step = self._after_step

    @property
    def capacity(self) -> int:
        """Cache slots of a row that have a position."""
        return min(self.session.capacity, self.session.max_positions - self._first_position)

    def take(self, count: int, *, stream: int = 0, start: int = 0) -> list[int]:
        """Tokens start..start+count-1 of one of the texts, cut off at the end of the cache."""
        count = max(0, min(count, self.capacity - start))
        return self.prompts.take(count, start=STREAM_DISTANCE * stream + start)

    def length(self, row: int = 0) -> int:
        """Tokens that a row holds."""
        return len(self._rows[row].tokens) if row in self._rows else 0

    def tokens(self, row: int = 0) -> tuple[int, ...]:
        """The tokens that a row holds."""
        return tuple(self._rows[row].tokens) if row in self._rows else ()

    def start(self, first_position: int = 0) -> None:
        """Reset all rows; texts begin at `first_position`."""
        self._guard(self.session.reset, first_position=first_position)
        self._done += [self._rows[row] for row in sorted(self._rows)]
        self._rows.clear()
        self._first_position = first_position

    def prefill(
        self,
        rows: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        prompt_lengths: Sequence[int] | None = None,
    ) -> None:
        """`Session.prefill`, with the last logits of each row as `generate` and C++ request them, or with all.

        A row whose keys are scaled for another length is given up, as it must be, and starts anew.
        """
        if not any(len(row) for row in rows):
            return
        totals = prompt_lengths or [self.length(b) + len(row) for b, row in enumerate(rows)]
        totals = [self._begin(b, total, len(rows[b])) for b, total in enumerate(totals)]
        logits = self._guard(
            self.session.prefill, rows, all_logits=all_logits, prompt_lengths=totals
        )
        if len(logits) != len(rows):
            raise CandidateError(f"the target gave logits of {len(logits)} rows, not {len(rows)}")
        for index, (row, made) in enumerate(zip(rows, logits, strict=True)):
            judged = range(len(row)) if all_logits else range(len(row))[-1:]
            self._note(index, row, made, judged, totals[index])

    def _begin(self, row: int, total: int, given: int) -> int:
        """Tokens of a request of which a row is given some; without what it holds, if that was scaled otherwise."""
        if not given or not self.scaled_otherwise(row, total):
            return total
        length = self.length(row)
        self.truncate(0, row)
        return self._begin(row, max(total - length, given), given)

    def scaled_otherwise(self, row: int, total: int) -> bool:
        """Whether a row holds keys that are scaled for another length than a request of `total` tokens."""
        held = set(self._rows[row].requests) if row in self._rows else set()
        return not held <= {self._request(total)}

    def scaled_beyond(self, row: int, total: int) -> bool:
        """Whether a row holds keys that are scaled for a longer request than one of `total` tokens."""
        held = self._rows[row].requests if row in self._rows else []
        return max(held, default=0) > self._request(total)

    def _request(self, tokens: int) -> int:
        """Positions of a request with so many tokens, at least those that are not scaled; 0 if none are scaled."""
        unscaled = self.session.unscaled_length
        return 0 if unscaled is None else max(self._first_position + tokens, unscaled)

    def prefill_choosing(
        self, rows: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> None:
        """`CachedSession.prefill_choosing`; each row's wanted indices ascend."""
        totals = [self._begin(b, self.length(b) + len(row), len(row)) for b, row in enumerate(rows)]
        logits = self._guard(self.session.prefill_choosing, rows, wanted)
        self._check(logits, (len(rows), len(wanted[0])))
        for index, row in enumerate(rows):
            self._note(index, row, logits[index], wanted[index], totals[index])

    def decode(self, tokens: Sequence[int | None]) -> None:
        """`Session.decode`. A row that was cut within a prompt that scales its keys starts anew."""
        for row, token in enumerate(tokens):
            if token is not None and self.scaled_beyond(row, self.length(row) + 1):
                self.truncate(0, row)
        logits = self._guard(self.session.decode, tokens)
        self._check(logits, (len(tokens),))
        for index, token in enumerate(tokens):
            if token is not None:
                self._note(index, [token], logits[index : index + 1], [0], self.length(index) + 1)

    def truncate(self, length: int, row: int = 0) -> None:
        """`Session.truncate`: what the row is given next follows its first `length` tokens."""
        self._guard(self.session.truncate, length, row)
        if row not in self._rows:
            return
        before = self._rows.pop(row)
        self._done.append(before)
        after = self._history(row, before.lineage)
        after.tokens, after.requests = before.tokens[:length], before.requests[:length]
        after.seen = {n: [np.concatenate(parts)[:length]] for n, parts in before.seen.items()}

    def observation(self) -> Observation:
        """Everything that was judged since the run was created.

        Raises:
            CandidateError: logits have another shape than a session must return.
        """
        histories = [*self._done, *(self._rows[row] for row in sorted(self._rows))]
        judged = [history for history in histories if history.indices]
        if not judged:
            raise NotApplicable("the cache is too short for it")
        parts = [part for history in judged for part in history.logits]
        labels = [
            f"row {h.row} position {h.first_position + index} (step of {width})"
            for h in judged
            for index, width in zip(h.indices, h.widths, strict=True)
        ]
        texts = [
            Text(
                tuple(h.tokens[: h.indices[-1] + 1]),
                tuple(h.indices),
                h.first_position,
                tuple(h.requests[: h.indices[-1] + 1]),
            )
            for h in judged
        ]
        seen = [
            {name: np.concatenate(made)[: len(text.tokens)] for name, made in h.seen.items()}
            for h, text in zip(judged, texts, strict=True)
        ]
        candidate = np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)
        lineage = tuple(h.lineage for h in judged)
        return Observation(candidate, tuple(labels), tuple(texts), tuple(seen), lineage)

    def _history(self, row: int, lineage: frozenset[int] = frozenset()) -> _History:
        """The row's history, created if there is none."""
        if row not in self._rows:
            number = self._histories
            self._histories += 1
            self._rows[row] = _History(number, row, self._first_position, lineage | {number})
        return self._rows[row]

    def _after_step(self, step: Step) -> None:
        self._on_step(step)
        for row in np.flatnonzero(step.taken).tolist():
            history = self._history(row)
            if self._observing is None:
                continue
            wanted = self._observing.lineage
            if wanted is not None and history.number not in wanted:
                continue
            for name, value in step.observed.items():
                of_row = value[row]
                if name in self._observing.heads:
                    of_row = of_row.swapaxes(0, 1)
                history.seen.setdefault(name, []).append(np.array(of_row[: step.taken[row]]))

    def _note(
        self, row: int, tokens: Sequence[int], made: Any, judged: Sequence[int], total: int
    ) -> None:
        """Record the tokens given to a row as part of a request of `total`, and the logits of some, by index."""
        self._check(made, (len(judged),))
        if not len(tokens):
            return
        history = self._history(row)
        history.tokens += [int(token) for token in tokens]
        if self.session.unscaled_length is not None:
            history.requests += [self._request(total)] * len(tokens)
        before = len(history.tokens) - len(tokens)
        if self._keep:
            history.logits.append(
                np.array(made, dtype=np.float32)
            )  # a session may reuse its memory
        history.indices += [before + index for index in judged]
        history.widths += [len(tokens)] * len(judged)

    def _check(self, made: Any, shape: tuple[int, ...]) -> None:
        expected = (*shape, self.session.vocab_size)
        if np.shape(made) != expected:
            raise CandidateError(
                f"the target gave logits of shape {np.shape(made)}, expected {expected}"
            )

    def _guard(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # whatever the runtime raises is the target's failure, not ours
            raise CandidateError(f"the target raised {type(error).__name__}: {error}") from error
