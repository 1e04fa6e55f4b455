"""Choosing the next token from a row of logits: transformers' semantics, a portable draw.

Scores are processed in the order of ``GenerationMixin._get_logits_processor`` in transformers 5.23:
repetition penalty over prompt and generated ids, then (only if sampling) temperature, top-k, top-p.
All of it is float32 arithmetic with float32 scalars, as in torch, so the processed scores have
the same bits. Only in top-p may a token differ, and only if its cumulative probability equals the
threshold to within the rounding of torch's float32 softmax (about 1e-6, relative).

The draw is ours (``torch.multinomial`` is tied to torch's generator) and is specified below down to
the order of operations, so that any IEEE-754 language without contraction to FMA
(``-ffp-contract=off``) draws the same token from the same processed scores and seed:

* ``splitmix64`` (Steele, Lea, Flood 2014) and ``xoshiro256**`` (Blackman, Vigna 2018) on uint64;
* the stream of ``(seed, row)``: ``h = first splitmix64 output of state seed``; the four words of
  the xoshiro256** state are the first four splitmix64 outputs of state ``(h + row) mod 2**64``;
* weights: ``d[i] = float32(s[i] - max(s))``, ``w[i] = portable_exp(double(d[i]))``;
* ``c[i] = c[i - 1] + w[i]`` in double, in ascending order of token id, ``total = c[vocab - 1]``;
* ``u = (next() >> 11) * 2**-53``; the token is the smallest ``i`` with ``c[i] > u * total``.

One sampled token takes exactly one output of the generator; a greedy one takes none.

`log_probabilities` are defined in the same way.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwenport import QwenportError

_MASK = (1 << 64) - 1
_LOG2E = float.fromhex("0x1.71547652b82fep+0")
_LN2_HI = float.fromhex("0x1.62e42feep-1")  # 32 significant bits: k * _LN2_HI is exact
_LN2_LO = float.fromhex("0x1.a39ef35793c76p-33")
_EXP_MIN = -708.0  # below it the result would be subnormal; it is defined to be 0
_EXP_TERMS = tuple(1.0 / math.factorial(n) for n in range(13, -1, -1))
_LN2 = math.log(2.0)
_SQRT_HALF = math.sqrt(0.5)
_LOG_TERMS = tuple(1.0 / (2 * n + 1) for n in range(11, -1, -1))


class SamplingParamsError(QwenportError, ValueError):
    """A sampling parameter is of the wrong type or outside its range."""


class SamplingError(QwenportError):
    """No token can be chosen from these logits (NaN, +inf, all -inf, wrong shape or dtype)."""


def _number(name: str, value: object, low: float, high: float, zero: bool = False) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        raise SamplingParamsError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if zero and number == 0.0:
        return number
    if not low <= number <= high:
        or_else = "0 or " if zero else ""
        raise SamplingParamsError(f"{name} must be {or_else}in [{low:g}, {high:g}], got {value!r}")
    return number


def _integer(name: str, value: object, high: int | None) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise SamplingParamsError(f"{name} must be an integer, got {value!r}") from None
    if number < 0 or (high is not None and number > high):
        raise SamplingParamsError(f"{name} must be in [0, {high or 'inf'}], got {value!r}")
    return number


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; each value means the same as in transformers' ``generate``.

    Attributes:
        temperature: 0 is greedy (``do_sample=False``: top_k and top_p have no effect, the
            repetition penalty does); otherwise scores are divided by it. At most 1e30, and at
            least 1e-30 if not 0, so that it is a normal float32.
        top_k: keep the k highest scores *and all ties with the k-th*; 0 keeps all. (0 is also
            our default; ``generate`` of transformers 5.23 defaults to 50 when sampling.)
        top_p: in [0, 1]: drop the least likely tokens whose cumulative probability is at most
            ``1 - top_p``; the most likely token always stays; 1 keeps all.
        repetition_penalty: positive scores of tokens already seen are divided by it, negative ones
            multiplied, once per token however often it was seen; 1 is off. In [1e-30, 1e30].
        seed: in [0, 2**64), or None for a fresh one from the operating system per sampler.

    Raises:
        SamplingParamsError: on construction, for a value of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        def put(name: str, value: float) -> None:
            object.__setattr__(self, name, value)

        put("temperature", _number("temperature", self.temperature, 1e-30, 1e30, zero=True))
        put("top_k", _integer("top_k", self.top_k, None))
        put("top_p", _number("top_p", self.top_p, 0.0, 1.0))
        put(
            "repetition_penalty",
            _number("repetition_penalty", self.repetition_penalty, 1e-30, 1e30),
        )
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, _MASK))

    @property
    def greedy(self) -> bool:
        """True if no random number is drawn."""
        return self.temperature == 0.0


class SplitMix64:
    """splitmix64: ``next()`` adds 0x9E3779B97F4A7C15 to the state and returns its mix."""

    def __init__(self, state: int) -> None:
        self._state = state & _MASK

    def next(self) -> int:
        """The next uint64."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)


