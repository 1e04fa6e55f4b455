"""Every bound that a verdict depends on, by name, with the reason for its value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from qwenport.validate.errors import ValidationError
from qwenport.validate.metrics import Metrics

# Of transformers' logits in fp32. Two correct fp32 programs differ by the order of their sums: 2e-7 to 1.2e-6
# was measured on models of 5 to 24 layers.
FP32_REL_L2 = 1e-5

# How far rounding alone goes depends on the model, and is measured: own_rounding is the rel-L2 between two ways
# in which transformers computes the same logits, in one piece and through its cache. Correct packages were found
# at 0.8 to 2.4 times that (most at long contexts), on models where it was 2e-7 to 2e-5.
# Where a model is quiet the bound is tightened: a small mistake, such as the epsilon of one norm, hides below 1e-5.
FP32_TIMES_OWN_ROUNDING = 10
# Where a model amplifies rounding so much that transformers hardly agrees with itself, the bound is raised.
FP32_TIMES_OWN_ROUNDING_LEAST = 5
# But not without end: the most that transformers was found to disagree with itself is 1.8e-5 (24 random layers). A
# larger figure is no rounding; in a mixture of experts it is a token that went to other experts.
FP32_REL_L2_MOST = 1e-4
# Both ways may happen to run the same kernels, and then agree to the last bit.
FP32_REL_L2_LEAST = 1e-6

# A position counts as a near-tie where transformers' own two best logits are closer than this. At a rel-L2 of
# 1e-5, logits of size 10 move by 1e-4 and two of them by twice that; five times as much is left for outliers.
FP32_NEAR_TIE_MARGIN = 1e-3

# Outside near-ties the most likely token may never differ in fp32.
FP32_TOP1 = 1.0

# bf16 and fp16 arithmetic is judged by the error that transformers itself makes in that dtype, on the same tokens:
# a fixed bound would be too loose for one model and refuse transformers on another (measured in bf16: rel-L2
# 0.005 to 0.018, mean KL 1e-4 to 4e-4). 1.03 was measured for TensorRT's rounding on a 24-layer model.
HALF_TIMES_OWN_REL_L2 = 1.25
# Two errors of the same size, each measured on n numbers, differ by 1/sqrt(n) by chance, and rounding errors are not
# independent of each other; four times that is allowed on top. n is the positions over which transformers' error is
# spread, times hidden_size (or vocab_size, if that is less): for a real model it is little (1.02 for 64 positions of a
# hidden size of 896), for a toy of 16 x 16 it is 1.25, and there correct networks were found at up to 1.51 times
# transformers' own error.
CHANCE_SIGMAS = 4

# KL grows with the square of the error. Below 2e-4 it is better than 8-bit weights are (llama.cpp: 2.4e-4 on an 8B).
# Its mean is over positions, and varies from one to the next by about its own size.
HALF_TIMES_OWN_KL = HALF_TIMES_OWN_REL_L2**2
HALF_KL_MEAN = 2e-4

# llama.cpp measures 99.2% for 8-bit weights: 16 bits must not be worse. The margin is TensorRT-Model-Connect's.
# Where transformers' own largest error in that dtype is larger, that is the margin: it moves logits so far itself.
HALF_TOP1 = 0.992
HALF_NEAR_TIE_MARGIN = 0.1

# A router's choice counts as a near-tie where transformers' logits of the last chosen and the first other expert are
# closer than this. Router logits are of size 1 to 10, and at a rel-L2 of 1e-5 two of them move apart by 2e-4 at most.
FP32_ROUTER_MARGIN = 2e-4

# cos and sin of equal angles, by two vector units: a few units in the last place of 1 (1.2e-7).
ROPE_ABSOLUTE = 1e-6

# Of the angle: one unit in the last place of a frequency, where `pow` was computed on another machine,
# and one of the product position * frequency.
ROPE_RELATIVE_TO_ANGLE = 2.4e-7


@dataclass(frozen=True)
class Thresholds:
    """Bounds on `metrics.Metrics`, for every position of a scenario together, and on routers.

    Attributes:
        near_tie_margin: in logits; `top1` is judged where transformers' margin is at least this.
        top1: share of positions with the same most likely token.
        rel_l2: None where `times_own` says it.
        times_own: rel-L2 in units of transformers' own error, `Metrics.own_ratio`; None where rel_l2 says it.
        kl_mean: in nats; None where the bound on rel-L2 is the stricter one anyway.
        router_margin: in router logits; choices of experts are judged where the margin is at least this.
        router_agreement: share of those choices that must be the same.
    """

    near_tie_margin: float
    top1: float
    rel_l2: float | None
    times_own: float | None
    kl_mean: float | None
    router_margin: float
    router_agreement: float


NAMES = tuple(field.name for field in fields(Thresholds))
MORE_IS_STRICTER = ("top1", "router_agreement")


def fp32_thresholds(own_rounding: float, *, greedy: bool = False) -> Thresholds:
    """Bounds for a target that computes in fp32.

    Args:
        own_rounding: rel-L2 between two ways in which transformers computes the same logits in fp32.
        greedy: whether one other token makes another text, so that no near-tie is excused.
    """
    raised = min(FP32_REL_L2_MOST, FP32_TIMES_OWN_ROUNDING_LEAST * own_rounding)
    most = max(FP32_REL_L2, raised)
    return Thresholds(
        near_tie_margin=0.0 if greedy else FP32_NEAR_TIE_MARGIN,
        top1=FP32_TOP1,
        rel_l2=max(FP32_REL_L2_LEAST, min(most, FP32_TIMES_OWN_ROUNDING * own_rounding)),
        times_own=None,
        kl_mean=None,
        router_margin=FP32_ROUTER_MARGIN,
        router_agreement=FP32_TOP1,
    )


def half_thresholds(own: Metrics, hidden_size: int, own_agreement: float = 1.0) -> Thresholds:
    """Bounds for a target that computes in bf16 or fp16.

    Args:
        own: what transformers reaches in that dtype, on the same positions.
        hidden_size: of the model.
        own_agreement: the share of expert choices, outside near-ties, that it reaches in that dtype.
    """
    own_flips = HALF_TIMES_OWN_REL_L2 * (1 - own_agreement)
    by_chance = 1 + CHANCE_SIGMAS / math.sqrt(own.effective_positions * min(hidden_size, own.vocab))
    kl_by_chance = 1 + CHANCE_SIGMAS / math.sqrt(own.positions)
    return Thresholds(
        near_tie_margin=max(HALF_NEAR_TIE_MARGIN, own.max_abs),
        top1=HALF_TOP1,
        rel_l2=None,
        times_own=HALF_TIMES_OWN_REL_L2 * by_chance,
        kl_mean=max(HALF_KL_MEAN, HALF_TIMES_OWN_KL * kl_by_chance * own.kl_mean),
        router_margin=HALF_NEAR_TIE_MARGIN,
        router_agreement=min(HALF_TOP1, 1 - own_flips),
    )


def override(
    bounds: Thresholds, overrides: Mapping[str, float]
) -> tuple[Thresholds, tuple[str, ...]]:
    """Put the user's values in place of ours.

    Returns:
        (the bounds to use, one line for each that is looser than ours).
    """
    looser = []
    for name, value in overrides.items():
        ours = getattr(bounds, name)
        stricter = value >= ours if name in MORE_IS_STRICTER else ours is None or value <= ours
        if ours is not None and not stricter:
            looser.append(f"{name} {value:g}, where ours is {ours:.3g}")
    return replace(bounds, **overrides), tuple(looser)


def parse_overrides(texts: Iterable[str]) -> dict[str, float]:
    """Read "NAME=VALUE".

    Raises:
        ValidationError: no such threshold, or not a number that could be one.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in NAMES or not equals:
            raise ValidationError(f"threshold {text!r}: NAME=VALUE, NAME one of {', '.join(NAMES)}")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValidationError(f"threshold {name}: {value!r} is not a number") from None
        most = 1.0 if name in MORE_IS_STRICTER else float("inf")
        if not 0 <= found[name] <= most or found[name] == float("inf"):
            raise ValidationError(f"threshold {name}: {value} is outside 0..{most:g}")
    return found
