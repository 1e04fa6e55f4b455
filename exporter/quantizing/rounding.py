"""Rounds a weight to codes: each group gets the scale and zero point of least squared error that a search finds.

A group is a run of values along K that share a scale. The search starts from the scale that spans the largest value,
tries smaller ones, which clip the largest values and round all others more finely, and then fits the scale to the
codes. Scales are rounded to the model's dtype before codes are chosen for them, and the last choice is by the values
that a program dequantizes, rounded as it rounds them. Plain rounding is among the choices, so it is never better.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from qwenport.exporter.quantization import Storage

CLIPS = tuple(1 - 0.05 * step for step in range(8))
"""Tried parts of a group's range; what lies outside is clipped."""
ELEMENTS_AT_ONCE = (1 << 15) - 1
"""Values rounded at a time by a thread: they stay in its cache, and torch gives its operators no threads of their own,
which would wait for one another at every step."""


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        codes: uint8 [N, K].
        scales: [N, blocks], finite and positive.
        zeros: uint8 [N, blocks]; the middle code if the weight is symmetric.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


@dataclass
class _Choice:
    """The best scales (fp32) and zero points (fp32) so far, each [groups, 1], and their squared errors [groups, 1]."""

    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor

    def take(self, other: _Choice) -> None:
        """Take what is better in `other`."""
        better = other.error < self.error
        for name in ("scale", "zero", "error"):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))


def round_weight(weight: torch.Tensor, storage: Storage, dtype: torch.dtype) -> Rounded:
    """Round a weight.

    Args:
        weight: [N, K] in any float type, without NaN and infinity, and within `dtype`'s range.
        storage: bits, group and symmetry; the group divides K.
        dtype: of the scales: bf16, fp16 or fp32.
    """
    rows, columns = weight.shape
    group = storage.block(columns)
    at_once = max(1, ELEMENTS_AT_ONCE // columns)

    def rounded(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _Rounding(part.float().reshape(-1, group), storage, dtype).result()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(rounded, weight.split(at_once)))
    codes, scales, zeros = (torch.cat([made[index] for made in done]) for index in range(3))
    return Rounded(codes.reshape(rows, columns), scales.reshape(rows, -1), zeros.reshape(rows, -1))


class _Rounding:
    """The search over some groups, [groups, group] in fp32."""

    def __init__(self, values: torch.Tensor, storage: Storage, dtype: torch.dtype) -> None:
        self._symmetric, self._dtype = storage.symmetric, dtype
        self._most, self._middle = (1 << storage.bits) - 1, storage.middle
        self._empty = values.abs().amax(1, keepdim=True) == 0
        # Each group is brought near 1 by a power of two, so that no square overflows or vanishes.
        exponent = torch.frexp(values.abs().amax(1, keepdim=True)).exponent.clamp(-126, 126)
        self._up = torch.ldexp(torch.ones(exponent.shape), -exponent)
        self._values = values * self._up
        self._work = torch.empty_like(self._values)

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [groups, group], scales [groups, 1] in the dtype and zero points [groups, 1]."""
        ranges = self._ranges()
        plain = self._tried(*next(ranges))
        best = replace(plain)
        for scale, zero in ranges:
            best.take(self._tried(scale, zero))
        if not self._symmetric:
            for zero in (best.zero - 1, best.zero + 1):
                best.take(self._tried(best.scale, zero.clamp(0, self._most)))
        fitted = self._fitted(best)
        step = torch.finfo(self._dtype).eps
        final = self._tried(plain.scale, plain.zero, as_dequantized=True)
        for scale in (best.scale, fitted, fitted * (1 - step), fitted * (1 + step)):
            final.take(self._tried(scale, best.zero, as_dequantized=True))
        codes = self._steps(final.scale, final.zero).add_(final.zero).to(torch.uint8)
        scales = torch.where(self._empty, 1.0, final.scale / self._up).to(self._dtype)
        return codes, scales, final.zero.to(torch.uint8)

    def _ranges(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(scale, zero point) to try, first those of plain rounding."""
        low = self._values.amin(1, keepdim=True).clamp(max=0)
        high = self._values.amax(1, keepdim=True).clamp(min=0)
        middle = torch.full_like(low, float(self._middle))
        if self._symmetric:
            high = torch.maximum(-low, high)
            for clip in CLIPS:
                yield high * (2 * clip / self._most), middle
            # with the largest value on the last code of its side
            yield high / self._middle, middle
            yield high / (self._middle - 1), middle
            return
        spread = high - low
        zero = torch.where(self._empty, middle, (-low * self._most / spread).round_())
        for clip in CLIPS:
            yield spread * (clip / self._most), zero

    def _stored(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Scales after their rounding to the dtype; none is 0, or so large that a dequantized value is infinite."""
        info = torch.finfo(self._dtype)
        largest = info.max * (1 - 2 * info.eps) / torch.maximum(zero, self._most - zero)
        scale = torch.minimum((scale / self._up).clamp_(info.tiny * info.eps), largest)
        return scale.to(self._dtype).float() * self._up

    def _steps(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Code minus zero point of each value, [groups, group]; valid until the next call."""
        steps = torch.div(self._values, scale, out=self._work).round_()
        if self._symmetric:
            return steps.clamp_(-self._middle, self._middle - 1)
        return torch.clamp(steps, -zero, self._most - zero, out=steps)

    def _tried(
        self, scale: torch.Tensor, zero: torch.Tensor, *, as_dequantized: bool = False
    ) -> _Choice:
        scale = self._stored(scale, zero)
        made = self._steps(scale, zero).mul_(scale)
        if as_dequantized:
            made = (made / self._up).to(self._dtype).float().mul_(self._up)
        error = made.sub_(self._values).square_().sum(1, keepdim=True)
        return _Choice(scale, zero, error)

    def _fitted(self, choice: _Choice) -> torch.Tensor:
        """The scales of least squared error for the chosen codes."""
        steps = self._steps(choice.scale, choice.zero)
        products = (steps * self._values).sum(1, keepdim=True)
        squares = steps.square_().sum(1, keepdim=True)
        return torch.where(squares > 0, products / squares, choice.scale)
