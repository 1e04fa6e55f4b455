"""Which of a TensorRT engine's profiles runs a step. C++ has the same in cpp/src/executors.cpp.

A profile is a box of sizes. With dual chunk attention each admits narrower steps over longer spans than the one before;
so the profiles say what there is memory for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qwenport.contract import INPUT_IDS, KEY_POSITIONS, LOGITS_INDICES
from qwenport.engines.request import Profile
from qwenport.engines.spans import Spans


class StepSizes(NamedTuple):
    """What distinguishes the shapes of two steps."""

    rows: int
    width: int
    span: int
    logits: int  # per row


class StepProfiles:
    """The profiles of an engine, as its manifest has them."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        self._limits = [_limits(profile) for profile in profiles]

    def of(self, sizes: StepSizes) -> int | None:
        """The first that admits a step; of several, the first is tuned for single tokens and runs no others."""
        for index, (least, most) in enumerate(self._limits):
            if sizes.width > 1 and index == 0 < len(self._limits) - 1:
                continue
            if all(map(operator.le, least, sizes)) and all(map(operator.le, sizes, most)):
                return index
        return None

    def largest(self, rows: int, width: int, span: int, spans: Spans) -> Iterator[StepSizes]:
        """The largest steps: of a single token, then those of each profile for several.

        Args:
            rows: of a step.
            width: tokens per row, at most.
            span: slots, at most.
            spans: those that steps have.
        """
        yield StepSizes(rows, 1, span, 1)
        for least, most in self._limits[1:] or self._limits:
            if least.width <= width:
                longest = spans.within(min(most.span, span))
                yield StepSizes(rows, min(most.width, width), longest, 1)


def _limits(profile: Profile) -> tuple[StepSizes, StepSizes]:
    """The smallest and the largest sizes of steps that a profile admits."""
    least, most = (
        StepSizes(
            profile[INPUT_IDS][end][0],
            profile[INPUT_IDS][end][1],
            profile[KEY_POSITIONS][end][0],
            profile[LOGITS_INDICES][end][1],
        )
        for end in ("min", "max")
    )
    return least, most
