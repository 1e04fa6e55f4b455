"""Every bound that a verdict depends on, by name, with the reason for its value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from qwenport.validate.errors import ValidationError
from qwenport.validate.metrics import Metrics

# For transformers' logits in fp32. Two correct fp32 programs differ by the order of their sums: 2e-7 to 1.2e-6
# was measured on models with 5 to 24 layers.
FP32_REL_L2 = 1e-5

# The effect of rounding alone depends on the model, and is measured: own_rounding is the larger rel-L2 of transformers'
# logits from those through its cache, and from those in fp64. Correct packages measured 0.8 to 2.4 times that (most at
# long contexts), on models where it was 2e-7 to 2e-5. If a model amplifies rounding little, the bound is tightened: a
# small mistake, such as the epsilon of one norm, hides below 1e-5.
FP32_TIMES_OWN_ROUNDING = 10
# If a model amplifies rounding so much that transformers hardly agrees with itself, the bound is raised.
FP32_TIMES_OWN_ROUNDING_LEAST = 5
# But not without limit: over a whole text, transformers disagreed with itself by at most 1.8e-5 (24 random layers).
# In a mixture of experts a larger number means a token that went to other experts.
FP32_REL_L2_MOST = 1e-4
# No experts, no such tokens: if a dense model is off by more, transformers' own fp32 against fp64 at these positions
# decides, up to this limit. In models with channels 100 times the rest it was 4.2e-5, and 1.6e-4 for a correct network.
FP32_REL_L2_MOST_DENSE = 1e-3
# Both ways may happen to run the same kernels, and then agree to the last bit.
FP32_REL_L2_LEAST = 1e-6

# A position counts as a near-tie if transformers' own two best logits are closer than this. At a rel-L2 of
# 1e-5, logits of size 10 move by 1e-4 and two of them by twice that; five times as much is left for outliers.
FP32_NEAR_TIE_MARGIN = 1e-3

# If the scenario's own positions are measured, because its error is small, the margin grows with transformers' own
# error there, fp32 against fp64, but not beyond this.
FP32_NEAR_TIE_MOST = 1e-2

# Greedy text is compared token by token: only if two logits are equal up to rounding may either win.
FP32_GREEDY_MARGIN = 2e-5

# Outside near-ties the most likely token may never differ in fp32.
FP32_TOP1 = 1.0

# bf16 and fp16 are judged where a judgement has power: layer by layer and operator by operator, each given
# transformers' own input, over at least 512 positions (`rounding`). From end to end two correct programs may differ a
# lot: transformers' own sdpa measured 0.25 to 1.34 times the error of its own eager attention. So the yardstick is the
# larger error of the two, and logits are judged by a bound that each of them keeps against the other: the lower end of
# the interval of the ratio must not exceed it.
HALF_CONFIDENCE = 0.999
HALF_TIMES_OWN = 2.0
# KL grows with the square of the error. Below 2e-4 it is better than 8-bit weights are (llama.cpp: 2.4e-4 on an 8B).
HALF_TIMES_OWN_KL = HALF_TIMES_OWN**2
HALF_KL_MEAN = 2e-4

# llama.cpp measures 99.2% for 8-bit weights: 16 bits must not be worse if the most likely token is clear, that is, if
# transformers' margin is this many times the error of one logit there, in its own run in that dtype.
HALF_TOP1 = 0.992
HALF_CLEAR_SIGMAS = 6.0
HALF_Z = 4.5  # for that share's interval: 99.9% by the exact binomial distribution if few differ

# For an operator's or a layer's result, given the same input, against transformers in fp32: the median and the 95th
# percentile over positions of (a) the relative error and (b) its systematic part, |<made, right> / <right, right> - 1|,
# in units of transformers' own. The lower end of the interval must not exceed it. For attention the largest of three
# counts: transformers' eager and sdpa, and sdpa of queries and keys each first multiplied by the root of the scale, all
# rounded. The last is what TensorRT's parser generates for any Attention: if the root is not representable in the
# dtype, the error is systematic, up to 5 times that of the others (found with heads of 12 and 28 dimensions).
# Correct operators measured up to 1.2 in (a): SiLU in two operators has three roundings where transformers has two.
# The intervals are those of order statistics, which need no assumption about the distribution.
ROUNDING_TIMES_OWN = 1.6
ROUNDING_SYSTEMATIC_TIMES_OWN = 3.0
ROUNDING_Z = 4.4  # 1 in 100,000: a large model is judged at 10,000 places
ROUNDING_QUANTILES = (0.5, 0.95)
# transformers' own error may be zero by chance (an exact sum): an eighth of half a unit in the last place is always
# allowed, and for a systematic error what as many random roundings leave.
ROUNDING_LEAST = 0.125

# A router's choice counts as a near-tie if transformers' logits of the last chosen and the first other expert are
# closer than this. Router logits are of size 1 to 10, and at a rel-L2 of 1e-5 two of them move apart by 2e-4 at most.
FP32_ROUTER_MARGIN = 2e-4
HALF_ROUTER_MARGIN = 0.1  # TensorRT-Model-Connect's, for logits in half precision

# A linear's input that is rounded to FP8 counts as a tie between two codes if it lies in the middle between them, up to
# this times the largest input of its token. Inputs of two correct fp32 programs differ as their logits do.
FP8_ROUNDING_MARGIN = FP32_REL_L2

# An engine does not show its codes, so that none can be taken over, and one that falls the other way moves everything
# after it. What that does is measured: transformers in fp32, with each input that it rounds first moved at random by up
# to FP8_ROUNDING_MARGIN. That is some ten times as much as two fp32 programs differ by, so the error is larger than
# theirs: correct programs measured up to 0.8 of it, whether few codes fall the other way (0.5 of the error of all
# rounding, in 4 layers) or each token's do (1.0 of it, in 24 wider ones). Inputs that are not rounded measured 1.3 to
# 2.1 in small models; in wide, deep ones no distance can tell them apart.
FP8_TIMES_OWN = 1.25
# In one layer, experts' inputs alone are moved: in small models correct ones measured at most 0.01 of it, and 13 to 20
# without rounding.
EXPERTS_TIMES_OWN = 2.5
# Such codes are rare in a small model, and a position may have one by chance that the measurement does not have there:
# each scenario counts as if it had so many more positions, where both errors are the typical one.
FP8_TYPICAL_POSITIONS = 16
# That is at least what one code does among few columns, of the logits: its step is up to an eighth of an input.
FP8_LEAST = 2.0**-6

# cos and sin of equal angles on two different vector units: a few units in the last place of 1 (1.2e-7).
ROPE_ABSOLUTE = 1e-6

# Relative to the angle: one unit in the last place of a frequency, if `pow` was computed on another machine,
# and one of the product position * frequency.
ROPE_RELATIVE_TO_ANGLE = 2.4e-7


@dataclass(frozen=True)
class Thresholds:
    """Bounds on `metrics.Metrics`, for all positions of a scenario together, and on routers.

    Attributes:
        near_tie_margin: in logits; in half precision, in units of transformers' own error of a logit. `top1` is judged
            where transformers' margin is at least this.
        top1: share of positions with the same most likely token.
        rel_l2: None if `times_own` is used.
        times_own: rel-L2 in units of transformers' own error, `Metrics.own_ratio`; None if `rel_l2` is used.
        kl_mean: in nats; None if the bound on rel-L2 is stricter anyway.
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


