"""The reference values: transformers' logits, each position computed once; and transformers' own error in a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwenport.contract import E4M3, INT8
from qwenport.validate.metrics import Metrics, compare
from qwenport.validate.text import Choices, Text
from qwenport.validate.thresholds import FP8_LEAST

if TYPE_CHECKING:
    from qwenport.validate.reference import Reference

Float32 = NDArray[np.float32]

# transformers' attention implementations. In half precision they round differently, and both are correct.
ATTENTIONS = ("eager", "sdpa")
LONG = 512  # tokens: beyond it eager scores cost more than all matmuls, and in fp32 both agree


@dataclass
class _Known:
    """Logits of one text, by index of the token."""

    tokens: tuple[int, ...]
    first_position: int
    requests: tuple[int, ...]
    rows: dict[int, Float32] = field(default_factory=dict)

    def begins(self, text: Text) -> bool:
        """Whether `text` is a prefix of this one; attention never looks ahead."""
        count = len(text.tokens)
        return (
            self.first_position == text.first_position
            and self.tokens[:count] == text.tokens
            and self.requests[:count] == text.requests
        )


class Oracle:
    """The reference, queried once per position.

    Attributes:
        reference: transformers.
        own_rounding: rel-L2 between two ways in which transformers computes the same logits in fp32.
    """

    def __init__(self, reference: Reference, tokens: Sequence[int]) -> None:
        """Measure `own_rounding` on some tokens, at least two."""
        self.reference = reference
        self._tokens = tuple(tokens)
        self.own_rounding = reference.own_rounding(tokens) if len(tokens) > 1 else 0.0
        self._known: dict[tuple[str, str], list[_Known]] = {}

    def logits(
        self, texts: Sequence[Text], dtype: str = "fp32", attention: str = "eager"
    ) -> list[Float32]:
        """transformers' logits of the texts' positions, fp32 [len(positions), vocab] each.

        Texts that are prefixes of another are computed with it.
        """
        known = self._known.setdefault((dtype, attention), [])

        def implementation(text: Text) -> str:
            return (
                "sdpa" if dtype in ("fp32", INT8, E4M3) and len(text.tokens) > LONG else attention
            )

        missing: dict[int, set[int]] = {}  # by index in `known`
        for text in sorted(texts, key=lambda text: -len(text.tokens)):
            index = next((i for i, k in enumerate(known) if k.begins(text)), None)
            if index is None:
                index = len(known)
                known.append(_Known(text.tokens, text.first_position, text.requests))
            if new := set(text.positions) - known[index].rows.keys():
                missing.setdefault(index, set()).update(new)
        asked = [
            Text(
                known[index].tokens[: max(positions) + 1],
                tuple(sorted(positions)),
                known[index].first_position,
                known[index].requests[: max(positions) + 1],
            )
            for index, positions in missing.items()
        ]
        for kind in dict.fromkeys(map(implementation, asked)):
            some = [
                (i, t) for i, t in zip(missing, asked, strict=True) if implementation(t) == kind
            ]
            made = self.reference.logits([text for _, text in some], dtype, attention=kind)
            for (index, text), logits in zip(some, made, strict=True):
                known[index].rows.update(zip(text.positions, logits, strict=True))
        rows = [next(k.rows for k in known if k.begins(text)) for text in texts]
        return [
            np.stack([of_text[index] for index in text.positions])
            for of_text, text in zip(rows, texts, strict=True)
        ]

    def with_choices(
        self, texts: Sequence[Text], choices: Sequence[Choices | None]
    ) -> tuple[list[Float32], int]:
        """The logits again, with experts taken over in near-ties.

        Returns:
            (the logits, the number of choices taken over).
        """
        before = self.reference.replayed
        logits = self.reference.logits(texts, choices=choices)
        return logits, self.reference.replayed - before

    def own_rounding_of(self, texts: Sequence[Text]) -> Metrics:
        """How far transformers' fp32 logits at these positions are from its own in fp64."""
        return compare(
            np.concatenate(self.logits(texts)), np.concatenate(self.logits(texts, "fp64"))
        )

    def own_errors(self, texts: Sequence[Text], dtype: str) -> list[Metrics]:
        """transformers' own error in a dtype, for each of ATTENTIONS."""
        right = np.concatenate(self.logits(texts))
        return [
            compare(np.concatenate(self.logits(texts, dtype, attention)), right)
            for attention in ATTENTIONS
        ]

    def typical_error(self, dtype: str) -> float:
        """transformers' own error in a dtype at a typical position: ||difference||, at least FP8_LEAST of the logits.

        The root mean square over the tokens that `own_rounding` is measured on.
        """
        text = Text(self._tokens, tuple(range(len(self._tokens))))
        (right,) = self.logits([text])
        owns = self.own_errors([text], dtype)
        sums = [float(np.linalg.norm(own.by_position.difference)) for own in owns]
        return max(*sums, FP8_LEAST * float(np.linalg.norm(right))) / float(np.sqrt(len(right)))
