"""The oracle's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from qwenport.validate.errors import ValidationError


@dataclass(frozen=True)
class Text:
    """Tokens that run in one piece, without a cache.

    Attributes:
        tokens: attention sees these tokens and no others.
        positions: indices into `tokens`, ascending, whose logits are requested; may be empty.
        first_position: the position_id of tokens[0]; the others follow it.
        requests: if the model scales by length, the positions of the request that each token was part of; empty:
            all were part of one that ends with the last token.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    first_position: int = 0
    requests: tuple[int, ...] = ()

    @classmethod
    def ending(cls, tokens: Sequence[int], last: int, first_position: int = 0) -> Self:
        """A text whose `last` last tokens get logits.

        Raises:
            ValidationError: it does not have that many tokens, or `last` is negative.
        """
        if not 0 <= last <= len(tokens):
            raise ValidationError(f"not a text: the last {last} of {len(tokens)} tokens")
        return cls(tuple(tokens), tuple(range(len(tokens) - last, len(tokens))), first_position)


@dataclass(frozen=True)
class Choices:
    """What a target chose for a text: experts, and FP8 codes. The oracle takes over those as good as its own.

    Attributes:
        experts: sparse layer -> int64 [len(tokens), k].
        margin: in router logits. Another set of experts is taken over if the best expert it lacks is ahead of the
            worst one it has instead by less than this.
        rounded: layer -> path of a linear in it -> its input rounded to FP8, fp32 [len(tokens), K].
    """

    experts: Mapping[int, NDArray[np.int64]]
    margin: float
    rounded: Mapping[int, Mapping[str, NDArray[np.float32]]] = field(default_factory=dict)
