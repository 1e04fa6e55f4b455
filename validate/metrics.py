"""The distance between two sets of logits: one function, used by every gate.

The arithmetic is float64, one block of positions at a time, so that a vocabulary of 150,000 needs little memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwenport.validate.errors import ValidationError

TOP = 5
BLOCK = 16  # positions compared at once: 16 x 152,064 logits in float64 are 19 MB

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class ByPosition:
    """One number per position.

    Attributes:
        rel_l2: ||candidate - reference|| / ||reference||.
        kl: KL(reference || candidate) in nats.
        difference: ||candidate - reference||, in logits.
    """

    rel_l2: tuple[float, ...]
    kl: tuple[float, ...]
    difference: tuple[float, ...]


@dataclass(frozen=True)
class Interval:
    """Where a number would lie, with the stated confidence, if other positions were judged."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Metrics:
    """Distance of a candidate's logits from the reference's, over `positions` rows of `vocab` logits.

    Attributes:
        nonfinite: NaN and infinite logits of the candidate. If there is one, every distance is NaN.
        max_abs, mean_abs: of |candidate - reference|.
        rel_l2: ||candidate - reference|| / ||reference||, all positions as one vector.
        worst_rel_l2, worst_position: the largest rel-L2 of a single position, and that position.
        effective_positions: how many positions the error is spread over: all of them if all are equally far off, 1 if
            a single position accounts for the whole error.
        cosine_p5: 5th percentile, over positions, of the cosine similarity.
        kl_mean, kl_p99: KL(reference || candidate) in nats, over positions.
        top1: share of positions with the same most likely token.
        top1_clear: the same without near-ties; 1 if every position is one.
        top5_overlap: mean share of the reference's five most likely tokens that are the candidate's as well.
        near_ties: positions where the reference's two best logits are closer than the requested margin, the largest
            of which is `near_tie_margin`; `top1_clear` judges the other positions.
        smallest_margin: the smallest distance between the reference's two best logits.
        first_disagreement: the first position with another most likely token, or None.
        first_disagreement_margin: the reference's margin there.
        own_ratio: rel_l2 in units of transformers' own error: in bf16 and fp16 its error in that dtype at the same
            positions, in fp32 the rounding between its cache and one piece. None until it is known.
        own_ratio_interval, kl_interval, top1_interval: intervals of `own_ratio`, `kl_mean` and `top1_clear`. None in
            fp32, where the bounds are on the numbers themselves.
        by_position: see `ByPosition`.
    """

    positions: int
    vocab: int
    nonfinite: int
    max_abs: float
    mean_abs: float
    rel_l2: float
    worst_rel_l2: float
    worst_position: int
    effective_positions: float
    cosine_p5: float
    kl_mean: float
    kl_p99: float
    top1: float
    top1_clear: float
    top5_overlap: float
    near_ties: int
    near_tie_margin: float
    smallest_margin: float
    first_disagreement: int | None
    first_disagreement_margin: float | None
    own_ratio: float | None
    by_position: ByPosition
    own_ratio_interval: Interval | None = None
    kl_interval: Interval | None = None
    top1_interval: Interval | None = None


def compare(
    candidate: Float32, reference: Float32, *, near_tie_margin: float | Float64 = 0.0
) -> Metrics:
    """Measure how far `candidate` is from `reference`.

    Args:
        candidate: logits [positions, vocab].
        reference: logits of the same shape, finite.
        near_tie_margin: in logits, one for all positions or one per position; see `Metrics.near_ties`.

    Raises:
        ValidationError: the shapes differ, there is nothing to compare, or the reference itself is not finite.
    """
    if candidate.shape != reference.shape or candidate.ndim != 2 or not candidate.size:
        raise ValidationError(
            f"logits of shapes {candidate.shape} and {reference.shape} cannot be compared"
        )
    if not np.isfinite(reference).all():
        raise ValidationError(
            "transformers itself computes NaN or infinite logits here; there is nothing to compare with "
            "(`qwenport export --check-values` names a weight that is not finite)"
        )
    blocks = [
        _Block.of(candidate[start : start + BLOCK], reference[start : start + BLOCK])
        for start in range(0, len(reference), BLOCK)
    ]
    rows = _Block(
        *(np.concatenate(parts) for parts in zip(*map(_Block.fields, blocks), strict=True))
    )
    count, vocab = reference.shape
    margins = rows.margin
    clear = margins >= near_tie_margin
    differs = np.flatnonzero(~rows.same)
    first = int(differs[0]) if len(differs) else None
    own = _ratio(rows.difference, rows.norm)
    worst = int(np.argmax(np.where(np.isnan(own), np.inf, own)))
    return Metrics(
        positions=count,
        vocab=vocab,
        nonfinite=int(rows.nonfinite.sum()),
        max_abs=float(rows.max_abs.max()),
        mean_abs=float(rows.sum_abs.sum() / (count * vocab)),
        rel_l2=float(_ratio(np.sqrt(np.sum(rows.difference**2)), np.sqrt(np.sum(rows.norm**2)))),
        worst_rel_l2=float(own[worst]),
        worst_position=worst,
        effective_positions=_spread(rows.difference**2),
        cosine_p5=float(np.percentile(rows.cosine, 5)),
        kl_mean=float(rows.kl.mean()),
        kl_p99=float(np.percentile(rows.kl, 99)),
        top1=float(rows.same.mean()),
        top1_clear=float(rows.same[clear].mean()) if clear.any() else 1.0,
        top5_overlap=float(rows.overlap.mean()),
        near_ties=int(count - clear.sum()),
        near_tie_margin=float(np.max(near_tie_margin)),
        smallest_margin=float(margins.min()),
        first_disagreement=first,
        first_disagreement_margin=None if first is None else float(margins[first]),
        own_ratio=None,
        by_position=ByPosition(
            tuple(own.tolist()), tuple(rows.kl.tolist()), tuple(rows.difference.tolist())
        ),
    )


