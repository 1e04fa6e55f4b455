"""Perplexity of a long text: windows that overlap, each token scored once.

As in https://huggingface.co/docs/transformers/perplexity: windows of `window` tokens begin every `stride` tokens, and a
window scores what the one before it did not reach. The first token of a window is never scored by it, since nothing
comes before it; so with stride = window one token per window is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import Progress, no_progress
from qwenport.engines.errors import MeasuringError, SessionError
from qwenport.engines.session import CachedSession, Float32
from qwenport.engines.session_arguments import whole


@dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`.

    Attributes:
        mean_nll: mean negative log-likelihood of the scored tokens, in nats.
        perplexity: its exponential.
        tokens: tokens of the text.
        scored: how many of them were scored.
        windows: how many windows there were.
        window: tokens of a window; the last one may be shorter.
        stride: tokens from one window's beginning to the next.
    """

    mean_nll: float
    perplexity: float
    tokens: int
    scored: int
    windows: int
    window: int
    stride: int


def perplexity(
    session: CachedSession,
    token_ids: Sequence[int],
    *,
    window: int,
    stride: int,
    progress: Progress = no_progress,
) -> Perplexity:
    """Score a text with row 0 of a session, in steps no larger than the session's own.

    Log-softmax is computed in fp64 from the session's fp32 logits.

    Args:
        session: with at least `window` slots; what it held is forgotten.
        token_ids: the text, at least 2 tokens.
        window: tokens of a window, at least 2.
        stride: 1 to `window`. A token is scored given at least window - stride tokens before it, except in the first
            window.
        progress: called after each step with the tokens scored so far.

    Raises:
        MeasuringError: a value out of range, or logits from which no perplexity follows.
        SessionError: a token id outside the vocabulary, or a number that is not whole.
    """
    window, stride = whole(window, "window"), whole(stride, "stride")
    count = len(token_ids)
    if count < 2:
        raise MeasuringError(f"a text of {count} tokens: the first is only read, so 2 are needed")
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise SessionError("token ids must be whole numbers")
    for token in (ids.min(), ids.max()):
        if not 0 <= token < session.vocab_size:
            raise SessionError(
                f"token id {token} is outside the vocabulary 0..{session.vocab_size - 1}"
            )
    if session.capacity < 2:
        raise MeasuringError(f"a session of {session.capacity} slot: perplexity needs at least 2")
    if not 2 <= window <= session.capacity:
        raise MeasuringError(f"a window of {window} tokens: it must be 2 to {session.capacity}")
    if not 1 <= stride <= window:
        raise MeasuringError(f"a stride of {stride} tokens: it must be 1 to the window's {window}")
    total, scored, windows = 0.0, 0, 0
    for begin, first, end in spans(count, window, stride):
        session.reset()
        length = end - 1 - begin
        session.prefill([token_ids[begin : first - 1]], prompt_lengths=[length])
        for target, logits in _predictions(session, token_ids, first, end, length):
            total += float(_nll(logits, token_ids[target : target + len(logits)]).sum())
            scored += len(logits)
            progress("scoring", target + len(logits), count)
        windows += 1
    mean_nll = total / scored
    if not mean_nll < math.log(np.finfo(np.float64).max):  # NaN too
        raise MeasuringError(f"the mean negative log-likelihood is {mean_nll}: no perplexity")
    return Perplexity(mean_nll, math.exp(mean_nll), count, scored, windows, window, stride)


def spans(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """For each window of a text (where it begins, the first token that it scores, where it ends)."""
    reached = 1  # tokens before are scored, or cannot be
    for begin in range(0, count, stride):
        end = min(begin + window, count)
        first = max(reached, begin + 1)
        if first < end:
            yield begin, first, end
        reached = end
        if end == count:
            return


def _predictions(
    session: CachedSession, token_ids: Sequence[int], first: int, end: int, length: int
) -> Iterator[tuple[int, Float32]]:
    """For tokens first..end-1, step by step: the index of a step's first token, and the logits [n, vocab] for its
    tokens, each computed from the tokens before, as part of a request of `length` tokens."""
    widest = min(session.max_step_tokens, session.max_step_logits)
    for target in range(first, end, widest):
        (logits,) = session.prefill(
            [token_ids[target - 1 : min(target - 1 + widest, end - 1)]],
            all_logits=True,
            prompt_lengths=[length],
        )
        yield target, logits


def _nll(logits: Float32, targets: Sequence[int]) -> NDArray[np.float64]:
    """Negative log-likelihood of each row's target, fp64 [n]."""
    result = np.empty(len(logits))
    with np.errstate(invalid="ignore"):  # the caller looks for NaN
        for index, (row, target) in enumerate(zip(logits, targets, strict=True)):
            exact = row.astype(np.float64)
            top = exact.max()
            result[index] = top + np.log(np.exp(exact - top).sum()) - exact[target]
    return result
