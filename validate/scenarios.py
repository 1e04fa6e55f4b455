"""Ways to use a session, each with what transformers says to the same tokens at the same positions.

A scenario feeds the target through the `Session` protocol, as any program would, and the reference the
whole row at once without a cache: prefill, chunks, cache, batching and padding are the target's own affair.
All scenarios share one session, so each finds the cache as the one before left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenport.validate.prompts import Prompts

if TYPE_CHECKING:
    from qwenport.engines import Session
    from qwenport.validate.reference import Reference

Float32 = NDArray[np.float32]

PREFILL_TOKENS = 64
DECODE_PROMPT, DECODE_TOKENS = 5, 40  # the cache passes no multiple of 64: that is the chunks' part
CHUNKS = (1, 7, 30, 26, 1, 2, 33)  # ends exactly at slot 64, passes it by one, then by more
GREEDY_PROMPT, GREEDY_TOKENS = 12, 32
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
    """Logits of the same positions from both sides, fp32 [n, vocab], and the name of each position.

    `texts` is what any model can be asked to give its own logits of these positions: (tokens, how many of
    the last ones), in the same order.
    """

    candidate: Float32
    reference: Float32
    labels: tuple[str, ...]
    texts: tuple[tuple[list[int], int], ...]


@dataclass(frozen=True)
class Bench:
    """What a scenario works with."""

    session: Session
    reference: Reference
    prompts: Prompts

    @property
    def capacity(self) -> int:
        """Cache slots a row."""
        return self.session.capacity

    def start(self) -> None:
        """Forget all rows."""
        self._guard(self.session.reset)

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


def _labels(start: int, count: int, row: int = 0) -> tuple[str, ...]:
    return tuple(f"row {row} position {start + i}" for i in range(count))


def _observe(
    bench: Bench, parts: Sequence[Float32], tokens: list[int], last: int | None = None
) -> Observation:
    """One row's observation; of its `last` positions, or of all."""
    last = len(tokens) if last is None else last
    return Observation(
        np.concatenate(parts),
        bench.reference.logits(tokens, last=last),
        _labels(len(tokens) - last, last),
        ((tokens, last),),
    )


def prefill(bench: Bench) -> Observation:
    """One prompt in one step."""
    tokens = bench.prompts.take(min(PREFILL_TOKENS, bench.capacity))
    bench.start()
    (candidate,) = bench.prefill([tokens])
    return _observe(bench, [candidate], tokens)


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
    return _observe(bench, parts, tokens, judged)


def decode(bench: Bench) -> Observation:
    """A short prompt, then one token at a time through the cache."""
    tokens = bench.prompts.take(min(DECODE_PROMPT + DECODE_TOKENS, bench.capacity), start=11)
    prompt = min(DECODE_PROMPT, len(tokens))
    bench.start()
    parts = bench.prefill([tokens[:prompt]])
    parts += [bench.decode([token]) for token in tokens[prompt:]]
    return _observe(bench, parts, tokens)


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
    return _observe(bench, parts, tokens)


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
        np.concatenate([bench.reference.logits(text) for text in texts]),
        tuple(labels),
        tuple((text, len(text)) for text in texts),
    )


def greedy_request(prompts: Prompts, capacity: int) -> tuple[list[int], int]:
    """The prompt of `greedy` and how many new tokens are asked for."""
    prompt = prompts.take(min(GREEDY_PROMPT, capacity), start=5)
    return prompt, min(GREEDY_TOKENS, capacity - len(prompt) + 1)


def greedy(bench: Bench) -> Observation:
    """transformers' greedy continuation of a prompt, token for token.

    The target is fed transformers' tokens and must choose each next one itself. It does so at every step
    exactly if, left alone, it would write the same text; and after a first wrong token the rest still says
    something.
    """
    prompt, count = greedy_request(bench.prompts, bench.capacity)
    tokens, reference = bench.reference.greedy(prompt, count)
    bench.start()
    parts = [bench.prefill([prompt])[0][-1:]]
    parts += [bench.decode([token]) for token in tokens[:-1]]
    return Observation(
        np.concatenate(parts),
        reference,
        tuple(f"new token {i}" for i in range(count)),
        (([*prompt, *tokens[:-1]], count),),
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
    Scenario("greedy", "transformers' greedy continuation, token for token", greedy, greedy=True),
)


def capacity_for(available: int) -> int:
    """Cache slots to judge with: all, where they can be filled."""
    return available if available <= FILL_LIMIT else SHORT_CAPACITY
