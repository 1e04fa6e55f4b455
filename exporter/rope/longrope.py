"""longrope: a separate factor for each frequency, one list for short texts and one for long (arXiv 2402.13753)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.rope.rope import Rope, Settings, number

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LongRope(Rope):
    """`long_factor` applies to texts longer than the original length. Each list is [head_dim/2]."""

    kind: str = field(init=False, default="longrope")
    factor: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    keys = frozenset(
        "factor original_max_position_embeddings attention_factor short_factor long_factor".split()
    )
    depends_on_length = True

    @classmethod
    def parse(cls, settings: Settings) -> Self:
        original, count = settings.original(), settings.head_dim // 2
        ratio = settings.max_positions / original

        def factors(key: str) -> tuple[float, ...]:
            values = settings.values.get(key)
            if not isinstance(values, list) or len(values) != count:
                raise ConfigError(f"rope type 'longrope' needs {count} numbers in {key}")
            return tuple(number(value, key, above=0) for value in values)

        return cls(
            **settings.common(original),
            factor=settings.factor(null=ratio, missing=ratio, above=0),
            short_factor=factors("short_factor"),
            long_factor=factors("long_factor"),
            attention_factor=settings.numbers("attention_factor").get("attention_factor"),
        )

    def inverse_frequencies(self, length: int) -> torch.Tensor:
        import torch

        is_long = length > self.original_max_position_embeddings
        factors = torch.tensor(
            self.long_factor if is_long else self.short_factor, dtype=torch.float32
        )
        return 1.0 / (factors * self.wavelengths())

    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1.0:
            return 1.0
        original = self.original_max_position_embeddings
        return math.sqrt(1 + math.log(self.factor) / math.log(original))
