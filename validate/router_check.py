"""Which experts each token goes to, against transformers' routers: a separate verdict, by margin.

A token whose k-th and next expert are almost equally likely may go to either in two correct programs, and then its
hidden state differs visibly. The oracle takes such a choice over from the target and continues from there, so that
everything after it is still comparable; it never takes over a choice with a clear margin. Agreement is counted by the
router's margin: in transformers' fp32 logits, the k-th largest minus the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwenport.validate.report import Check, RouterBand

EDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, np.inf)  # of the bands, in logits

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Routing:
    """All choices for one text: margins fp32, agreement bool, both [layers, tokens]."""

    layers: tuple[int, ...]
    margins: Float32
    agrees: NDArray[np.bool_]

    def bands(self) -> tuple[RouterBand, ...]:
        """Counts by margin; bands without a choice are left out."""
        found = []
        for least, most in itertools.pairwise(EDGES):
            inside = (self.margins >= least) & ((self.margins < most) | (most == np.inf))
            if inside.any():
                agreeing = int(self.agrees[inside].sum())
                found.append(RouterBand(least, float(most), int(inside.sum()), agreeing))
        return tuple(found)

    def judged(self, margin: float) -> NDArray[np.bool_]:
        """Choices with a clear margin: bool [layers, tokens]."""
        clear: NDArray[np.bool_] = self.margins >= margin
        return clear

    def agreement(self, margin: float) -> float:
        """The share of equal expert sets among the judged choices; NaN if there are none."""
        judged = self.judged(margin)
        return float(self.agrees[judged].mean()) if judged.any() else float("nan")

    def flips(self, margin: float) -> int:
        """The number of near-ties that fell the other way."""
        return int((~self.agrees & ~self.judged(margin)).sum())

    def check(self, margin: float, agreement: float) -> Check:
        """`agreement` against its bound, with the first choice that is wrong."""
        judged = self.judged(margin)
        where = (
            f"{int(judged.sum())} of {judged.size} choices judged, of a margin of at least "
            f"{margin:g}; {self.flips(margin)} near-ties fell the other way"
        )
        wrong = np.argwhere(judged & ~self.agrees)
        if len(wrong):
            layer, token = map(int, wrong[0])
            where += (
                f"; first at layer {self.layers[layer]} position {token}, "
                f"margin {self.margins[layer, token]:.3g}"
            )
        share = self.agreement(margin)
        return Check("same experts outside near-ties", share, ">=", agreement, where)


def compare_routing(
    chosen: Mapping[int, Int64], expected: Mapping[int, tuple[Float32, Int64]]
) -> Routing:
    """Compare chosen experts with transformers' fp32 `Reference.routing` of the same tokens.

    Args:
        chosen: sparse layer -> experts [tokens, k].
        expected: sparse layer -> (router logits [tokens, E], transformers' own choice [tokens, k]).
    """
    margins, agrees = [], []
    for layer, experts in chosen.items():
        logits, reference = expected[layer]
        k, ordered = reference.shape[1], np.sort(logits, axis=1)[:, ::-1]
        # if a token gets all experts there is nothing to choose
        rest = ordered[:, k] if k < logits.shape[1] else np.full(len(logits), -np.inf)
        margins.append((ordered[:, k - 1] - rest).astype(np.float32))
        same_number = experts.shape == reference.shape
        agrees.append(
            (np.sort(experts, axis=1) == np.sort(reference, axis=1)).all(axis=1)
            if same_number
            else np.zeros(len(reference), dtype=bool)
        )
    return Routing(tuple(chosen), np.stack(margins), np.stack(agrees))
