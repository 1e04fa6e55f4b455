"""Generating token ids with a session, and turning them into text as they arrive.

Names and their meaning are those of the C++ runtime (engines/cpp/include/qwenport/qwenport.hpp).

A step computes the logits that follow the token it is given, so a row's last token (and a stop
token) is never fed back: a row of ``p`` prompt tokens that yields ``n`` takes ``p + n - 1`` slots
of its cache, and a cache of ``capacity`` slots allows ``capacity - p + 1`` new tokens.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from qwenport import QwenportError
from qwenport.engines.errors import CapacityError
from qwenport.engines.sampling import Sampler, SamplingError, SamplingParams

if TYPE_CHECKING:
    from qwenport.engines.session import Session

FinishReason = Literal["stop", "length", "capacity", "cancelled"]
"""Why a row ended; see `Generated`."""


_Logits = TypeVar("_Logits")
_ByRow = Mapping[int, NDArray[np.float32]] | NDArray[np.float32]
_NO_TOKENS = (str, bytes, bytearray, memoryview, Mapping)


class GenerationError(QwenportError, ValueError):
    """A request that cannot be run: no prompt tokens, ids out of range, too many rows, ..."""


class Cancellation:
    """Ends a generation from another thread. It stays requested: use a new one for each request."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        """End the generation before its next step."""
        self._event.set()

    def requested(self) -> bool:
        """Whether cancellation has been requested."""
        return self._event.is_set()


@dataclass(frozen=True)
class GenerateOptions:
    """How tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: at least 1; the limit for each row, not counting a stop token.
        stop_tokens: ids that end a row (end of sequence, end of turn); may be empty. Ids outside the vocabulary are
            never drawn.
        temperature, top_k, top_p, repetition_penalty, seed: see `SamplingParams`. The penalty looks at the row's
            prompt and its new tokens. With ``seed=None`` every row has a fresh seed.
        append: continue after the tokens that the rows hold, instead of resetting the session. To continue a
            generation, start the prompt with its `Generated.pending`.
        cancellation: checked before every step.

    Raises:
        GenerationError, SamplingParamsError: on construction, for a value of the wrong type or out of range.
    """

    max_new_tokens: int = 256
    stop_tokens: Collection[int] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    append: bool = False
    cancellation: Cancellation | None = None

    def __post_init__(self) -> None:
        _index("max_new_tokens", self.max_new_tokens, 1)
        for token in _items("stop_tokens", self.stop_tokens):
            _index("a stop token", token, 0)
        _ = self.sampling
        if not isinstance(self.append, bool):
            raise GenerationError(f"append must be True or False, got {self.append!r}")
        if not isinstance(self.cancellation, Cancellation | None):
            raise GenerationError(f"cancellation must be a Cancellation, got {self.cancellation!r}")

    @property
    def sampling(self) -> SamplingParams:
        """The options that choose tokens."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Generated:
    """What one row generated.

    Attributes:
        tokens: the new tokens, without the stop token.
        reason: "stop" (a stop token was drawn), "length" (``max_new_tokens`` reached; also if the cache is full at the
            same time), "capacity" (the row's cache is full) or "cancelled".
        stop_token: the one that was drawn; None unless ``reason`` is "stop".
        pending: the tokens among prompt, new tokens and stop token that the cache does not hold: the last one drawn,
            and after an early cancellation the rest of the prompt.
    """

    tokens: list[int]
    reason: FinishReason
    stop_token: int | None = None
    pending: list[int] = field(default_factory=list)


class Piece(NamedTuple):
    """One new token, right after it was drawn.

    Attributes:
        row: the prompt's index.
        token: the token's id.
    """

    row: int
    token: int


class _Row:
    """One row of the batch: its sampler, the tokens it has seen and what it may still generate."""

    def __init__(self, prompt: list[int], options: GenerateOptions, row: int, free: int) -> None:
        self.prompt, self.index = prompt, row
        self.fed = 0  # tokens of the prompt and the new ones that are in the cache
        self.sampler = Sampler(options.sampling, row=row)
        self.stop = frozenset(map(int, options.stop_tokens))
        room = free - len(prompt) + 1
        self.limit = min(options.max_new_tokens, room)
        self.reason: FinishReason = "length" if options.max_new_tokens <= room else "capacity"
        self.new: list[int] = []
        self.stop_token: int | None = None
        self.ended = False
        self._penalised = options.repetition_penalty != 1.0
        self._seen = np.zeros(len(prompt) + self.limit if self._penalised else 0, dtype=np.int64)
        if self._penalised:
            self._seen[: len(prompt)] = prompt

    def take(self, logits: NDArray[np.float32]) -> Piece | None:
        """Draw the next token from float32 ``logits`` [vocab] and decide whether the row ends.

        Returns:
            The new token; None for a stop token.
        """
        known = len(self.prompt) + len(self.new)
        try:
            token = self.sampler.sample(logits, self._seen[:known])
        except SamplingError as error:
            raise SamplingError(f"row {self.index}, new token {len(self.new)}: {error}") from error
        if token in self.stop:
            self.reason, self.stop_token, self.ended = "stop", token, True
            return None
        self.new.append(token)
        if self._penalised:
            self._seen[known] = token
        self.ended = len(self.new) == self.limit
        return Piece(self.index, token)

    def result(self) -> Generated:
        """The row's result so far."""
        drawn = [] if self.stop_token is None else [self.stop_token]
        pending = [*self.prompt, *self.new, *drawn][self.fed :]
        reason: FinishReason = self.reason if self.ended else "cancelled"
        return Generated(list(self.new), reason, self.stop_token, pending)


