"""llama3: long wavelengths are stretched, short ones kept, and those in between blended (Llama 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.rope.rope import Rope, Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Llama3(Rope):
    """The bounds are original length / low_freq_factor and / high_freq_factor."""

    kind: str = field(init=False, default="llama3")
    factor: float
    low_freq_factor: float
    high_freq_factor: float

    keys = frozenset(
        "factor original_max_position_embeddings low_freq_factor high_freq_factor".split()
    )

    @classmethod
    def parse(cls, settings: Settings) -> Self:
        bounds = settings.numbers("low_freq_factor", "high_freq_factor", above=0)
        for key in ("low_freq_factor", "high_freq_factor"):
            if key not in bounds:
                raise ConfigError(f"rope type 'llama3' needs {key}")
        if bounds["high_freq_factor"] <= bounds["low_freq_factor"]:
            raise ConfigError("rope type 'llama3': high_freq_factor must exceed low_freq_factor")
        return cls(
            **settings.common(settings.original()),
            factor=settings.factor(),
            low_freq_factor=bounds["low_freq_factor"],
            high_freq_factor=bounds["high_freq_factor"],
        )

    def inverse_frequencies(self, length: int) -> torch.Tensor:
        import torch

        inv_freq = super().inverse_frequencies(length)
        wavelength = 2 * math.pi / inv_freq
        original = self.original_max_position_embeddings
        long_wave = wavelength > original / self.low_freq_factor
        short_wave = wavelength < original / self.high_freq_factor
        scaled = torch.where(long_wave, inv_freq / self.factor, inv_freq)
        smooth = (original / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - smooth) * scaled / self.factor + smooth * scaled
        return torch.where(~long_wave & ~short_wave, blended, scaled)
