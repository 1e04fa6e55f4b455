"""default: plain rotary embeddings, no scaling."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenport.exporter.rope.rope import Rope


@dataclass(frozen=True)
class Default(Rope):
    """theta^(-2i/head_dim), independent of position."""

    kind: str = field(init=False, default="default")
