"""The active spans of a cache: how many of its slots a step attends to.

They are few, so that shapes recur: each has its own CUDA graph, execution context and just-in-time compiled kernels.
C++ has the same rule in cpp/src/spans.hpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Spans:
    """The spans of a cache, in slots: multiples of the first, each an eighth larger than the last, then all slots.

    Attributes:
        multiple: the first span.
        slots: of the cache; the last span.
    """

    multiple: int
    slots: int

    def __iter__(self) -> Iterator[int]:
        span = self.multiple
        while span < self.slots:
            yield span
            larger = -(-9 * span // (8 * self.multiple)) * self.multiple
            span = max(span + self.multiple, larger)
        yield self.slots

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def holding(self, count: int) -> int:
        """The smallest span of at least `count` slots, of which the cache has that many."""
        return next((span for span in self if span >= count), self.slots)

    def within(self, limit: int) -> int:
        """The largest span of at most `limit` slots, or the first."""
        return max((span for span in self if span <= limit), default=next(iter(self)))
