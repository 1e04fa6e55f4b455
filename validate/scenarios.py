"""Ways to use a session, each with the texts that transformers is asked about in its stead.

A scenario feeds the target through the `Session` protocol, as any program would, and names what the reference has to
say of the whole row at once without a cache: prefill, chunks, cache, batching and padding are the target's own
affair. All scenarios share one session, so each finds the cache as the one before left it. No scenario looks at what
the target answers, so it can be rehearsed on a session that answers nothing (see `streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenport.engines import CachedSession
from qwenport.validate.prompts import Prompts
from qwenport.validate.text import Text

Float32 = NDArray[np.float32]

PREFILL_TOKENS = 64
DECODE_PROMPT, DECODE_TOKENS = 5, 40  # the cache passes no multiple of 64: that is the chunks' part
CHUNKS = (1, 7, 30, 26, 1, 2, 33)  # ends exactly at slot 64, passes it by one, then by more
GREEDY_PROMPT, GREEDY_TOKENS = 12, 32
GREEDY_TOKENS_STREAMED = 4  # each needs another pass over all weights
CONTEXT_TOKENS = 48  # at the end of the context, and across the original one
CONTEXT_DECODES = 8
RESET_FIRST, RESET_PROMPT, RESET_TOKENS = 40, 9, 16
TAPPED_PREFILL, TAPPED_DECODES = 64, 16
RAGGED_ROWS = 4
RAGGED_LENGTHS = (37, 1, 70, 12)
RAGGED_CHUNK = 29
RAGGED_DECODES = 6

# A cache is filled to its end. Filling more than this many slots takes too long on a CPU: then the session is
# given a shorter cache, and only the rope check reaches the last positions.
FILL_LIMIT = 1024
SHORT_CAPACITY = 256
FILL_CHUNK = 128
JUDGED_AT_THE_END = 64  # positions, of which the last are decoded one by one
DECODED_AT_THE_END = 8


class CandidateError(Exception):
    """The target failed while it was being used; the message is its own."""


class NotApplicable(Exception):  # noqa: N818 - not an error, a reason
    """The scenario has no meaning for this target; the message says why."""


@dataclass(frozen=True)
class Observation:
    """Logits of the target, fp32 [n, vocab], and the name of each position.

    `texts` is what any model can be asked to give its own logits of the same positions, in the same order.
    """

    candidate: Float32
    labels: tuple[str, ...]
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class Bench:
    """What a scenario works with.

    Attributes:
        session: the target.
        prompts: where tokens come from.
        greedy: transformers' own continuation of `greedy_request`.
        original_context: positions before the rope settings stretch them; None where they do not.
    """

    session: CachedSession
    prompts: Prompts
    greedy: tuple[int, ...]
    original_context: int | None = None

    @property
    def capacity(self) -> int:
        """Cache slots a row."""
        return self.session.capacity

    def start(self, first_position: int = 0) -> None:
        """Forget all rows; texts begin at `first_position`."""
        self._guard(self.session.reset, first_position=first_position)

    def prefill(self, rows: Sequence[Sequence[int]]) -> list[Float32]:
        """`Session.prefill` with all logits."""
        result: list[Float32] = self._guard(self.session.prefill, rows, all_logits=True)
        return result

    def advance(self, tokens: Sequence[int]) -> None:
        """Prefill one row and drop its logits."""
        self._guard(self.session.prefill, [tokens])

    def decode(self, tokens: Sequence[int | None]) -> Float32:
        """`Session.decode`, copied: a session may reuse its memory."""
        result: Float32 = np.array(self._guard(self.session.decode, tokens))
        return result

    def _guard(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # whatever the runtime raises is the target's failure, not ours
            raise CandidateError(f"the target raised {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Scenario:
    """One way to use a session. `greedy`: judged as text, not only as logits."""

    name: str
    summary: str
    run: Callable[[Bench], Observation]
    greedy: bool = False


@dataclass(frozen=True)
class BenchMaker:
    """Benches for sessions, and rehearsals of what will be run on them. Attributes as in `Bench`."""

    prompts: Prompts
    greedy: tuple[int, ...]
    original_context: int | None

    def __call__(self, session: CachedSession) -> Bench:
        return Bench(session, self.prompts, self.greedy, self.original_context)

    def rehearsal(self, scenarios: Sequence[Scenario]) -> Any:
        """What `Candidate.open` wants: uses a session as these scenarios will."""

        def rehearse(session: CachedSession) -> None:
            for scenario in scenarios:
                try:
                    scenario.run(self(session))
                except NotApplicable:
                    continue

        return rehearse


def _labels(start: int, count: int, row: int = 0) -> tuple[str, ...]:
    return tuple(f"row {row} position {start + i}" for i in range(count))


def _observe(
    parts: Sequence[Float32], tokens: list[int], last: int | None = None, first_position: int = 0
) -> Observation:
    """One row's observation; of its `last` positions, or of all."""
    last = len(tokens) if last is None else last
    return Observation(
        np.concatenate(parts),
        _labels(first_position + len(tokens) - last, last),
        (Text(tuple(tokens), last, first_position),),
    )


