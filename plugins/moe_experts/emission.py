"""A call of the operator in torch -> its node in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qwenport.contract import DOMAIN
from qwenport.plugins.moe_experts.schema import NAME
from qwenport.plugins.operator import Emitter


def emit(
    e: Emitter,
    x: Any,
    indices: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    input_scales: None,
    by_expert: bool,
    round_inner: bool,
) -> Sequence[ir.Value]:
    """See `Operator.emit`. Whether inputs are rounded is a matter of the weights."""
    assert by_expert is False and round_inner is False
    scales = e.input_scales(down)
    if scales is not None:
        return e.ops(NAME, x, indices, weights, gate_up, down, scales, domain=DOMAIN)
    attributes = {"round_inner": 1} if e.rounds(down) else {}
    rounded = e.rounded(x, gate_up)
    return e.ops(NAME, rounded, indices, weights, gate_up, down, domain=DOMAIN, **attributes)
