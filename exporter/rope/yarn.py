"""yarn: high frequencies are kept, low ones divided by the factor, with a ramp in between (arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.rope.rope import Rope, Settings

if TYPE_CHECKING:
    import torch


MOST_BETA = 1e6  # rotations; published ones are 1 to 32


@dataclass(frozen=True)
class Yarn(Rope):
    """Computed as in transformers; the ramp's ends are rounded to whole dimensions if `truncate` is true."""

    kind: str = field(init=False, default="yarn")
    factor: float
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    keys = frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow "
        "mscale mscale_all_dim truncate".split()
    )
    by_factor = True

    @classmethod
    def parse(cls, settings: Settings) -> Self:
        values: dict[str, Any] = settings.numbers("attention_factor", "mscale", "mscale_all_dim")
        given = [key for key in ("beta_fast", "beta_slow") if settings.values.get(key)]
        values |= settings.numbers(*given, above=0)  # transformers treats 0 as "not given"
        for key in given:
            if not 1 / MOST_BETA <= values[key] <= MOST_BETA:
                raise ConfigError(f"rope settings: no model has {key} {values[key]:g}")
        truncate = settings.values.get("truncate", True)
        if not isinstance(truncate, bool):
            raise ConfigError(f"rope settings: truncate must be true or false, found {truncate!r}")
        original = settings.original()
        return cls(
            **settings.common(original),
            factor=settings.factor(null=settings.max_positions / original),
            truncate=truncate,
            **values,
        )

    def context(self, asked: bool) -> int:
        # The form in the model cards leaves max_position_embeddings at the original length.
        stretched = int(self.factor * self.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    def inverse_frequencies(self, length: int) -> torch.Tensor:
        wavelengths, kept = self.wavelengths(), 1 - self._ramp()
        return (1.0 / (self.factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept

    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    def _ramp(self) -> torch.Tensor:
        """0 where a frequency is kept, 1 where it is divided by the factor; [head_dim/2]."""
        import torch

        low, high = self._dimension(self.beta_fast), self._dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001  # as in transformers: avoids a division by zero
        steps = torch.arange(self.head_dim // 2, dtype=torch.float32)
        return torch.clamp((steps - low) / (high - low), 0, 1)

    def _dimension(self, rotations: float) -> float:
        """The dimension whose frequency makes this many rotations over the original length."""
        turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (self.head_dim * math.log(turns)) / (2 * math.log(self.theta))
