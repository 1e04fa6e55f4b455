"""Every bound that a verdict depends on, by name, with the reason for its value."""

from __future__ import annotations

from dataclasses import dataclass

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

# KL grows with the square of the error. Below 2e-4 it is better than 8-bit weights are (llama.cpp: 2.4e-4 on an 8B).
HALF_TIMES_OWN_KL = HALF_TIMES_OWN_REL_L2**2
HALF_KL_MEAN = 2e-4

# llama.cpp measures 99.2% for 8-bit weights: 16 bits must not be worse. The margin is TensorRT-Model-Connect's.
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
    """Bounds on `metrics.Metrics`, for every position of a scenario together.

    `near_tie_margin` is in logits: `top1_clear` is judged where transformers' margin is at least this.
    `kl_mean` is in nats; None where the bound on rel-L2 is the stricter one anyway.
    """

    rel_l2: float
    top1_clear: float
    near_tie_margin: float
    kl_mean: float | None = None


@dataclass(frozen=True)
class RouterThresholds:
    """`agreement`: the share of expert sets that must be equal where the margin, in logits, is at least `margin`."""

    margin: float
    agreement: float


def fp32_router_thresholds() -> RouterThresholds:
    """Bounds for a target that computes in fp32."""
    return RouterThresholds(FP32_ROUTER_MARGIN, FP32_TOP1)


def half_router_thresholds(own_agreement: float) -> RouterThresholds:
    """Bounds for a target that computes in bf16 or fp16.

    Args:
        own_agreement: the share that transformers itself reaches in that dtype, outside the same near-ties.
    """
    own_flips = HALF_TIMES_OWN_REL_L2 * (1 - own_agreement)
    return RouterThresholds(HALF_NEAR_TIE_MARGIN, min(HALF_TOP1, 1 - own_flips))


def fp32_thresholds(own_rounding: float, *, greedy: bool) -> Thresholds:
    """Bounds for a target that computes in fp32.

    Args:
        own_rounding: rel-L2 between two ways in which transformers computes the same logits in fp32.
        greedy: whether one other token makes another text, so that no near-tie is excused.
    """
    raised = min(FP32_REL_L2_MOST, FP32_TIMES_OWN_ROUNDING_LEAST * own_rounding)
    most = max(FP32_REL_L2, raised)
    rel_l2 = max(FP32_REL_L2_LEAST, min(most, FP32_TIMES_OWN_ROUNDING * own_rounding))
    return Thresholds(rel_l2, FP32_TOP1, 0.0 if greedy else FP32_NEAR_TIE_MARGIN)


def half_thresholds(own: Metrics) -> Thresholds:
    """Bounds for a target that computes in bf16 or fp16; `own` is what transformers reaches in that dtype."""
    return Thresholds(
        HALF_TIMES_OWN_REL_L2 * own.rel_l2,
        HALF_TOP1,
        HALF_NEAR_TIE_MARGIN,
        max(HALF_KL_MEAN, HALF_TIMES_OWN_KL * own.kl_mean),
    )