def ratio_interval(made: Float64, own: Float64, confidence: float) -> Interval:
    """Interval of the ratio of two errors, each a root of squares summed over the same positions: seeded bootstrap.

    Args:
        made, own: errors by position, [n]; not negative.
        confidence: two-sided confidence of the interval.
    """
    counts = _resampled(len(made))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.sqrt((counts @ made**2) / (counts @ own**2))
    return _between(ratios, confidence)


def mean_interval(values: Float64, confidence: float) -> Interval:
    """Interval of a mean over positions: seeded bootstrap."""
    return _between(_resampled(len(values)) @ values / len(values), confidence)


def share_interval(hits: int, count: int, z: float, confidence: float) -> Interval:
    """Interval of a share, `hits` of `count`: Wilson's score interval at `z` standard deviations."""
    if not count:
        return Interval(0.0, 1.0, confidence)
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Interval(max(0.0, middle - half), min(1.0, middle + half), confidence)


RESAMPLES = 2000


def _resampled(count: int) -> Float64:
    """How often each of `count` positions occurs in each of RESAMPLES draws with replacement, [RESAMPLES, count]."""
    generator = np.random.default_rng(20240919)
    return generator.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def _between(values: Float64, confidence: float) -> Interval:
    if not np.isfinite(values).all():
        return Interval(float("nan"), float("nan"), confidence)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence)


def _spread(shares: Float64) -> float:
    """Over how many of its terms a sum is spread: (sum x)^2 / sum x^2; all of them if that is undefined."""
    largest = shares.max()
    if not 0 < largest < np.inf:
        return float(len(shares))
    scaled = shares / largest
    return float(scaled.sum() ** 2 / (scaled**2).sum())


def _ratio(numerator: Float64, denominator: Float64) -> Float64:
    """numerator / denominator; 0 / 0 is 0, x / 0 is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Float64 = np.where(
            (numerator == 0) & (denominator == 0), 0.0, np.divide(numerator, denominator)
        )
    return ratio


@dataclass(frozen=True)
class _Block:
    """One number per position, float64 [n] (`same`: bool)."""

    nonfinite: Float64
    max_abs: Float64
    sum_abs: Float64
    difference: Float64  # L2 norm of candidate - reference
    norm: Float64  # of the reference
    cosine: Float64
    kl: Float64
    same: NDArray[np.bool_]
    margin: Float64
    overlap: Float64  # share of the TOP most likely tokens

    def fields(self) -> tuple[NDArray[np.generic], ...]:
        return tuple(vars(self).values())

    @classmethod
    def of(cls, candidate: Float32, reference: Float32) -> _Block:
        finite = np.isfinite(candidate)
        broken: NDArray[np.bool_] = ~np.all(finite, axis=1)
        # One bad logit spoils its whole position: no metric may look good next to it.
        c = np.where(broken[:, None], np.nan, candidate.astype(np.float64))
        r = reference.astype(np.float64)
        absolute = np.abs(c - r)
        norm, other = np.linalg.norm(r, axis=1), np.linalg.norm(c, axis=1)
        dot = np.sum(c * r, axis=1)
        both_zero = (norm == 0) & (other == 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = np.where(
                both_zero, 1.0, np.where(norm * other == 0, 0.0, dot / (norm * other))
            )
        log_r, log_c = _log_softmax(r), _log_softmax(c)
        kl = np.sum(np.exp(log_r) * (log_r - log_c), axis=1)
        return cls(
            nonfinite=np.sum(~finite, axis=1),
            max_abs=absolute.max(axis=1),
            sum_abs=absolute.sum(axis=1),
            difference=np.linalg.norm(c - r, axis=1),
            norm=norm,
            cosine=cosine,
            kl=np.where(np.isnan(kl), kl, np.maximum(kl, 0.0)),  # only rounding makes it negative
            same=(np.argmax(c, axis=1) == np.argmax(r, axis=1)) & ~broken,
            margin=_margin(r),
            overlap=np.where(broken, 0.0, _overlap(c, r)),
        )


def _log_softmax(x: Float64) -> Float64:
    shifted = x - x.max(axis=1, keepdims=True)
    result: Float64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _margin(x: Float64) -> Float64:
    """Distance between the two largest logits of each row; infinite for a vocabulary of one."""
    if x.shape[1] == 1:
        return np.full(len(x), np.inf)
    best = np.partition(x, -2, axis=1)[:, -2:]
    margin: Float64 = best[:, 1] - best[:, 0]
    return margin


def _overlap(c: Float64, r: Float64) -> Float64:
    """The share of the TOP largest columns of `r` that are among those of `c`, for each row."""
    top = min(TOP, r.shape[1])
    best_c, best_r = (np.argpartition(-x, top - 1, axis=1)[:, :top] for x in (c, r))
    shared: Float64 = (best_c[:, :, None] == best_r[:, None, :]).any(axis=1).mean(axis=1)
    return shared