def fp32_thresholds(
    own_rounding: float, *, greedy: bool = False, highest: float = FP32_REL_L2_MOST
) -> Thresholds:
    """Bounds for a target that computes in fp32.

    Args:
        own_rounding: rel-L2 between two ways in which transformers computes the same logits in fp32.
        greedy: whether a single other token makes another text, so that only an exact tie is excused.
        highest: the largest value that the bound may be raised to.
    """
    raised = min(highest, FP32_TIMES_OWN_ROUNDING_LEAST * own_rounding)
    most = max(FP32_REL_L2, raised)
    return Thresholds(
        near_tie_margin=FP32_GREEDY_MARGIN if greedy else FP32_NEAR_TIE_MARGIN,
        top1=FP32_TOP1,
        rel_l2=max(FP32_REL_L2_LEAST, min(most, FP32_TIMES_OWN_ROUNDING * own_rounding)),
        times_own=None,
        kl_mean=None,
        router_margin=FP32_ROUTER_MARGIN,
        router_agreement=FP32_TOP1,
    )


def half_thresholds(own: Metrics, own_agreement: float = 1.0) -> Thresholds:
    """Bounds for a target that computes in bf16 or fp16. They apply to the nearer ends of intervals.

    Args:
        own: transformers' own metrics in that dtype, at the same positions: the worse of its attentions.
        own_agreement: the share of expert choices, outside near-ties, in which it agrees in that dtype.
    """
    own_flips = HALF_TIMES_OWN * (1 - own_agreement)
    return Thresholds(
        near_tie_margin=HALF_CLEAR_SIGMAS,
        top1=HALF_TOP1,
        rel_l2=None,
        times_own=HALF_TIMES_OWN,
        kl_mean=max(HALF_KL_MEAN, HALF_TIMES_OWN_KL * own.kl_mean),
        router_margin=HALF_ROUTER_MARGIN,
        router_agreement=min(HALF_TOP1, 1 - own_flips),
    )


def fp8_thresholds(own: Metrics) -> Thresholds:
    """Bounds for a target in fp32 that rounds inputs to FP8, as `half_thresholds`; KL says no more than rel-L2."""
    return replace(half_thresholds(own), times_own=FP8_TIMES_OWN, kl_mean=None)


def override(
    bounds: Thresholds, overrides: Mapping[str, float]
) -> tuple[Thresholds, tuple[str, ...]]:
    """Put the user's values in place of ours.

    Returns:
        (the bounds to use, one line per bound that is looser than ours).
    """
    looser = []
    for name, value in overrides.items():
        ours = getattr(bounds, name)
        stricter = value >= ours if name in MORE_IS_STRICTER else ours is None or value <= ours
        if ours is not None and not stricter:
            looser.append(f"{name} {value:g}, where ours is {ours:.3g}")
    return replace(bounds, **overrides), tuple(looser)


def parse_overrides(texts: Iterable[str]) -> dict[str, float]:
    """Parse "NAME=VALUE".

    Raises:
        ValidationError: no such threshold, or not a valid number for it.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in NAMES or not equals:
            raise ValidationError(
                f"threshold {text!r} is not NAME=VALUE with a name of {', '.join(NAMES)}"
            )
        try:
            found[name] = float(value)
        except ValueError:
            raise ValidationError(f"threshold {name}: {value!r} is not a number") from None
        most = 1.0 if name in MORE_IS_STRICTER else float("inf")
        if not 0 <= found[name] <= most or found[name] == float("inf"):
            raise ValidationError(f"threshold {name}: {value} is outside 0..{most:g}")
    return found