def _prefill_then_decode(bench: Bench, tokens: list[int], prompt: int) -> list[Float32]:
    parts = bench.prefill([tokens[:prompt]])
    return parts + [bench.decode([token]) for token in tokens[prompt:]]


def prefill(bench: Bench) -> Observation:
    """One prompt in one step."""
    tokens = bench.prompts.take(min(PREFILL_TOKENS, bench.capacity))
    bench.start()
    (candidate,) = bench.prefill([tokens])
    return _observe([candidate], tokens)


def full_cache(bench: Bench) -> Observation:
    """Fill the cache to its last slot: the last row of the rope tables too, where all fits in."""
    capacity = bench.capacity
    tokens = bench.prompts.take(capacity, start=3)
    judged = min(JUDGED_AT_THE_END, capacity)
    single = min(DECODED_AT_THE_END, judged)
    bench.start()
    for start in range(0, capacity - judged, FILL_CHUNK):
        bench.advance(tokens[start : min(start + FILL_CHUNK, capacity - judged)])
    parts = (
        [] if judged == single else bench.prefill([tokens[capacity - judged : capacity - single]])
    )
    parts += [bench.decode([token]) for token in tokens[capacity - single :]]
    return _observe(parts, tokens, judged)


def decode(bench: Bench) -> Observation:
    """A short prompt, then one token at a time through the cache."""
    tokens = bench.prompts.take(min(DECODE_PROMPT + DECODE_TOKENS, bench.capacity), start=11)
    prompt = min(DECODE_PROMPT, len(tokens))
    bench.start()
    return _observe(_prefill_then_decode(bench, tokens, prompt), tokens)


def chunked_prefill(bench: Bench) -> Observation:
    """One prompt in chunks of several sizes."""
    tokens = bench.prompts.take(min(sum(CHUNKS), bench.capacity), start=29)
    bench.start()
    parts: list[Float32] = []
    done = 0
    for size in CHUNKS:
        if chunk := tokens[done : done + size]:
            parts += bench.prefill([chunk])
            done += len(chunk)
    return _observe(parts, tokens)


def ragged_batch(bench: Bench) -> Observation:
    """Rows of different lengths, prefilled in chunks, then decoded while some of them are idle."""
    rows = min(RAGGED_ROWS, bench.session.max_batch)
    if rows == 1:
        raise NotApplicable("the target was made for one row")
    decodes = min(RAGGED_DECODES, bench.capacity - 1)
    texts = [
        bench.prompts.take(min(length, bench.capacity - decodes) + decodes, start=17 * (row + 1))
        for row, length in enumerate(RAGGED_LENGTHS[:rows])
    ]
    prompts = [text[: len(text) - decodes] for text in texts]
    got: list[list[Float32]] = [[] for _ in range(rows)]
    bench.start()
    # A row that has ended idles through the later chunks.
    for start in range(0, max(map(len, prompts)), RAGGED_CHUNK):
        for row, part in enumerate(
            bench.prefill([p[start : start + RAGGED_CHUNK] for p in prompts])
        ):
            got[row].append(part)
    held = [len(p) for p in prompts]
    step = 0
    while any(held[row] < len(texts[row]) for row in range(rows)):
        # In every step but each third, one row in turn is left alone.
        idle = step % rows if step % 3 != 2 else None
        active = [row != idle and held[row] < len(texts[row]) for row in range(rows)]
        step += 1
        if not any(active):
            continue
        logits = bench.decode([texts[r][held[r]] if active[r] else None for r in range(rows)])
        for row in range(rows):
            if active[row]:
                got[row].append(logits[row : row + 1])
                held[row] += 1
    labels = [label for row in range(rows) for label in _labels(0, held[row], row)]
    return Observation(
        np.concatenate([part for parts in got for part in parts]),
        tuple(labels),
        tuple(Text(tuple(text), len(text)) for text in texts),
    )