def _rotl(x: int, k: int) -> int:
    return ((x << k) | (x >> (64 - k))) & _MASK


class Xoshiro256StarStar:
    """xoshiro256** 1.0 from its four-word state (not all zero)."""

    def __init__(self, state: Sequence[int]) -> None:
        self._s = [word & _MASK for word in state]

    @classmethod
    def for_row(cls, seed: int, row: int) -> Xoshiro256StarStar:
        """The stream of ``(seed, row)`` as the module's docstring defines it."""
        mix = SplitMix64(SplitMix64(seed).next() + row)
        return cls([mix.next() for _ in range(4)])

    def next(self) -> int:
        """The next uint64."""
        s = self._s
        result = (_rotl((s[1] * 5) & _MASK, 7) * 9) & _MASK
        t = (s[1] << 17) & _MASK
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = _rotl(s[3], 45)
        return result

    def uniform(self) -> float:
        """A double in [0, 1): the upper 53 bits of ``next()`` times 2**-53 (exact)."""
        return (self.next() >> 11) * 2.0**-53


def portable_exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(x) for x <= 0 (-inf included) with the same bits everywhere; libm's and SIMD's differ.

    ``x < -708`` gives 0. Else ``k = rint(x * LOG2E)`` (half to even),
    ``r = (x - k * LN2_HI) - k * LN2_LO``, Horner's rule ``p = p * r + 1 / n!`` from n = 13 down to
    0 beginning with ``p = 1 / 13!`` (each a correctly rounded double), and ``ldexp(p, k)``, all in
    double, each operation rounded. The error is below 1.5 ulp of the true value (tested).
    Takes float64 of any shape, no element above 0, no NaN; returns float64 in [0, 1].
    """
    small = x < _EXP_MIN
    y = np.where(small, 0.0, x)
    k = np.rint(y * _LOG2E)
    r = (y - k * _LN2_HI) - k * _LN2_LO
    p = np.full_like(r, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        p = p * r
        p = p + term
    result: NDArray[np.float64] = np.where(small, 0.0, np.ldexp(p, k.astype(np.int32)))
    return result


def _check_max(scores: NDArray[np.float32], what: str) -> None:
    top = scores.max()  # NaN if there is any
    if not np.isfinite(top):
        raise SamplingError(f"no token can be chosen: the highest of the {what} is {top}")


def check_logits(logits: NDArray[np.float32], *, edited: bool = False) -> None:
    """Whether a token can be chosen from float32 ``logits`` [vocab]; ``edited`` are those after ``on_logits``.

    Raises:
        SamplingError: a wrong shape or dtype, NaN, +inf, or no finite element.
    """
    if logits.ndim != 1 or logits.size == 0 or logits.dtype != np.float32:
        raise SamplingError(f"logits must be float32 [vocab], got {logits.dtype} {logits.shape}")
    if edited and logits.max() == -np.inf:
        raise SamplingError("no token can be chosen: on_logits banned every token")
    _check_max(logits, "logits after on_logits" if edited else "logits")


def _weights(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Unnormalised probabilities, float64, the shape of ``scores`` (whose maximum is finite)."""
    return portable_exp((scores - scores.max()).astype(np.float64))


