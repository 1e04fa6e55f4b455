"""linear: positions are divided by a factor (position interpolation, arXiv 2306.15595)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from qwenport.exporter.rope.rope import Rope, Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Linear(Rope):
    """Divides all frequencies by `factor`. config.json states the extended length."""

    kind: str = field(init=False, default="linear")
    factor: float

    keys = frozenset({"factor"})
    by_factor = True

    @classmethod
    def parse(cls, settings: Settings) -> Self:
        return cls(**settings.common(), factor=settings.factor())

    def context(self, asked: bool) -> int:
        return int((self.factor if asked else 1) * self.max_position_embeddings)

    def inverse_frequencies(self, length: int) -> torch.Tensor:
        return super().inverse_frequencies(length) / self.factor
