"""What a generation is asked for, and what comes of it.

Names and their meaning are those of the C++ runtime (engines/cpp/include/qwenport/qwenport.hpp).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwenport import QwenportError
from qwenport.engines.sampling import SamplingParams, TokenLogprob

FinishReason = Literal["stop", "length", "capacity", "cancelled"]
"""Why a row ended; see `Generated`."""

OnLogits = Callable[[int, NDArray[np.float32], tuple[int, ...]], None]
"""``on_logits(row, logits, tokens)``; see `GenerateOptions`."""

_NO_TOKENS = (str, bytes, bytearray, memoryview, Mapping)


class GenerationError(QwenportError, ValueError):
    """A request that cannot be run: no prompt tokens, ids out of range, too many rows, ..."""


class Cancellation:
    """Ends a generation from another thread or a signal handler. It stays requested until it is reset."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        """End the generation before its next step."""
        self._event.set()

    def requested(self) -> bool:
        """Whether cancellation has been requested."""
        return self._event.is_set()

    def reset(self) -> None:
        """Forget the request, between two generations."""
        self._event.clear()


@dataclass(frozen=True)
class GenerateOptions:
    """How tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: at least 1; a row draws no more tokens than this.
        stop_tokens: ids that end a row (end of sequence, end of turn); may be empty. Ids outside the vocabulary are
            never drawn.
        stop_sequences: lists of ids, none empty. A row ends when its new tokens end with one, as it does with a stop
            token: the sequence is not part of the result. Tokens that may be the beginning of a sequence are held back
            until that is decided. A stop token comes first; of several sequences that end together the longest counts.
        temperature, top_k, top_p, repetition_penalty, seed: see `SamplingParams`. The penalty looks at the row's
            prompt and its new tokens. With ``seed=None`` every row has a fresh seed.
        append: continue after the tokens that the rows hold, instead of resetting the session. To continue a
            generation, start the prompt with its `Generated.pending`.
        cancellation: checked before every step.
        on_logits: called as ``on_logits(row, logits, tokens)`` before each token is drawn, a stop token too, and after
            `on_token` (or the iteration) had the row's previous token, unless that is held back. It may edit
            ``logits`` in place: the model's, float32 [vocab_size], before penalty, temperature, top_k and top_p; -inf
            bans a token. ``tokens`` are all that the row has drawn so far. It must not use the session. An exception
            from it ends the generation, once the other rows have drawn their tokens of the step.
        logprobs: None, or in [0, vocab_size] how many of the most likely tokens get log-probabilities besides each new
            token itself: log_softmax of the logits after ``on_logits``, before penalty, temperature, top_k and top_p.

    Raises:
        GenerationError, SamplingParamsError: on construction, for a value of the wrong type or out of range.
    """

    max_new_tokens: int = 256
    stop_tokens: Collection[int] = ()
    stop_sequences: Sequence[Sequence[int]] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    append: bool = False
    cancellation: Cancellation | None = None
    on_logits: OnLogits | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        integer("max_new_tokens", self.max_new_tokens, 1)
        for token in _items("stop_tokens", self.stop_tokens):
            integer("a stop token", token, 0)
        for i, sequence in enumerate(ordered("stop_sequences", self.stop_sequences)):
            if not token_ids(f"stop sequence {i}", sequence):
                raise GenerationError(f"stop sequence {i} is empty")
        _ = self.sampling
        if not isinstance(self.append, bool):
            raise GenerationError(f"append must be True or False, got {self.append!r}")
        if not isinstance(self.cancellation, Cancellation | None):
            raise GenerationError(f"cancellation must be a Cancellation, got {self.cancellation!r}")
        if self.on_logits is not None and not callable(self.on_logits):
            raise GenerationError(f"on_logits must be a function, got {self.on_logits!r:.60}")
        if self.logprobs is not None:
            integer("logprobs", self.logprobs, 0)

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
        tokens: the new tokens, without the stop token or stop sequence.
        reason: "stop" (a stop token or stop sequence was drawn), "length" (``max_new_tokens`` reached; also if the
            cache is full at the same time), "capacity" (the row's cache is full) or "cancelled".
        stop_token: the one that was drawn, or None.
        pending: the tokens among prompt, new tokens and stop token or stop sequence that the cache does not hold: the
            last one drawn, and after an early cancellation the rest of the prompt. Of a stop sequence the cache thus
            holds all tokens but the last.
        stop_sequence: the index of the one that was drawn, or None.
        logprobs: float32 values, one for each of ``tokens``; empty unless `GenerateOptions.logprobs` is given.
        top_logprobs: for each of ``tokens`` the most likely ones, highest first, equal ones by ascending id; empty
            unless `GenerateOptions.logprobs` is at least 1.
    """

    tokens: list[int]
    reason: FinishReason
    stop_token: int | None = None
    pending: list[int] = field(default_factory=list)
    stop_sequence: int | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[TokenLogprob]] = field(default_factory=list)


class Piece(NamedTuple):
    """One new token, right after it was drawn, or once it is certain that it begins no stop sequence.

    Attributes:
        row: the prompt's index.
        token: the token's id.
    """

    row: int
    token: int


def _items(what: str, value: object) -> list[Any]:
    """The items of a list, tuple, set or array; refuses text, bytes and what has no items."""
    scalar = isinstance(value, np.ndarray) and not value.ndim
    if isinstance(value, Collection) and not isinstance(value, _NO_TOKENS) and not scalar:
        return list(value)
    raise GenerationError(f"{what} must be a list of token ids, got {value!r:.60}")


def ordered(what: str, value: object) -> list[Any]:
    """The items of a list, tuple or array, which have an order.

    Raises:
        GenerationError: a set, text, bytes, or something without items.
    """
    if isinstance(value, Set):
        raise GenerationError(f"{what} must be a list of token ids, got {value!r:.60}")
    return _items(what, value)


def token_ids(what: str, value: object, vocab_size: int | None = None) -> list[int]:
    """A list of ids in [0, vocab_size), or of at least 0.

    Raises:
        GenerationError: it is something else.
    """
    return [integer(f"an id of {what}", i, 0, vocab_size) for i in ordered(what, value)]


def integer(what: str, value: object, low: int, high: int | None = None) -> int:
    """An integer in [low, high), or of at least ``low``.

    Raises:
        GenerationError: it is something else.
    """
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