def _items(what: str, value: object) -> list[Any]:
    """The items of a list, tuple, set or array; refuses text, bytes and what has no items."""
    scalar = isinstance(value, np.ndarray) and not value.ndim
    if isinstance(value, Collection) and not isinstance(value, _NO_TOKENS) and not scalar:
        return list(value)
    raise GenerationError(f"{what} must be a list of token ids, got {value!r:.60}")


def _index(what: str, value: object, low: int, high: int | None = None) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise GenerationError(f"{what} must be an integer, got {value!r}") from None
    if number < low or (high is not None and number >= high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise GenerationError(f"{what} must be {bound}, got {number}")
    return number


_LATEST: WeakKeyDictionary[Session, Generation] = (
    WeakKeyDictionary()
)  # the last one begun on a session


class Generation:
    """A generation that runs as it is iterated: each new token is yielded once, as a `Piece`.

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
        prompts = _items("prompts", prompts)
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
            tokens = _items(f"prompt {b}", prompt)
            if not tokens:
                raise GenerationError(f"prompt {b} is empty: a model needs at least one token")
            ids = [_index(f"an id of prompt {b}", i, 0, session.vocab_size) for i in tokens]
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
        """Each row's result so far, with all tokens of the last step."""
        return [row.result() for row in self._rows]

    def _run(self) -> Iterator[Piece]:
        """Raises SamplingError, GenerationError, CapacityError: see `generate`."""
        session, rows = self._session, self._rows
        if self._options.append:
            self._check_session()
        else:
            session.reset()
        _LATEST[session] = self
        self._lengths = session.lengths.copy()
        chunk = session.max_step_tokens
        for start in range(0, max((len(row.prompt) for row in rows), default=0), chunk):
            if self._cancelled():
                return
            fed = [row.prompt[start : start + chunk] for row in rows]
            logits = self._step(session.prefill, fed)
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
        pieces, failed = [], None
        for row in rows:
            try:
                piece = row.take(logits[row.index])
            except SamplingError as error:
                failed = failed or error
            else:
                if piece is not None:
                    pieces.append(piece)
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
        on_token: called as ``on_token(row, token)`` for each new token (not for the stop token) right after it is
            drawn. An exception from it ends the generation.

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


class Detokenizer(Protocol):
    """The interface that `StreamDecoder` needs; the tokenizers of `transformers` and `tokenizers` have it."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...


class StreamDecoder:
    """Text of a growing token sequence, piece by piece.

    The concatenation of all ``push`` results and of ``flush`` is ``decode`` of all ids, if decoding
    is a concatenation of the tokens' bytes (byte-level BPE, as in Qwen2.5 and Llama-3). A character
    split over tokens is emitted once it is complete, so U+FFFD appears only for bytes that no
    further token can make valid. A tokenizer that treats the first token of a text differently (a
    leading space) works as well, because at least one emitted token stays in the window.

    Each ``push`` decodes a window, not the whole sequence: the tokens since the last place but one where
    the text was complete, not many more than ``WINDOW``. (This scheme of two offsets is the one in
    text-generation-inference and vLLM; the bound for text that never becomes complete is ours.)
    """

    WINDOW = 32

    def __init__(self, tokenizer: Detokenizer) -> None:
        """Start at the beginning of a text."""
        self._tokenizer = tokenizer
        self._restart([], 0)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _restart(self, window: list[int], unsent: int) -> None:
        """Continue with this window; the last ``unsent`` characters of its text are yet to be sent."""
        self._window = window
        self._text = self._decode(window) if window else ""
        self._sent = max(len(self._text) - unsent, 0)
        self._whole = 0 if unsent else len(window)  # up to here the text was complete, and is sent

    def push(self, token_id: int) -> str:
        """Append a token; return the text that is now certain, often the empty string."""
        window, before = self._window, self._text
        window.append(token_id)
        text = self._text = self._decode(window)
        if (
            text == before
            and (before or len(window) > self.WINDOW)
            and not self._decode([token_id])
        ):
            window.pop()  # a special token: it has no bytes, so it need not be kept
            return ""
        certain = len(text.rstrip("\ufffd"))
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if certain == len(text):
            if piece:
                self._restart(window[self._whole :], 0)
        elif len(window) > self.WINDOW:
            piece += self._shorten()
        return piece

    def _shorten(self) -> str:
        """Cut a window that does not end in complete text at a point that no character crosses.

        A character has at most 4 bytes, so one of the last 4 boundaries is such a point. There, and
        only there, both sides decode separately to the same text.
        """
        window, text = self._window, self._text
        for cut in range(len(window) - 1, 0, -1):
            head, tail = self._decode(window[:cut]), self._decode(window[cut:])
            if tail and head + tail == text:
                piece = text[self._sent : len(head)]
                self._restart(window[cut:], len(text) - max(self._sent, len(head)))
                return piece
        return ""

    def flush(self) -> str:
        """End the text: return what was held back, with U+FFFD for an incomplete character. Then start anew."""
        piece = self._text[self._sent :]
        self._restart([], 0)
        return piece
