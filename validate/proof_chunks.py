"""What a proof does with dual chunk attention: across borders of chunks, and with requests that are scaled by length.

The logits of a scaled request depend on its prompt's length. So it has a sequence of its own: its first tokens are the
prompt, given whole or in pieces, and the others follow one at a time. All such sequences begin alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwenport.exporter import DualChunk
from qwenport.validate.proof_cases import (
    CONTEXTS,
    MAIN,
    REQUESTS,
    ROW_LENGTH,
    ROWS,
    Case,
    span_edges,
)

FOLLOWING = 2  # single tokens after a scaled prompt
MOST_PIECES = 24


@dataclass(frozen=True)
class Request:
    """A sequence: a prompt, and single tokens up to `length`."""

    prompt: int
    length: int


def unscaled_context(chunks: DualChunk | None, context: int) -> int:
    """How many of `context` tokens lead to the same logits, however they are given."""
    original = None if chunks is None else chunks.original_max_position_embeddings
    return context if original is None else min(context, original)


def scaled_requests(chunks: DualChunk | None, context: int) -> list[Request]:
    """Requests that are scaled: a decode that crosses the length, a prompt a bit longer, one of all tokens.

    Then those whose single tokens are at the edges of spans.
    """
    original = None if chunks is None else chunks.original_max_position_embeddings
    if original is None or context < original + FOLLOWING:
        return []
    found = [Request(max(1, original - FOLLOWING), original + FOLLOWING)]
    for length in sorted({min(context, original + max(8, original // 4)), context}):
        if length - FOLLOWING > original:
            found.append(Request(length - FOLLOWING, length))
    edges = [edge for edge in span_edges(context) if edge.bit_count() == 1 and edge + 1 < context]
    return [*found, *(Request(edge - 2, edge + 1) for edge in edges if edge - 2 > original)]


def chunk_cases(chunks: DualChunk, context: int, slots: int, max_batch: int) -> list[Case]:
    """The cases, the most important ones first.

    Args:
        chunks: the settings.
        context: tokens of the longest sequence.
        slots: the package's.
        max_batch: rows.
    """
    chunk, plain = chunks.chunk, unscaled_context(chunks, context)
    requests = scaled_requests(chunks, context)
    found = [
        _border(f"{name} border of chunks", number * chunk, plain)
        for number, name in ((1, "first"), (2, "second"))
        if number * chunk < plain
    ]
    longest = max(requests, key=lambda request: request.length, default=None)
    for number, request in enumerate(requests):
        found.append(_scaled(number, request))
        if (request.length - 1).bit_count() == 1:  # an engine of so many slots goes to its own end
            found.append(_scaled(number, replace(request, length=request.length - 1)))
        if request is longest and number:
            found.append(_scaled_in_pieces(number, request, chunk))
    if 3 * chunk < plain:
        found.append(_later_borders(chunk, plain))
    if longest is not None and max_batch > 1 and plain >= ROW_LENGTH:
        number = requests.index(longest)
        found.append(_two_lengths(number, longest))
        if longest.length == slots:
            found.append(_full(number, longest))
    return found


def self_test_stops(chunks: DualChunk | None, slots: int) -> str | None:
    """What of dual chunk attention no self-test reaches, in a sentence; None if it reaches all of it.

    Args:
        chunks: the settings; None for plain attention.
        slots: the package's.
    """
    if chunks is None:
        return None
    reach = min(slots, CONTEXTS[0])
    original = chunks.original_max_position_embeddings
    missing = [
        f"the {name} border of chunks ({number * chunks.chunk})"
        for name, number in (("first", 1), ("second", 2), ("third", 3))
        if reach <= number * chunks.chunk < slots
    ]
    if original is not None and not scaled_requests(chunks, reach) and original < slots:
        missing.append(f"the length that scales queries and keys ({original})")
    if not missing:
        return None
    return f"in self-tests of engines, whose texts have up to {reach} tokens: {', '.join(missing)}"


def _border(name: str, border: int, end: int) -> Case:
    """The last token of a chunk and the first of the next, alone and in a prompt; and such a prompt's continuation."""
    case = Case(name)
    case.poison()
    _cross(case, border)
    case.reset()
    case.step(MAIN, min(border + 2, end))
    case.truncate(border)
    case.step(MAIN, border + 1)
    return case


def _later_borders(chunk: int, end: int) -> Case:
    """The third border and the last; then all of them in a prompt, and in pieces."""
    last = (end - 1) // chunk * chunk
    case = Case(f"borders of chunks up to {last}")
    case.poison()
    _cross(case, 3 * chunk, last)
    case.reset()
    case.step(MAIN, last + 1)
    case.reset()
    case.step(MAIN, *_pieces(last + 1, chunk)[:-1], judged=False)
    case.step(MAIN, last + 1)
    return case


def _pieces(end: int, chunk: int) -> list[int]:
    """Where pieces of a prompt end: of two tokens at least, at all places in a chunk."""
    size = max(2, 2 * chunk // 3 + 1, -(-end // MOST_PIECES))
    return [*range(size, end - 1, size), end]


def _cross(case: Case, *borders: int) -> None:
    """A step up to each border, then the two tokens around it."""
    around = {end for border in borders for end in (border, border + 1)}
    for end in sorted(around | {border - 1 for border in borders if border > 1}):
        case.step(MAIN, end, judged=end in around)


def _scaled(number: int, request: Request) -> Case:
    """The prompt, and single tokens; then its end again, after going back into it, and to its end."""
    sequence, prompt, length = REQUESTS + number, request.prompt, request.length
    case = Case(f"prompt of {prompt} and {length - prompt} more, scaled by length")
    case.poison()
    case.step(sequence, *range(prompt, length + 1))
    if prompt > 3:
        case.truncate(prompt - 3)
        case.step(sequence, prompt, prompt + 1)
    return case


def _scaled_in_pieces(number: int, request: Request, chunk: int) -> Case:
    case = Case(f"prompt of {request.prompt} in pieces, scaled by length")
    ends = _pieces(request.prompt, chunk)
    case.poison()
    case.step(REQUESTS + number, ends[0])
    case.step(REQUESTS + number, *ends[1:-1], judged=False)
    case.step(REQUESTS + number, *ends[1:][-1:], request.prompt + 1)
    return case


def _two_lengths(number: int, request: Request) -> Case:
    """A scaled request beside a short one, which is not scaled."""
    scaled, prompt = REQUESTS + number, request.prompt
    case = Case("a request scaled by length beside another")
    case.poison()
    case.feed({0: (scaled, prompt), 1: (ROWS, 5)})
    case.feed({0: (scaled, prompt + 1), 1: (ROWS, 6)})
    case.feed({1: (ROWS, 7)})
    case.feed({0: (scaled, prompt + 2)})
    return case


def _full(number: int, request: Request) -> Case:
    """A scaled request that fills the cache, and idles while another row goes on: it replays its last token."""
    scaled, length = REQUESTS + number, request.length
    case = Case("full cache, scaled by length")
    case.step(scaled, *range(request.prompt, length + 1))
    case.feed({1: (ROWS + 1, 6)})
    case.feed({1: (ROWS + 1, 7)})
    case.truncate(length - 1)
    case.feed({0: (scaled, length), 1: (ROWS + 1, 8)})
    return case


def request_prompts(requests: Sequence[Request]) -> dict[int, int]:
    """Sequence -> how many of its tokens are its prompt."""
    return {REQUESTS + number: request.prompt for number, request in enumerate(requests)}