def _remove_top_p(scores: NDArray[np.float32], top_p: float) -> None:
    """Set what TopPLogitsWarper removes to -inf, in place.

    Ties that straddle the threshold lose their lowest ids first, as a stable ascending sort has
    it. (``torch.sort`` is not stable on the CPU for more than 16 elements: there the choice among
    equal scores is unspecified, their number is not.) Probabilities and cumulative sums are rounded
    to float32 and summed in double, as ``Tensor.softmax(...).cumsum(...)`` does on the CPU. The
    tail, probabilities so small that all of them together cannot reach half the threshold, goes
    without being sorted; its sum (in double, ascending ids) is where the cumulative sum starts.
    """
    kept = np.flatnonzero(scores > -np.inf)  # the others have probability 0 and stay -inf
    weights = _weights(scores[kept])
    probs = (weights / np.cumsum(weights)[-1]).astype(np.float32).astype(np.float64)
    threshold = np.float32(1.0 - top_p)
    in_tail = probs < 0.5 * float(threshold) / kept.size
    tail, rest = np.flatnonzero(in_tail), np.flatnonzero(~in_tail)
    rest = rest[np.argsort(scores[kept[rest]], kind="stable")]
    sums = np.cumsum(np.concatenate([probs[tail], probs[rest]]))[tail.size :]
    remove = sums.astype(np.float32) <= threshold
    remove[-1] = False
    scores[kept[tail]] = -np.inf
    scores[kept[rest[remove]]] = -np.inf


def process_scores(
    logits: NDArray[np.float32],
    seen_token_ids: Sequence[int] | NDArray[np.int64],
    params: SamplingParams,
) -> NDArray[np.float32]:
    """Apply transformers' processors to one row of scores; the input is not modified.

    Args:
        logits: float32 [vocab], -inf allowed.
        seen_token_ids: ids of the prompt and of the generated tokens, each >= 0. Ids >= vocab are
            ignored (as in transformers, for models whose embedding exceeds the head). Unused
            unless there is a repetition penalty.
        params: if greedy, only the repetition penalty is applied.
    Returns:
        float32 [vocab], removed tokens are -inf; at least one element is finite.
    Raises:
        SamplingError: a wrong shape or dtype, a negative id, NaN, +inf (also by overflow), or no
            finite element. (transformers raises from ``torch.multinomial`` for most of these, but
            its greedy search silently takes the index of a NaN.)
    Source:
        transformers 5.23 ``generation/logits_process.py``: RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper with min_tokens_to_keep=1.
    """
    check_logits(logits)
    scores = logits.copy()
    with np.errstate(over="ignore"):
        if params.repetition_penalty != 1.0:
            seen = np.asarray(seen_token_ids, dtype=np.int64)
            if seen.size and seen.min() < 0:
                raise SamplingError(f"a seen token id is negative: {seen.min()}")
            seen = seen[seen < scores.size]
            old, penalty = logits[seen], np.float32(params.repetition_penalty)
            scores[seen] = np.where(old < 0, old * penalty, old / penalty)
        if not params.greedy and params.temperature != 1.0:
            scores /= np.float32(params.temperature)
    _check_max(scores, "processed scores")
    if params.greedy:
        return scores
    if 0 < params.top_k < scores.size:
        threshold = np.partition(scores, scores.size - params.top_k)[scores.size - params.top_k]
        scores[scores < threshold] = -np.inf
    if params.top_p < 1.0:
        _remove_top_p(scores, params.top_p)
    return scores


