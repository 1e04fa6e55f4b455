"""Which experts each token goes to, against transformers' routers: a separate verdict, by margin.

A token whose k-th and next expert are almost equally likely may go to either in two correct programs, and then its
hidden state differs visibly. So agreement is counted by the router's margin: in transformers' fp32 logits, the k-th
largest minus the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwenport.exporter import Package
from qwenport.plugins import DOMAIN, MOE_ROUTER
from qwenport.validate.prompts import Prompts
from qwenport.validate.report import Check, RouterBand
from qwenport.validate.thresholds import RouterThresholds

if TYPE_CHECKING:
    from qwenport.engines import OnnxRuntimeSession

PREFILL_TOKENS, DECODE_TOKENS = 64, 16
EDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, np.inf)  # of the bands, in logits

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Routing:
    """Every choice of one text: margins fp32, agreement bool, both [layers, tokens]."""

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
        """Choices of a clear margin that no near-tie decided before them: bool [layers, tokens].

        A near-tie that fell the other way changes its token in all later layers, and there, through keys and
        values, the tokens after it.
        """
        flips = ~self.agrees & (self.margins < margin)
        reached = np.maximum.accumulate(np.maximum.accumulate(flips, axis=1), axis=0)
        disturbed = np.zeros_like(flips)
        disturbed[1:] = reached[:-1]
        clear: NDArray[np.bool_] = (self.margins >= margin) & ~disturbed
        return clear

    def agreement(self, margin: float) -> float:
        """The share of equal expert sets among the judged choices; NaN where there is none."""
        judged = self.judged(margin)
        return float(self.agrees[judged].mean()) if judged.any() else float("nan")

    def check(self, bounds: RouterThresholds) -> Check:
        """`agreement` against its bound, with the first choice that is wrong."""
        judged = self.judged(bounds.margin)
        flips = int((~self.agrees & (self.margins < bounds.margin)).sum())
        where = (
            f"{int(judged.sum())} of {judged.size} choices judged, of a margin of at least "
            f"{bounds.margin:g}; {flips} near-ties fell the other way"
        )
        wrong = np.argwhere(judged & ~self.agrees)
        if len(wrong):
            layer, token = map(int, wrong[0])
            where += (
                f"; first at layer {self.layers[layer]} position {token}, "
                f"margin {self.margins[layer, token]:.3g}"
            )
        share = self.agreement(bounds.margin)
        return Check("same experts outside near-ties", share, ">=", bounds.agreement, where)


def router_values(package: Package) -> dict[int, str]:
    """Sparse layer -> the value of model.onnx that holds its chosen experts. Empty for a dense model."""
    import onnx_ir as ir

    if package.config.moe is None:
        return {}
    nodes = [
        node
        for node in ir.load(package.model).graph
        if (node.domain, node.op_type) == (DOMAIN, MOE_ROUTER)
    ]
    names = [node.outputs[1].name for node in nodes]
    return dict(zip(package.config.moe.layers, (str(name) for name in names), strict=True))


def routing_text(session: OnnxRuntimeSession, prompts: Prompts) -> list[int]:
    """The tokens whose routing is judged; the last DECODE_TOKENS, or half of a small cache, are decoded."""
    return prompts.take(min(PREFILL_TOKENS + DECODE_TOKENS, session.capacity), start=2)


def observe_routing(
    session: OnnxRuntimeSession, names: dict[int, str], tokens: Sequence[int]
) -> dict[int, Int64]:
    """Run a text through prefill and then token by token: sparse layer -> chosen experts [len(tokens), k].

    Args:
        session: observes the values of `names`.
        names: see `router_values`.
        tokens: see `routing_text`.
    """
    prefilled = len(tokens) - min(DECODE_TOKENS, len(tokens) // 2)
    chosen: dict[int, list[Int64]] = {layer: [] for layer in names}
    session.reset()
    for chunk in (tokens[:prefilled], *([token] for token in tokens[prefilled:])):
        session.prefill([chunk])
        for layer, name in names.items():
            chosen[layer].append(session.observed[name][0])
    return {layer: np.concatenate(parts) for layer, parts in chosen.items()}


def compare_routing(
    chosen: dict[int, Int64], expected: dict[int, tuple[Float32, Int64]]
) -> Routing:
    """Hold chosen experts against transformers' fp32 `Reference.routing` of the same tokens."""
    margins, agrees = [], []
    for layer, experts in chosen.items():
        logits, reference = expected[layer]
        k, ordered = reference.shape[1], np.sort(logits, axis=1)[:, ::-1]
        # where a token gets all experts there is nothing to choose
        rest = ordered[:, k] if k < logits.shape[1] else np.full(len(logits), -np.inf)
        margins.append((ordered[:, k - 1] - rest).astype(np.float32))
        agrees.append((np.sort(experts, axis=1) == np.sort(reference, axis=1)).all(axis=1))
    return Routing(tuple(chosen), np.stack(margins), np.stack(agrees))
