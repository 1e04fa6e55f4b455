"""What is right: transformers' logits, each position computed once; and transformers' own error in a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qwenport.validate.metrics import Metrics, compare
from qwenport.validate.reference import Choices, Reference, Text

Float32 = NDArray[np.float32]

# transformers' implementations of attention. In half precision they round differently, and both are right.
ATTENTIONS = ("eager", "sdpa")


@dataclass
class _Known:
    """Logits of one text, by index of the token."""

    tokens: tuple[int, ...]
    first_position: int
    rows: dict[int, Float32] = field(default_factory=dict)

    def begins(self, text: Text) -> bool:
        """Whether `text` is the beginning of this one: attention never looks ahead."""
        count = len(text.tokens)
        return self.first_position == text.first_position and self.tokens[:count] == text.tokens


class Oracle:
    """The reference, asked about each position once.

    Attributes:
        reference: transformers.
        own_rounding: rel-L2 between two ways in which transformers computes the same logits in fp32.
    """

    def __init__(self, reference: Reference, tokens: Sequence[int]) -> None:
        """Measure `own_rounding` on some tokens, at least two."""
        self.reference = reference
        self.own_rounding = reference.own_rounding(tokens) if len(tokens) > 1 else 0.0
        self._known: dict[tuple[str, str], list[_Known]] = {}

    def logits(
        self, texts: Sequence[Text], dtype: str = "fp32", attention: str = "eager"
    ) -> list[Float32]:
        """transformers' logits of the texts' positions, fp32 [len(positions), vocab] each.

        Several texts that begin alike are computed as one.
        """
        known = self._known.setdefault((dtype, attention), [])
        new: list[_Known] = []
        wanted: list[set[int]] = []
        served = []
        for text in sorted(texts, key=lambda text: -len(text.tokens)):
            owner = next((k for k in known if k.begins(text)), None)
            if owner is not None and all(index in owner.rows for index in text.positions):
                continue
            number = next((i for i, k in enumerate(new) if k.begins(text)), None)
            if number is None:
                number = len(new)
                new.append(_Known(text.tokens, text.first_position))
                wanted.append(set())
            wanted[number] |= set(text.positions)
        asked = [
            Text(k.tokens, tuple(sorted(positions)), k.first_position)
            for k, positions in zip(new, wanted, strict=True)
        ]
        if asked:
            made = self.reference.logits(asked, dtype, attention=attention)
            for k, text, logits in zip(new, asked, made, strict=True):
                k.rows.update(zip(text.positions, logits, strict=True))
        known += new
        for text in texts:
            owner = next(
                k
                for k in known
                if k.begins(text) and all(index in k.rows for index in text.positions)
            )
            served.append(np.stack([owner.rows[index] for index in text.positions]))
        return served

    def with_choices(
        self, texts: Sequence[Text], choices: Sequence[Choices | None]
    ) -> tuple[list[Float32], int]:
        """The logits once more, with experts taken over in near-ties.

        Returns:
            (the logits, how many choices were taken over).
        """
        before = self.reference.replayed
        logits = self.reference.logits(texts, choices=choices)
        return logits, self.reference.replayed - before

    def own_errors(self, texts: Sequence[Text], dtype: str) -> list[Metrics]:
        """What transformers itself reaches in a dtype, for each of ATTENTIONS."""
        right = np.concatenate(self.logits(texts))
        return [
            compare(np.concatenate(self.logits(texts, dtype, attention)), right)
            for attention in ATTENTIONS
        ]
