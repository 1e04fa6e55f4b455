"""A call of the operator in torch -> its node in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qwenport.contract import DOMAIN
from qwenport.plugins.moe_router.schema import NAME, TOP_K
from qwenport.plugins.operator import Emitter

NOT_STEPWISE = (
    "a token's experts depend on the other tokens of its step, so prefill and decode would disagree"
)


def is_stepwise(kind: str) -> bool:
    """Whether a token's experts depend on that token alone, so that a KV-cache decoder may use the kind."""
    return kind == TOP_K


def emit(
    e: Emitter, logits: Any, kind: str, k: int, normalize: bool, capacity_factor: float
) -> Sequence[ir.Value]:
    """See `Operator.emit`."""
    assert is_stepwise(kind), f"routing kind {kind}: {NOT_STEPWISE}"
    return e.ops(NAME, logits, domain=DOMAIN, kind=kind, k=k, normalize=int(normalize))
