"""Generating token ids with a session, and turning them into text as they arrive.

A step computes the logits that follow the token it is given, so a row's last token (and a stop
token) is never fed back: a row of ``p`` prompt tokens that yields ``n`` takes ``p + n - 1`` slots
of its cache, and a cache of ``capacity`` slots allows ``capacity - p + 1`` new tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qwenport import QwenportError
from qwenport.engines.errors import CapacityError
from qwenport.engines.sampling import Sampler, SamplingError, SamplingParams

if TYPE_CHECKING:
    from qwenport.engines.session import Session

FinishReason = Literal["stop", "length", "capacity"]


class GenerationError(QwenportError, ValueError):
    """A request that cannot be run: no prompt tokens, ids out of range, too many rows, ..."""


@dataclass(frozen=True)
class GenerationResult:
    """What one row generated.

    Attributes:
        token_ids: the new tokens, without the stop token.
        finish_reason: "stop" (a stop id was drawn), "length" (``max_new_tokens`` reached; also if
            the cache is full at the same time) or "capacity" (the row's cache is full).
        stop_id: the stop id that was drawn, None unless ``finish_reason`` is "stop".
    """

    token_ids: list[int]
    finish_reason: FinishReason
    stop_id: int | None = None


class _Row:
    """One row of the batch: its sampler, what it has seen and what it still may do."""

    def __init__(
        self, prompt: list[int], params: SamplingParams, row: int, max_new: int, capacity: int
    ) -> None:
        self.prompt = prompt
        self.index = row
        self.sampler = Sampler(params, row=row)
        self.limit = min(max_new, capacity - len(prompt) + 1)
        self.limit_reason: FinishReason = "length" if self.limit == max_new else "capacity"
        self.new: list[int] = []
        self.result: GenerationResult | None = None
        self._penalised = params.repetition_penalty != 1.0
        self._seen = np.zeros(len(prompt) + self.limit if self._penalised else 0, dtype=np.int64)
        if self._penalised:
            self._seen[: len(prompt)] = prompt

    def take(
        self,
        logits: NDArray[np.float32],
        stop: frozenset[int],
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        """Draw the next token from float32 ``logits`` [vocab] and decide whether the row ends."""
        held = len(self.prompt) + len(self.new)
        try:
            token = self.sampler.sample(logits, self._seen[:held])
        except SamplingError as error:
            raise SamplingError(f"row {self.index}, new token {len(self.new)}: {error}") from error
        if token in stop:
            self.result = GenerationResult(self.new, "stop", token)
            return
        self.new.append(token)
        if self._penalised:
            self._seen[held] = token
        if len(self.new) == self.limit:
            self.result = GenerationResult(self.new, self.limit_reason)
        if on_token is not None:
            on_token(self.index, token)


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


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    params: SamplingParams,
    max_new_tokens: int,
    stop_ids: Collection[int],
    on_token: Callable[[int, int], None] | None = None,
    prefill_chunk: int | None = None,
) -> list[GenerationResult]:
    """Reset the session, prefill the prompts and decode until every row has ended.

    Rows may differ in length; one that ends goes idle while the others go on. Row ``b`` draws from
    the stream ``(params.seed, b)`` (see `qwenport.engines.sampling`) and one number per token, so
    its result depends on its prompt, ``b`` and the seed, never on the other rows. Logits are used
    before the next step, so the session may return views of a buffer that it reuses.

    Args:
        session: what computes the logits; its rows ``0 .. len(prompts) - 1`` are used.
        prompts: token ids in [0, session.vocab_size), one sequence per row, none empty.
        params: how tokens are chosen. The repetition penalty looks at the row's prompt and its new
            tokens. With ``seed=None`` every row has a fresh seed.
        max_new_tokens: at least 1; the limit for each row, a stop token not counted.
        stop_ids: ids that end a row (end of sequence, end of turn); may be empty.
        on_token: called as ``on_token(row, token)`` for each new token (not for the stop token)
            right after it was drawn; a short prompt's first one may come while the others are still
            prefilled in chunks. What it raises ends the generation.
        prefill_chunk: at most this many tokens a row and prefill call; None is one call.

    Returns:
        One result per prompt.

    Raises:
        GenerationError: an argument is out of range; nothing was run.
        CapacityError: a prompt is longer than ``session.capacity``; nothing was run. (A cache that
            fills later ends the row with "capacity".)
        SamplingError: the session returned logits from which no token can be chosen.
    """
    if len(prompts) > session.max_batch:
        raise GenerationError(
            f"{len(prompts)} prompts, but the session has {session.max_batch} rows"
        )
    max_new = _index("max_new_tokens", max_new_tokens, 1)
    stop = frozenset(_index("a stop id", i, 0) for i in stop_ids)
    vocab, checked = session.vocab_size, []
    for b, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise GenerationError(f"prompt {b} is empty: a model needs at least one token")
        checked.append([_index(f"an id of prompt {b}", i, 0, vocab) for i in prompt])
    longest = max(map(len, checked), default=0)
    chunk = longest if prefill_chunk is None else _index("prefill_chunk", prefill_chunk, 1)
    if longest > session.capacity:
        b = next(b for b, prompt in enumerate(checked) if len(prompt) == longest)
        raise CapacityError(
            f"prompt {b} has {longest} tokens, the session holds {session.capacity} a row"
        )
    if not checked:
        return []

    rows = [_Row(p, params, b, max_new, session.capacity) for b, p in enumerate(checked)]
    session.reset()
    for start in range(0, longest, chunk):
        logits = session.prefill([row.prompt[start : start + chunk] for row in rows])
        for row in rows:
            if start < len(row.prompt) <= start + chunk:
                row.take(logits[row.index][-1], stop, on_token)
    while any(row.result is None for row in rows):
        fed = [row.new[-1] if row.result is None else None for row in rows]
        step = session.decode(fed)
        for row in rows:
            if fed[row.index] is not None:
                row.take(step[row.index], stop, on_token)
    return [row.result for row in rows if row.result is not None]


class Detokenizer(Protocol):
    """What `StreamDecoder` needs; tokenizers of `transformers` and `tokenizers` have it."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...


class StreamDecoder:
    """Text of a growing token sequence, piece by piece.

    The concatenation of all ``push`` results and of ``flush`` is ``decode`` of all ids, if decoding
    is a concatenation of the tokens' bytes (byte-level BPE, as in Qwen2.5 and Llama-3). A character
    split over tokens is emitted once it is complete, so U+FFFD appears only for bytes that no
    further token can make valid. A tokenizer that treats the first token of a text differently (a
    leading space) is served as well, as at least one emitted token stays in the window.

    Each ``push`` decodes a window, not the sequence: the tokens since the last place but one where
    the text was whole, not many more than ``WINDOW``. (This scheme of two offsets is that of
    text-generation-inference and vLLM; the bound for text that never becomes whole is ours.)
    """

    WINDOW = 32

    def __init__(self, tokenizer: Detokenizer) -> None:
        """Start at the beginning of a text."""
        self._tokenizer = tokenizer
        self._restart([], 0)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _restart(self, window: list[int], unsent: int) -> None:
        """Continue with this window, of whose text the last ``unsent`` characters are due."""
        self._window = window
        self._text = self._decode(window) if window else ""
        self._sent = max(len(self._text) - unsent, 0)
        self._whole = 0 if unsent else len(window)  # up to here the text was whole, and is sent

    def push(self, token_id: int) -> str:
        """Append a token; the text that is now certain, often the empty string."""
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
        """Cut a window that does not end in whole text where no character crosses the cut.

        A character has at most 4 bytes, so one of the last 4 boundaries is such a place. There, and
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
        """End the text: what was held back, U+FFFD for an incomplete character. Then start anew."""
        piece = self._text[self._sent :]
        self._restart([], 0)
        return piece
