"""Which experts each token goes to, against transformers' routers: a separate verdict, by margin.

A token whose k-th and next expert are almost equally likely may go to either in two correct programs, and then its
hidden state differs visibly. So agreement is counted by the router's margin: in transformers' fp32 logits, the k-th
largest minus the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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
    from qwenport.validate.reference import Reference

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
            inside = (self.margins >= least) & (self.margins < most)
            if inside.any():
                agreeing = int(self.agrees[inside].sum())
                found.append(RouterBand(least, float(most), int(inside.sum()), agreeing))
        return tuple(found)

    def check(self, bounds: RouterThresholds) -> Check:
        """The share of equal expert sets among choices of a clear margin."""
        clear = self.margins >= bounds.margin
        share = float(self.agrees[clear].mean()) if clear.any() else float("nan")
        where = f"{int(clear.sum())} of {clear.size} choices have a margin of at least {bounds.margin:g}"
        if not self.agrees[clear].all():
            layer, token = map(int, np.argwhere(clear & ~self.agrees)[0])
            where += (
                f"; first at layer {self.layers[layer]} position {token}, "
                f"margin {self.margins[layer, token]:.3g}"
            )
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


def compare_routing(
    session: OnnxRuntimeSession, names: dict[int, str], reference: Reference, prompts: Prompts
) -> Routing:
    """Run a text through prefill and then token by token, and hold each choice against transformers'.

    Args:
        session: observes the values of `names`.
        names: see `router_values`.
        reference: the oracle.
        prompts: where the text is taken from.
    """
    count = min(PREFILL_TOKENS + DECODE_TOKENS, session.capacity)
    tokens = prompts.take(count, start=2)
    expected = reference.routing(tokens)
    chosen: dict[int, list[Int64]] = {layer: [] for layer in names}
    session.reset()
    for chunk in _chunks(tokens):
        session.prefill([chunk])
        for layer, name in names.items():
            chosen[layer].append(session.observed[name][0])
    margins, agrees = [], []
    for layer, parts in chosen.items():
        logits, experts = expected[layer]
        k = experts.shape[1]
        ordered = np.sort(logits, axis=1)[:, ::-1]
        rest = ordered[:, k] if k < logits.shape[1] else np.full(count, -np.inf, dtype=np.float32)
        margins.append(ordered[:, k - 1] - rest)
        agrees.append(
            (np.sort(np.concatenate(parts), axis=1) == np.sort(experts, axis=1)).all(axis=1)
        )
    return Routing(tuple(names), np.stack(margins), np.stack(agrees))


def _chunks(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    yield tokens[:PREFILL_TOKENS]
    for token in tokens[PREFILL_TOKENS:]:
        yield [token]
