"""The common part of all kinds of rope scaling: plain rotary embeddings, and how their settings are read.

A kind is one file in this folder: a frozen dataclass derived from `Rope`, with the kind's parameters as fields and its
effect on frequencies, context and scale as methods. It is discovered by its file; there is no list of kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qwenport.exporter.errors import ConfigError
from qwenport.exporter.keys import MOST, short

if TYPE_CHECKING:
    import torch

MOST_FACTOR = 1e6  # largest scaling factor; published ones are at most 128


@dataclass(frozen=True)
class Rope:
    """One model's rotary settings, with every default of transformers filled in.

    Attributes:
        kind: as config.json names it.
        theta: the base of the wavelengths.
        head_dim: size of an attention head, even.
        max_position_embeddings: config.json's.
        original_max_position_embeddings: the length before scaling; equal to the former for kinds without such a key.
        depends_on_length: whether transformers changes the frequencies with the length of the text.
        keys: settings that the kind reads, besides rope_type and rope_theta.
        by_factor: whether a factor alone defines the kind (`--rope-scaling KIND:FACTOR`).
    """

    kind: str = field(init=False, default="")
    theta: float
    head_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int

    depends_on_length: ClassVar[bool] = False
    keys: ClassVar[frozenset[str]] = frozenset()
    by_factor: ClassVar[bool] = False

    @classmethod
    def parse(cls, settings: Settings) -> Self:
        """Read the kind's settings.

        Raises:
            ConfigError: a setting is missing or impossible.
        """
        return cls(**settings.common())

    def context(self, asked: bool) -> int:
        """Positions that the settings allow; `asked`: requested by `--rope-scaling`, not by config.json."""
        return self.max_position_embeddings

    def inverse_frequencies(self, length: int) -> torch.Tensor:
        """Radians per position, fp32 [head_dim/2], for texts of up to `length` tokens."""
        return 1.0 / self.wavelengths()

    def attention_scaling(self) -> float:
        """The factor by which cos and sin are multiplied."""
        return 1.0

    def wavelengths(self, theta: float | None = None) -> torch.Tensor:
        """theta^(2i/head_dim): positions per radian, fp32 [head_dim/2]."""
        import torch

        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        result: torch.Tensor = (self.theta if theta is None else theta) ** exponents
        return result


class Settings:
    """The rope settings of a config.json, as a kind reads them."""

    def __init__(
        self,
        values: dict[str, Any],
        *,
        kind: str,
        theta: float,
        head_dim: int,
        max_positions: int,
        outer_original: int | None,
    ) -> None:
        """Arguments: see `Rope`. `outer_original`: the original length given outside the settings."""
        self.values, self.kind, self.theta = values, kind, theta
        self.head_dim, self.max_positions = head_dim, max_positions
        self._outer_original = outer_original

    def common(self, original: int | None = None) -> dict[str, Any]:
        """The arguments common to all kinds."""
        return {
            "theta": self.theta,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "original_max_position_embeddings": original or self.max_positions,
        }

    def original(self) -> int:
        """The length before scaling: given outside the settings, among them, or max_position_embeddings."""
        value = self._outer_original
        if value is None:
            value = self.values.get("original_max_position_embeddings", self.max_positions)
        if type(value) is not int or not 0 < value <= MOST["original_max_position_embeddings"]:
            raise ConfigError(
                f"original_max_position_embeddings must be a possible number of positions, found {short(value)}"
            )
        return value

    def factor(
        self, *, null: float | None = None, missing: float | None = None, above: float = 1
    ) -> float:
        """How many times longer the context becomes; exactly `above` only if that is 1.

        Args:
            null, missing: the factor if it is null, or missing; None if that is an error.
            above: the lower bound.
        """
        value = self.values.get("factor", missing)
        if "factor" in self.values and value is None:
            value = null
        if value is None:
            raise ConfigError(f"rope type {self.kind!r} needs a factor")
        found = number(value, "factor", above=None if value == 1 else above)
        if found > MOST_FACTOR:
            raise ConfigError(f"rope settings: factor {found:g} is more than {MOST_FACTOR:g}")
        return found

    def numbers(self, *keys: str, above: float | None = None) -> dict[str, float]:
        """The numbers among these keys that are given."""
        return {
            key: number(self.values[key], key, above=above) for key in keys if key in self.values
        }


def number(value: Any, name: str, above: float | None = None) -> float:
    """A setting that must be a finite number, and greater than `above`."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        found = math.nan
    if isinstance(value, str) or not math.isfinite(found):
        raise ConfigError(f"rope settings: {name} must be a number, found {value!r}")
    if above is not None and not found > above:
        raise ConfigError(f"rope settings: {name} must be greater than {above:g}, found {value!r}")
    return found