def end_of_context(bench: Bench) -> Observation:
    """A text that ends at the last position the model supports, wherever that is."""
    return _at(bench, bench.session.max_positions - CONTEXT_TOKENS, start=37)


def past_original_context(bench: Bench) -> Observation:
    """A text that crosses the context the model was made for, into what its rope settings add."""
    if bench.original_context is None:
        raise NotApplicable("the rope settings do not extend the context")
    if bench.original_context + CONTEXT_TOKENS // 2 > bench.session.max_positions:
        raise NotApplicable("the package stops before the original context ends")
    return _at(bench, bench.original_context - CONTEXT_TOKENS // 2, start=43)


def _at(bench: Bench, first_position: int, start: int) -> Observation:
    """A short text that begins anywhere: its first token gets slot 0, and sees nothing before it."""
    first_position = max(0, first_position)
    size = min(CONTEXT_TOKENS, bench.capacity, bench.session.max_positions - first_position)
    tokens = bench.prompts.take(size, start=start)
    bench.start(first_position)
    parts = _prefill_then_decode(bench, tokens, max(1, size - CONTEXT_DECODES))
    return _observe(parts, tokens, first_position=first_position)


def after_reset(bench: Bench) -> Observation:
    """A text, a reset, and a shorter text that must not see the first."""
    bench.start()
    bench.prefill([bench.prompts.take(min(RESET_FIRST, bench.capacity), start=53)])
    tokens = bench.prompts.take(min(RESET_PROMPT + RESET_TOKENS, bench.capacity), start=61)
    bench.start()
    return _observe(_prefill_then_decode(bench, tokens, min(RESET_PROMPT, len(tokens))), tokens)


def tapped(bench: Bench) -> Observation:
    """The text by which errors are followed from layer to layer: a prompt, then single tokens."""
    tokens = bench.prompts.take(min(TAPPED_PREFILL + TAPPED_DECODES, bench.capacity), start=2)
    bench.start()
    prompt = len(tokens) - min(TAPPED_DECODES, len(tokens) // 2)
    return _observe(_prefill_then_decode(bench, tokens, prompt), tokens)


def greedy_request(
    prompts: Prompts, capacity: int, streamed: bool = False
) -> tuple[list[int], int]:
    """The prompt of `greedy` and how many new tokens are asked for."""
    prompt = prompts.take(min(GREEDY_PROMPT, capacity), start=5)
    most = GREEDY_TOKENS_STREAMED if streamed else GREEDY_TOKENS
    return prompt, min(most, capacity - len(prompt) + 1)


def greedy(bench: Bench) -> Observation:
    """transformers' greedy continuation of a prompt, token for token.

    The target is fed transformers' tokens and must choose each next one itself. It does so at every step
    exactly if, left alone, it would write the same text; and after a first wrong token the rest still says
    something.
    """
    prompt, _ = greedy_request(bench.prompts, bench.capacity)
    tokens, count = bench.greedy, len(bench.greedy)
    bench.start()
    parts = [bench.prefill([prompt])[0][-1:]]
    parts += [bench.decode([token]) for token in tokens[:-1]]
    return Observation(
        np.concatenate(parts),
        tuple(f"new token {i}" for i in range(count)),
        (Text((*prompt, *tokens[:-1]), count),),
    )


# In this order: the first finds an unused cache, and all after the second one that is full of old values,
# which show if a mask lets anything through.
SCENARIOS = (
    Scenario("prefill", "One prompt in one step", prefill),
    Scenario("full cache", "The cache filled to its last slot, judged at its end", full_cache),
    Scenario("decode", "A prompt, then token by token through the cache", decode),
    Scenario("chunked prefill", "One prompt in chunks of several sizes", chunked_prefill),
    Scenario(
        "ragged batch", "Rows of different lengths, chunked, decoded, some idle", ragged_batch
    ),
    Scenario("end of context", "A text that ends at the last position", end_of_context),
    Scenario(
        "past original context",
        "A text that crosses into what rope scaling adds",
        past_original_context,
    ),
    Scenario("after reset", "A session used, reset, and used again", after_reset),
    Scenario("greedy", "transformers' greedy continuation, token for token", greedy, greedy=True),
)
TAPPED = Scenario("layers", "Hidden states from layer to layer", tapped)


def capacity_for(available: int) -> int:
    """Cache slots to judge with: all, where they can be filled."""
    return available if available <= FILL_LIMIT else SHORT_CAPACITY
