"""What the oracle is asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Text:
    """Tokens that are run in one piece, without a cache.

    Attributes:
        tokens: attention sees these tokens and no other.
        last: how many of the last positions are asked for.
        first_position: the position of tokens[0]; the others follow it.
    """

    tokens: tuple[int, ...]
    last: int
    first_position: int = 0


@dataclass(frozen=True)
class Choices:
    """The experts that a target chose for a text. The oracle takes over those that were as good as its own.

    Attributes:
        experts: sparse layer -> int64 [len(tokens), k].
        margin: in router logits. Another set of experts is taken over if the best one it lacks is ahead of the worst
            one it has instead by less than this.
    """

    experts: Mapping[int, NDArray[np.int64]]
    margin: float
