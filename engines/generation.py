"""Generating token ids with a session.

Names and their meaning are those of the C++ runtime (engines/cpp/include/qwenport/qwenport.hpp).

A step computes the logits that follow the token it is given, so a row's last token (and a stop
token) is never fed back: a row of ``p`` prompt tokens that yields ``n`` takes ``p + n - 1`` slots
of its cache, and a cache of ``capacity`` slots allows ``capacity - p + 1`` new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from qwenport.engines.errors import CapacityError
from qwenport.engines.generate_options import (
    FinishReason,
    Generated,
    GenerateOptions,
    GenerationError,
    OnLogits,
    Piece,
    integer,
    ordered,
    token_ids,
)
from qwenport.engines.sampling import (
    Sampler,
    SamplingError,
    TokenLogprob,
    check_logits,
    log_probabilities,
)
from qwenport.engines.stop_sequences import StopSequences

if TYPE_CHECKING:
    from qwenport.engines.session import Session

_Logits = TypeVar("_Logits")
_ByRow = Mapping[int, NDArray[np.float32]] | NDArray[np.float32]


class _Row:
    """One row of the batch: its sampler, the tokens it has seen and what it may still generate."""

    def __init__(self, prompt: list[int], options: GenerateOptions, row: int, free: int) -> None:
        self.prompt, self.index = prompt, row
        self.fed = 0  # tokens of the prompt and the new ones that are in the cache
        self.sampler = Sampler(options.sampling, row=row)
        self.stop = frozenset(map(int, options.stop_tokens))
        self.on_logits, self.logprobs = options.on_logits, options.logprobs
        room = free - len(prompt) + 1
        self.limit = min(options.max_new_tokens, room)
        self.reason: FinishReason = "length" if options.max_new_tokens <= room else "capacity"
        self.new: list[int] = []  # also those of a stop sequence
        self.released = 0  # how many of them were streamed
        self.stop_token: int | None = None
        self.stop_sequence: int | None = None
        self.ended = False
        self._sequences = [tuple(map(int, sequence)) for sequence in options.stop_sequences]
        self._matching = StopSequences(self._sequences)
        self._logprobs: list[tuple[float, list[TokenLogprob]]] = []
        self._penalised = options.repetition_penalty != 1.0
        self._seen = np.zeros(len(prompt) + self.limit if self._penalised else 0, dtype=np.int64)
        if self._penalised:
            self._seen[: len(prompt)] = prompt

    def take(self, logits: NDArray[np.float32]) -> list[Piece]:
        """Draw the next token from float32 ``logits`` [vocab] and decide whether the row ends.

        Returns:
            The new tokens that are certain now.
        """
        if self.on_logits is not None:
            logits = self._edited(logits, self.on_logits)
        known = len(self.prompt) + len(self.new)
        with self._named():
            token = self.sampler.sample(logits, self._seen[:known])
        if token in self.stop:
            self.reason, self.stop_token, self.ended = "stop", token, True
            return self.release()
        self.new.append(token)
        if self._penalised:
            self._seen[known] = token
        if self.logprobs is not None:
            self._logprobs.append(log_probabilities(logits, token, self.logprobs))
        self.stop_sequence = self._matching.push(token)
        if self.stop_sequence is not None:
            self.reason = "stop"
        self.ended = self.stop_sequence is not None or len(self.new) == self.limit
        return self.release() if self.ended else self.release(self._matching.undecided)

    def release(self, held_back: int = 0) -> list[Piece]:
        """The new tokens that have not been streamed, without the last ones, which stay held back."""
        tokens = self.new[self.released : len(self.new) - max(held_back, self._removed)]
        self.released += len(tokens)
        return [Piece(self.index, token) for token in tokens]

    def result(self) -> Generated:
        """The row's result so far."""
        drawn = [] if self.stop_token is None else [self.stop_token]
        pending = [*self.prompt, *self.new, *drawn][self.fed :]
        reason: FinishReason = self.reason if self.ended else "cancelled"
        count = len(self.new) - self._removed
        logprobs = self._logprobs[:count]
        return Generated(
            self.new[:count],
            reason,
            self.stop_token,
            pending,
            self.stop_sequence,
            [logprob for logprob, _ in logprobs],
            [list(likely) for _, likely in logprobs] if self.logprobs else [],
        )

    @property
    def _removed(self) -> int:
        """How many of the last new tokens are the stop sequence."""
        return 0 if self.stop_sequence is None else len(self._sequences[self.stop_sequence])

    def _edited(self, logits: NDArray[np.float32], on_logits: OnLogits) -> NDArray[np.float32]:
        with self._named():
            check_logits(logits)
        logits = logits.copy()
        if on_logits(self.index, logits, tuple(self.new)) is not None:  # type: ignore[func-returns-value]
            raise GenerationError("on_logits must edit the logits in place and return None")
        with self._named():
            check_logits(logits, edited=True)
        return logits

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the row and the token in an error of the sampler."""
        try:
            yield
        except SamplingError as error:
            place = f"row {self.index}, new token {len(self.new)}"
            raise SamplingError(f"{place}: {error}") from error


_LATEST: WeakKeyDictionary[Session, Generation] = (
    WeakKeyDictionary()
)  # the last one begun on a session


class Generation:
    """A generation that runs as it is iterated: each new token is yielded once, as a `Piece`, in order.

    Resets the session (unless ``options.append``), prefills the prompts and decodes until every row has ended. Rows
    may differ in length; one that ends idles while the others continue. Row ``b`` draws from the stream ``(seed, b)``
    (see `qwenport.engines.sampling`) and one number per token, so what it gets depends on its prompt, ``b`` and the
    seed, never on the other rows. A short prompt's first token may come while the others are still prefilled in steps.

    It pauses where the iteration is left (`break`): `results` says "cancelled" for the rows that have not ended, and
    iterating again goes on. Until it has ended, the session must not be used for anything else.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        options: GenerateOptions = GenerateOptions(),
    ) -> None:
        """Check the request; nothing runs yet.

        Args:
            session: computes the logits; its rows ``0 .. len(prompts) - 1`` are used. It may return views of a
                buffer that it reuses.
            prompts: token ids in [0, session.vocab_size), one sequence per row, none empty.
            options: how tokens are chosen and when to stop.

        Raises:
            GenerationError: a prompt is empty or has an id out of range, or there are too many; a wrong type.
            CapacityError: the session has no room for a prompt. (A cache that fills later ends the row with
                "capacity".)
        """
        if not isinstance(options, GenerateOptions):
            raise GenerationError(f"options must be GenerateOptions, got {options!r:.60}")
        if options.logprobs is not None:
            integer("logprobs", options.logprobs, 0, session.vocab_size + 1)
        prompts = ordered("prompts", prompts)
        if len(prompts) > session.max_batch:
            raise GenerationError(
                f"{len(prompts)} prompts, but the session has {session.max_batch} rows"
            )
        self._session, self._options = session, options
        self._lengths = (
            session.lengths.copy()
        )  # what the session must hold when the next step begins
        self._rows = []
        for b, prompt in enumerate(prompts):
            ids = token_ids(f"prompt {b}", prompt, session.vocab_size)
            if not ids:
                raise GenerationError(f"prompt {b} is empty: a model needs at least one token")
            free = int(session.free_slots[b]) if options.append else session.capacity
            if len(ids) > free:
                raise CapacityError(
                    f"prompt {b} has {len(ids)} tokens, the session has room for {free}"
                )
            self._rows.append(_Row(ids, options, b, free))
        self._running = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._running

    @property
    def results(self) -> list[Generated]:
        """Each row's result so far, with all tokens of the last step and those that are held back."""
        return [row.result() for row in self._rows]

    def _run(self) -> Iterator[Piece]:
        """Raises SamplingError, GenerationError, CapacityError: see `generate`."""
        session = self._session
        if self._options.append:
            self._check_session()
        else:
            session.reset()
        _LATEST[session] = self
        self._lengths = session.lengths.copy()
        yield from self._steps()
        for row in self._rows:  # after a cancellation
            yield from row.release()

    def _steps(self) -> Iterator[Piece]:
        """Prefill and decode until every row has ended or the generation is cancelled."""
        session, rows = self._session, self._rows
        chunk = session.max_step_tokens
        longest = max((len(row.prompt) for row in rows), default=0)
        prefill: Callable[..., Sequence[NDArray[np.float32]]] = session.prefill
        if longest > chunk:  # several pieces of one prompt
            totals = [int(self._lengths[row.index]) + len(row.prompt) for row in rows]
            prefill = partial(session.prefill, prompt_lengths=totals)
        for start in range(0, longest, chunk):
            if self._cancelled():
                return
            fed = [row.prompt[start : start + chunk] for row in rows]
            logits = self._step(prefill, fed)
            ready = [row for row in rows if start < len(row.prompt) <= start + chunk]
            yield from self._take(ready, {row.index: logits[row.index][-1] for row in ready})
        while not all(row.ended for row in rows) and not self._cancelled():
            running = [row for row in rows if not row.ended]
            token_ids = [None if row.ended else row.new[-1] for row in rows]
            yield from self._take(running, self._step(session.decode, token_ids))

    def _step(self, run: Callable[[Any], _Logits], tokens: Any) -> _Logits:
        if _LATEST.get(self._session) is not self:
            raise GenerationError("another generation has begun on this session")
        self._check_session()
        before = self._lengths
        try:
            return run(tokens)
        finally:  # also after an interruption, which may have come between two steps of a prompt
            self._lengths = self._session.lengths.copy()
            for row in self._rows:
                row.fed += int(self._lengths[row.index] - before[row.index])

    def _check_session(self) -> None:
        if not np.array_equal(self._session.lengths, self._lengths):
            raise GenerationError("the session was used by something else meanwhile")

    def _take(self, rows: list[_Row], logits: _ByRow) -> Iterator[Piece]:
        """Draw the tokens of a step, all of them before the first is yielded: no row loses its logits."""
        pieces: list[Piece] = []
        failed: Exception | None = None
        for row in rows:
            try:
                pieces += row.take(logits[row.index])
            except Exception as error:  # also what on_logits raises
                failed = failed or error
        yield from pieces
        if failed is not None:
            raise failed

    def _cancelled(self) -> bool:
        cancellation = self._options.cancellation
        return cancellation is not None and cancellation.requested()


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions = GenerateOptions(),
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Run a `Generation` to its end.

    Args:
        session: see `Generation`.
        prompts: see `Generation`.
        options: see `Generation`.
        on_token: called as ``on_token(row, token)`` for each new token (not for those that end a row) right after it is
            drawn, or once it is certain that it begins no stop sequence. An exception from it ends the generation.

    Returns:
        One result per prompt.

    Raises:
        GenerationError, CapacityError: see `Generation`; nothing has run.
        SamplingError: the session returned logits from which no token can be chosen.
    """
    if on_token is not None and not callable(on_token):
        raise GenerationError(f"on_token must be a function, got {on_token!r:.60}")
    generation = Generation(session, prompts, options)
    for row, token in generation:
        if on_token is not None:
            on_token(row, token)
    return generation.results
