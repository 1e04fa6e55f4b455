"""dynamic: the base grows with the length of the text ("dynamic NTK")."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.rope.rope import Rope, Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dynamic(Rope):
    """theta * (factor * length / max_position_embeddings - (factor - 1))^(d/(d-2)) for longer texts."""

    kind: str = field(init=False, default="dynamic")
    factor: float

    keys = frozenset({"factor"})
    by_factor = True
    depends_on_length = True

    @classmethod
    def parse(cls, settings: Settings) -> Self:
        if settings.head_dim == 2:
            raise ConfigError("rope type 'dynamic' needs a head_dim above 2")
        return cls(**settings.common(), factor=settings.factor())

    def context(self, asked: bool) -> int:
        return int(self.factor * self.max_position_embeddings)

    def inverse_frequencies(self, length: int) -> torch.Tensor:
        seen = max(length, self.max_position_embeddings)
        stretch = self.factor * seen / self.max_position_embeddings - (self.factor - 1)
        theta = self.theta * stretch ** (self.head_dim / (self.head_dim - 2))
        return 1.0 / self.wavelengths(theta)