class Sampler:
    """Token sampling for one row of one request: its parameters `params` and its own random stream, whose `seed` is
    fresh if theirs is None."""

    def __init__(self, params: SamplingParams, *, row: int = 0) -> None:
        """Use the stream ``(params.seed, row)``; rows with the same seed have unrelated streams.

        Raises:
            SamplingParamsError: ``row`` is not an integer in [0, 2**64).
        """
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self._random = Xoshiro256StarStar.for_row(self.seed, _integer("row", row, _MASK))

    def sample(
        self, logits: NDArray[np.float32], seen_token_ids: Sequence[int] | NDArray[np.int64] = ()
    ) -> int:
        """The next token for float32 ``logits`` [vocab]; raises as ``process_scores`` does.

        Greedy takes the lowest id among equal scores, as ``torch.argmax`` does on the CPU.
        """
        scores = process_scores(logits, seen_token_ids, self.params)
        if self.params.greedy:
            return int(scores.argmax())
        kept = np.flatnonzero(scores > -np.inf)  # adding the zeros of the others changes nothing
        cumulative = np.cumsum(_weights(scores[kept]))
        target = self._random.uniform() * float(cumulative[-1])  # < total: u <= 1 - 2**-53
        return int(kept[np.searchsorted(cumulative, target, side="right")])


class TokenLogprob(NamedTuple):
    """A token and its log-probability.

    Attributes:
        token: the token's id.
        logprob: a float32 value, at most 0; -inf for a token that cannot be drawn.
    """

    token: int
    logprob: float


def portable_log(x: float) -> float:
    """log(x) for a finite x >= 1 with the same bits everywhere.

    ``x = m * 2**e`` with ``sqrt(0.5) <= m < sqrt(2)``, ``s = (m - 1) / (m + 1)``, ``z = s * s``, Horner's rule
    ``p = p * z + 1 / (2 n + 1)`` from n = 11 down to 0 beginning with ``p = 1 / 23``, and ``e * LN2 + 2 * s * p``, all
    in double, each operation rounded. The error is below 3 ulp of the true value (tested).
    """
    m, e = math.frexp(x)
    if m < _SQRT_HALF:
        m, e = 2.0 * m, e - 1
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = _LOG_TERMS[0]
    for term in _LOG_TERMS[1:]:
        p = p * z
        p = p + term
    return e * _LN2 + 2.0 * s * p


def log_probabilities(
    logits: NDArray[np.float32], token: int, top: int
) -> tuple[float, list[TokenLogprob]]:
    """log_softmax of one row: of one token, and of the ``top`` most likely ones.

    ``d[i] = double(logits[i]) - double(max(logits))`` and ``total = sum(portable_exp(d[i]))`` in ascending order of
    token id, in double; the log-probability of ``i`` is ``float32(d[i] - portable_log(total))``.

    Args:
        logits: float32 [vocab] that `check_logits` accepts.
        token: an id in [0, vocab).
        top: how many, in [0, vocab].

    Returns:
        The log-probability of ``token``, a float32 value; the most likely tokens with theirs, highest logit first,
        equal ones by ascending id.
    """
    differences = logits.astype(np.float64) - float(logits.max())
    log_total = portable_log(float(np.cumsum(portable_exp(differences))[-1]))

    def of(ids: list[int]) -> list[float]:
        with np.errstate(over="ignore"):
            found: list[float] = (differences[ids] - log_total).astype(np.float32).tolist()
        return found

    if top == 0:
        return of([token])[0], []
    least = np.partition(logits, logits.size - top)[logits.size - top]
    candidates = np.flatnonzero(logits >= least)
    ids = candidates[np.argsort(-logits[candidates], kind="stable")][:top].tolist()
    likely = [TokenLogprob(*pair) for pair in zip(ids, of(ids), strict=True)]
    return of([token])[0], likely
